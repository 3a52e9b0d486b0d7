// Elements, words and times. Text from the API only ever becomes text.

const $ = (id) => document.getElementById(id);

function h(name, attributes, ...children) {
  const element = document.createElement(name);
  return fill(element, attributes, children);
}

function s(name, attributes, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "onclick") element.addEventListener("click", value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/// Puts new children in, and the focus back where it was.
function renew(host, ...children) {
  const focused = host.contains(document.activeElement) ? document.activeElement.dataset.focus : undefined;
  host.replaceChildren(...children.flat().filter(Boolean));
  if (focused === undefined) return;
  for (const candidate of host.querySelectorAll("[data-focus]")) {
    if (candidate.dataset.focus === focused) candidate.focus({ preventScroll: true });
  }
}

// The daemon's time, which is what keys go by, whatever this machine's clock says.
const clock = { at: Date.now(), read: performance.now(), frozen: false };

function now() {
  return clock.frozen ? clock.at : clock.at + performance.now() - clock.read;
}

function setClock(view) {
  clock.at = Date.parse(view.now);
  clock.read = performance.now();
  clock.frozen = view.frozen;
}

const full = new Intl.DateTimeFormat("en-GB", { weekday: "short", day: "numeric", month: "short", hour: "2-digit", minute: "2-digit" });
const withYear = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short", year: "numeric", hour: "2-digit", minute: "2-digit" });
const withSeconds = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });

/// The one or two largest units, as the command line shows them.
function rough(millis) {
  const seconds = Math.max(0, Math.floor(millis / 1000));
  const two = (number) => String(number).padStart(2, "0");
  if (seconds < 60) return `${seconds}s`;
  if (seconds < 600 && seconds % 60) return `${Math.floor(seconds / 60)}m${two(seconds % 60)}s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)}m`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)}h${two(Math.floor((seconds % 3600) / 60))}m`;
  return `${Math.floor(seconds / 86400)}d`;
}

/// A moment in the reader's time zone.
function moment(at) {
  const apart = Math.abs(at - now());
  if (apart < 12 * 3600e3) return withSeconds.format(at);
  return (apart < 200 * 86400e3 ? full : withYear).format(at);
}

function utc(at) {
  return `${new Date(at).toISOString().replace("T", " ").replace(/\.\d+Z$/, "")} UTC`;
}

/// A `time` element: the moment, "in …", or "… ago", which go on ticking; UTC on hover.
function time(text, form) {
  const at = Date.parse(text);
  if (Number.isNaN(at)) return h("span", {}, String(text));
  const element = h("time", { datetime: new Date(at).toISOString(), "data-form": form || "moment" });
  element.title = form === "moment" || !form ? utc(at) : `${full.format(at)} · ${utc(at)}`;
  element.textContent = timeText(at, form);
  return element;
}

function timeText(at, form) {
  if (form === "in") return at > now() ? `in ${rough(at - now())}` : "now";
  if (form === "ago") return `${rough(now() - at)} ago`;
  if (form === "for") return rough(now() - at);
  return moment(at);
}

function tickTimes() {
  for (const element of document.querySelectorAll("time[data-form]")) {
    if (element.dataset.form === "moment") continue;
    const text = timeText(Date.parse(element.dateTime), element.dataset.form);
    if (element.textContent !== text) element.textContent = text;
  }
}

/// `9kQ2…xA`: enough to recognise a kid.
function shortKid(kid) {
  const letters = [...String(kid)];
  return letters.length <= 10 ? letters.join("") : `${letters.slice(0, 4).join("")}…${letters.slice(-2).join("")}`;
}

function kidElement(kid) {
  return h("code", { title: kid }, shortKid(kid));
}

function say(text) {
  $("announce").textContent = text;
}

const ALARMS = {
  degraded: "The configuration does not fit this keyset; its former policy goes on and nothing is promoted.",
  absent: "The keyset is gone from the configuration and not drained.",
  drained: "The keyset is drained: it signs no more, although the configuration still has it.",
  frozen: "The stored record cannot be trusted; the last good keys are served and nothing is written.",
  unauthenticated: "The seal could not be reached: the record is served unauthenticated.",
  clock_frozen: "The clock stepped: keys do not move until it agrees again or is accepted.",
  store_unavailable: "The store cannot be read or written.",
  rotation_overdue: "A scheduled rotation is late.",
  no_standby: "No key waits to take over.",
  no_active_key: "No key signs.",
  jwks_full: "The JWKS has no room for another key.",
  publication_mismatch: "What is served elsewhere differs from what we publish.",
  probe_unreachable: "What is served elsewhere cannot be fetched; waiting keys do not propagate.",
  caches_exceeded: "What is served elsewhere may be cached for longer than declared.",
  publisher_failing: "A place where the issuer is published has been behind for long.",
  key_disabled: "The backend disabled the key that signs.",
  algorithm_unconfirmed: "Waiting keys have another algorithm, which an operator has to confirm.",
  backend_unavailable: "The backend makes no keys, or does not sign.",
  destruction_pending: "A private key that should be destroyed is not yet.",
  heartbeat_failed: "The daemon cannot record that it is alive.",
  config_invalid: "The changed configuration is invalid; the former one goes on.",
  superseded: "Another replica adopted another policy than the configuration here says.",
  replica_lagging: "A replica lacks a waiting key for longer than it may.",
  stale: "The store has not confirmed the keys for too long: this replica does not sign.",
};

const REASONS = {
  no_standby: "no key is ready to take over",
  propagation: "the next key was not published for long enough",
  probe: "a probe does not show the key",
  replicas: "a replica does not publish the key yet",
  silence: "publication was interrupted",
  hold: "a hold",
  clock_frozen: "the clock is not trusted",
  clock_gap: "a gap in time after which removals wait",
  degraded: "the configuration does not fit",
  absent: "the keyset is gone from the configuration",
  algorithm_unconfirmed: "the algorithm is not confirmed",
  jwks_full: "the JWKS has no room",
};

function reasons(names) {
  return (names || []).map((name) => (Object.hasOwn(REASONS, name) ? REASONS[name] : name)).join(", ");
}

