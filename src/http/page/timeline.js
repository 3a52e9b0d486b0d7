// Keys over time as SVG: past and now solid, what is to come lighter. Height tells states apart as well as colour.

const HEIGHTS = { pending: 5, standby: 9, active: 15, retiring: 5, revoked: 15 };
const STATES = ["pending", "standby", "active", "retiring", "revoked"];
const LANE = 22;
const AXIS = 20;

/// Draws into `host`, as wide as that is, around the moment of drawing.
function drawTimeline(host, timeline) {
  const width = Math.max(240, Math.floor(host.clientWidth || host.parentElement.clientWidth));
  const left = width < 520 ? 34 : 104;
  const shift = Math.max(0, now() - Date.parse(timeline.now));
  const from = Date.parse(timeline.from) + shift;
  const until = Date.parse(timeline.until) + shift;
  const x = (at) => left + ((Math.min(Math.max(at, from), until) - from) / (until - from || 1)) * (width - left - 1);
  const edge = until - (until - from) / 100;
  const lanes = timeline.keys.filter((lane) => lane.phases.some((phase) => Date.parse(phase.from) < edge));
  const height = AXIS + lanes.length * LANE + 4;
  const svg = s("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": inWords(timeline) });
  lanes.forEach((_, row) => {
    if (row % 2 === 0) svg.append(s("rect", { class: "row", x: 0, y: AXIS + row * LANE, width, height: LANE }));
  });
  for (const tick of ticks(from, until, (width - left) / 84)) {
    const at = x(tick.at);
    svg.append(s("line", { class: "grid", x1: at, x2: at, y1: AXIS - 4, y2: height }));
    const room = Math.abs(at - x(now())) > 44 && at < width - 30;
    if (room) svg.append(s("text", { x: at + 3, y: AXIS - 7 }, tick.text));
  }
  lanes.forEach((lane, row) => svg.append(drawLane(lane, AXIS + row * LANE, x, left, until)));
  const line = x(now());
  svg.append(s("line", { class: "now", x1: line, x2: line, y1: AXIS - 4, y2: height }));
  svg.append(s("text", { class: "now-name", x: line, y: AXIS - 7, "text-anchor": "middle" }, "now"));
  host.replaceChildren(svg);
}

function drawLane(lane, top, x, left, until) {
  const group = s("g", {});
  const name = left < 60 ? `#${lane.serial}` : `#${lane.serial} ${lane.kid ? shortKid(lane.kid) : "to come"}`;
  const label = s("text", { class: lane.kid ? "lane-name" : "lane-name unmade", x: 2, y: top + LANE / 2 + 4 }, name);
  label.append(s("title", {}, lane.kid || `Key ${lane.serial} is not made yet`));
  group.append(label);
  for (const phase of lane.phases) {
    const state = STATES.includes(phase.state) ? phase.state : null;
    const begin = Date.parse(phase.from);
    if (!state || begin > until) continue;
    const end = state === "revoked" ? begin : phase.until ? Date.parse(phase.until) : until;
    const about = `Key ${lane.serial} ${state}: ${moment(begin)} to ${phase.until ? moment(end) : "beyond this picture"} (${utc(begin)})`;
    const parts = end <= now() ? [[begin, end, ""]] : begin >= now() ? [[begin, end, " coming"]]
      : [[begin, now(), ""], [now(), end, " coming"]];
    for (const [start, stop, coming] of parts) {
      const bar = drawBar(state, coming, x(start), x(stop), top);
      if (x(stop) <= left && state !== "revoked") continue;
      bar.append(s("title", {}, about));
      group.append(bar);
    }
    const middle = (x(begin) + x(end)) / 2;
    if (state === "active" && x(end) - x(begin) > 58) {
      const coming = middle > x(now()) ? " coming" : "";
      group.append(s("text", { class: `on-bar${coming}`, x: middle, y: top + LANE / 2 + 4, "text-anchor": "middle" }, "active"));
    }
  }
  return group;
}

/// However short, it is to be seen.
function drawBar(state, coming, start, stop, top) {
  const height = HEIGHTS[state];
  const y = top + (LANE - height) / 2;
  return s("rect", { class: `bar ${state}${coming}`, x: start, y, width: Math.max(2.5, stop - start), height, rx: state === "active" ? 2 : 1 });
}

/// At most `most` marks on whole hours, days or months of the reader's time zone.
function ticks(from, until, most) {
  const hour = 3600e3, day = 24 * hour;
  const short = [1e3, 5e3, 15e3, 30e3, 60e3, 300e3, 900e3, 1800e3, hour, 3 * hour, 6 * hour, 12 * hour];
  const fits = (step) => (until - from) / step <= Math.max(2, most);
  const marks = [];
  const step = short.find(fits);
  if (step) {
    const midnight = new Date(from).setHours(0, 0, 0, 0);
    for (let at = midnight + Math.ceil((from - midnight) / step) * step; at < until; at += step) marks.push({ at, text: hourText(at, step) });
    return marks;
  }
  const days = [1, 2, 7, 14].find((count) => fits(count * day));
  const date = new Date(from);
  date.setHours(0, 0, 0, 0);
  const months = days ? 0 : [1, 2, 3, 6, 12, 24, 60].find((count) => fits(count * 30 * day)) || 120;
  if (months) date.setDate(1);
  const advance = () => (months ? date.setMonth(date.getMonth() + months) : date.setDate(date.getDate() + days));
  while (date.getTime() < from) advance();
  for (; date.getTime() < until; advance()) marks.push({ at: date.getTime(), text: dateText(date, months) });
  return marks;
}

function hourText(at, step) {
  const date = new Date(at);
  if (date.getHours() + date.getMinutes() + date.getSeconds() === 0) return dateText(date, 0);
  const two = (number) => String(number).padStart(2, "0");
  return `${two(date.getHours())}:${two(date.getMinutes())}${step < 60e3 ? `:${two(date.getSeconds())}` : ""}`;
}

function dateText(date, months) {
  const month = date.toLocaleString("en-GB", { month: "short" });
  if (!months) return `${date.getDate()} ${month}`;
  return months >= 12 || date.getMonth() === 0 ? `${month} ${date.getFullYear()}` : month;
}

/// What the picture shows, for those who do not see it. The table below it has every key.
function inWords(timeline) {
  const coming = timeline.rotations.slice(0, 3).map((rotation) => `key ${rotation.serial} signs from ${moment(Date.parse(rotation.at))}`);
  if (timeline.stands_still) return `Timeline of ${timeline.keyset}: nothing moves by itself.`;
  return `Timeline of ${timeline.keyset}: ${coming.length ? coming.join(", ") : "no rotation to come"}.`;
}

function legend() {
  const entries = { pending: "pending", standby: "standby", active: "active: signs", retiring: "retiring: still published", revoked: "revoked" };
  const items = Object.entries(entries).map(([state, text]) => h("li", {}, h("span", { class: `swatch ${state}` }), text));
  return h("ul", { class: "legend", "aria-label": "Legend" }, ...items, h("li", {}, h("span", { class: "swatch coming" }), "lighter: to come"));
}

