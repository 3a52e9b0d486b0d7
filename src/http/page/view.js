// The keysets, the replicas and what happened, as last told.

const SHOWN_MAX = 40;

/// By name: the element of each keyset that is shown, what it was drawn from, and its timeline.
const cards = new Map();

function showKeysets(keysets, me) {
  const wanted = $("filter").value.trim().toLowerCase();
  const matching = keysets.filter((keyset) => `${keyset.name} ${keyset.issuer} ${keyset.algorithm}`.toLowerCase().includes(wanted));
  const shown = matching.slice(0, SHOWN_MAX);
  $("filter-row").hidden = keysets.length < 5 && !wanted;
  const count = matching.length > shown.length ? `${shown.length} of ${matching.length} shown` : `${matching.length} of ${keysets.length}`;
  if ($("filter-count").textContent !== count) $("filter-count").textContent = count;
  const names = new Set(shown.map((keyset) => keyset.name));
  for (const [name, card] of cards) {
    if (!names.has(name)) {
      card.element.remove();
      cards.delete(name);
    }
  }
  shown.forEach((keyset, index) => {
    const card = cards.get(keyset.name) || newCard(keyset.name);
    const place = $("keysets").children[index];
    if (place !== card.element) $("keysets").insertBefore(card.element, place || null);
    updateCard(card, keyset, me);
  });
  $("none").hidden = keysets.length > 0;
}

function newCard(name) {
  const body = h("div", {});
  const picture = h("div", {});
  const drawing = h("div", { class: "drawing" }, picture);
  const keys = h("div", {});
  const card = { element: h("section", { class: "card", "aria-label": `Keyset ${name}`, "data-keyset": name }, body, drawing, keys), body, picture, drawing, keys };
  cards.set(name, card);
  return card;
}

function updateCard(card, keyset, me) {
  const changed = card.generation !== undefined && card.generation !== keyset.generation;
  if (changed) say(`${keyset.name}: generation ${keyset.generation}, ${HEALTH[keyset.health] || keyset.health}.`);
  // What only passes with time is left to the ticking elements.
  const print = JSON.stringify([{ ...keyset, next_rotation: { ...keyset.next_rotation, overdue_seconds: 0 } }, me]);
  card.generation = keyset.generation;
  if (print === card.print) return;
  card.print = print;
  card.element.className = `card ${keyset.health === "ok" ? "" : keyset.health}`;
  renew(card.body, heading(keyset, me), ...notices(keyset), nextRotation(keyset));
  renew(card.keys, keyTable(keyset, me));
}

const HEALTH = { ok: "healthy", degraded: "degraded", failing: "failing" };

function heading(keyset, me) {
  const health = h("span", { class: `chip ${keyset.health}` }, HEALTH[keyset.health] || keyset.health);
  return h("div", { class: "head" },
    h("h2", {}, keyset.name), health, h("span", { class: "mono" }, keyset.algorithm), h("span", { class: "where" }, keyset.issuer),
    h("span", { class: "dim" }, `generation ${keyset.generation}`), buttons(keyset, me));
}

function buttons(keyset, me) {
  if (!mayChange(me)) return null;
  const button = (kind, text, why) => h("button", { type: "button", "data-focus": `${keyset.name}/${kind}`, "aria-label": `${text} ${keyset.name}`,
    disabled: Boolean(why), title: why || null, onclick: () => openAction(kind, { keyset: keyset.name, generation: keyset.generation }) }, text);
  const back = keyset.keys.some((key) => key.state === "retiring") ? null : "No key is retiring: there is nothing to go back to";
  return h("div", { class: "buttons" }, button("rotate", "Rotate"), button("rollback", "Roll back", back),
    keyset.hold ? button("resume", "Resume") : button("hold", "Hold"));
}

function mayChange(me) {
  return me.role === "operator" && me.replica_role !== "signer";
}

function notices(keyset) {
  const alarms = keyset.alarms.map((alarm) => h("p", { class: `notice ${keyset.health === "failing" ? "bad" : "warn"}` },
    h("b", {}, alarm.replaceAll("_", " ")), Object.hasOwn(ALARMS, alarm) ? ` — ${ALARMS[alarm]}` : ""));
  if (!keyset.hold) return alarms;
  const hold = keyset.hold;
  const until = hold.until ? ["until ", time(hold.until), " (", time(hold.until, "in"), ")"] : "until it is resumed";
  return [h("p", { class: "notice warn", "data-hold": "" }, h("b", {}, "Held"), " by ", hold.actor, " since ", time(hold.since), " ", until,
    hold.reason ? [": ", h("q", {}, hold.reason)] : ""), ...alarms];
}

function nextRotation(keyset) {
  const next = keyset.next_rotation;
  if (!next) return h("p", { class: "next dim" }, "No rotation lies ahead.");
  const blocked = next.blocked_by.length ? h("span", { class: "dim" }, ` Waits for ${reasons(next.blocked_by)}.`) : "";
  const word = next.trigger === "first" ? "The first key signs " : "Next rotation ";
  return h("p", { class: "next" }, word, h("b", {}, time(next.at, "in")), ", ", time(next.at), ".", blocked);
}

function keyTable(keyset, me) {
  const may = mayChange(me);
  const head = h("tr", {}, ...["#", "Key", "State", "Since", "Next"].map((text) => h("th", { scope: "col" }, text)),
    may ? h("th", { scope: "col" }, h("span", { class: "unseen" }, "Action")) : null);
  const rows = keyset.keys.map((key) => h("tr", { "data-serial": key.serial },
    h("td", {}, String(key.serial)), h("td", {}, kidElement(key.kid)), h("td", { class: `state ${key.state}` }, key.state),
    h("td", {}, time(key.entered_at, "for")), h("td", { class: "wide" }, nextOf(key)),
    may ? h("td", { class: "end" }, revokeButton(keyset, key)) : null));
  return h("table", { class: "stack keys" }, h("caption", { class: "unseen" }, `Keys of ${keyset.name}`), h("thead", {}, head), h("tbody", {}, ...rows));
}

function revokeButton(keyset, key) {
  return h("button", { type: "button", class: "quiet", "data-focus": `${keyset.name}/revoke/${key.serial}`, "aria-label": `Revoke key ${key.serial} of ${keyset.name}`,
    onclick: () => openAction("revoke", { keyset: keyset.name, generation: keyset.generation, key: { serial: key.serial, kid: key.kid } }) }, "Revoke");
}

function nextOf(key) {
  const next = key.next;
  if (!next) return "";
  const missing = (key.missing_replicas || []).length ? `; not yet at ${key.missing_replicas.join(", ")}` : "";
  const waits = next.waiting_for.length && key.state !== "standby" ? `, waits for ${reasons(next.waiting_for)}` : "";
  if (key.state === "standby") {
    const earliest = next.not_before ? [", ", time(next.not_before, "in"), " at the earliest"] : "";
    return h("span", {}, "active at the next rotation", ...[earliest].flat(), missing);
  }
  return h("span", {}, `${next.state} `, next.at ? [time(next.at, "in"), " · ", time(next.at)] : "", waits, missing);
}

/// Fetches a timeline where what was drawn from it is outdated, and draws all anew: now moves on.
async function showTimelines(keysets) {
  for (const keyset of keysets) {
    const card = cards.get(keyset.name);
    if (!card) continue;
    const old = !card.timeline || card.timeline.generation !== keyset.generation || performance.now() - card.fetched > 60e3;
    if (old) {
      const answer = await ask("GET", `/v1/keysets/${encodeURIComponent(keyset.name)}/timeline`);
      if (answer.status === 401) return;
      if (answer.ok) {
        card.timeline = answer.body;
        card.fetched = performance.now();
      }
    }
    if (card.timeline && card.element.isConnected) drawTimeline(card.picture, card.timeline);
  }
}

function redraw() {
  for (const card of cards.values()) if (card.timeline) drawTimeline(card.picture, card.timeline);
}

function showReplicas(list) {
  const rows = list.replicas.map((replica) => {
    const lacks = replica.keysets.flatMap((shown) => shown.lacks.map((key) => `${shown.keyset} #${key.serial}`));
    const shows = replica.keysets.length > 6 ? `${replica.keysets.length} keysets`
      : replica.keysets.map((shown) => `${shown.keyset} ${shown.generation ?? "—"}`).join(", ");
    const standing = replica.stopped ? "stopped" : !replica.live ? "silent" : lacks.length ? "lags" : "up to date";
    return h("tr", {},
      h("td", {}, h("code", {}, replica.name), replica.own ? h("span", { class: "dim" }, " this one") : ""),
      h("td", {}, replica.role), h("td", {}, replica.publishes ? "publishes" : "publishes nothing"),
      h("td", {}, h("span", { class: `chip ${standing === "up to date" ? "ok" : "degraded"}` }, standing)),
      h("td", {}, replica.own ? "now" : time(replica.last_seen_at, "ago")),
      h("td", { class: "wide" }, lacks.length ? `lacks ${lacks.join(", ")}` : `shows ${shows || "nothing"}`), h("td", { class: "dim" }, replica.version));
  });
  const head = h("tr", {}, ...["Name", "Role", "JWKS", "Standing", "Seen", "Generations", "Version"].map((text) => h("th", { scope: "col" }, text)));
  renew($("replicas"), h("table", { class: "stack" }, h("caption", { class: "unseen" }, "Replicas"), h("thead", {}, head), h("tbody", {}, ...rows)),
    list.complete ? null : h("p", { class: "dim" }, "There may be others: managers do not tell of them."));
}

function showAudit(items) {
  const rows = [...items].reverse().map((item) => h("tr", {},
    h("td", {}, time(item.time)), h("td", {}, item.keyset || "—"), h("td", { class: "state" }, item.action), h("td", {}, item.actor),
    h("td", {}, ...item.kids.slice(0, 4).flatMap((kid) => [kidElement(kid), " "])),
    h("td", { class: "wide dim" }, [item.reason, item.detail].filter(Boolean).join(" · "))));
  const head = h("tr", {}, ...["Time", "Keyset", "What", "Who", "Keys", "Why"].map((text) => h("th", { scope: "col" }, text)));
  renew($("audit"), items.length ? h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Audit entries", "data-focus": "audit" },
    h("table", { class: "stack" }, h("caption", { class: "unseen" }, "Audit entries, newest first"), h("thead", {}, head), h("tbody", {}, ...rows)))
    : h("p", { class: "dim" }, "Nothing was recorded lately."));
}

