// What operators do: first the daemon's own answer of what would happen, then, on their word, the same for good.

const ACTIONS = {
  rotate: {
    title: (keyset) => `Rotate ${keyset}`, confirm: "Rotate", danger: false,
    about: "The oldest standby key signs from now on; the one that signs now stays published until its last token has expired.",
    request: (target) => ["POST", `/v1/keysets/${encodeURIComponent(target.keyset)}/rotate`],
  },
  rollback: {
    title: (keyset) => `Roll back ${keyset}`, confirm: "Roll back", danger: false,
    about: "The key that signed before signs again, and the schedule is held.",
    request: (target) => ["POST", `/v1/keysets/${encodeURIComponent(target.keyset)}/rollback`],
  },
  hold: {
    title: (keyset) => `Hold ${keyset}`, confirm: "Hold", danger: false, until: true,
    about: "Scheduled rotations, removals and the destruction of old keys wait. Keys sign on, and revoking still works.",
    request: (target) => ["PUT", `/v1/keysets/${encodeURIComponent(target.keyset)}/hold`],
  },
  resume: {
    title: (keyset) => `Resume ${keyset}`, confirm: "Resume", danger: false,
    about: "The hold ends: whatever is due by then happens at once.",
    request: (target) => ["DELETE", `/v1/keysets/${encodeURIComponent(target.keyset)}/hold`],
  },
  revoke: {
    title: (keyset, key) => `Revoke key ${key.serial} of ${keyset}`, confirm: "Revoke for good", danger: true,
    about: "The key leaves the JWKS at once and never comes back. Tokens that it signed are rejected by whoever sees that.",
    request: (target) => ["POST", `/v1/keysets/${encodeURIComponent(target.keyset)}/keys/${encodeURIComponent(target.key.kid)}/revoke`],
  },
};

const HOLDS = [["", "until it is resumed"], ["1h", "1 hour"], ["4h", "4 hours"], ["24h", "1 day"], ["168h", "7 days"]];

/// What the open dialog is about.
let shown = null;

/// Opens the dialog. `target` names the keyset, its generation as shown, and for a revocation the key.
function openAction(kind, target) {
  const action = ACTIONS[kind];
  const dialog = $("dialog");
  const state = { kind, action, target, generation: target.generation, extra: {}, looked: 0, pending: null };
  const reason = h("input", { id: "dialog-reason", type: "text", maxlength: 1000, autocomplete: "off" });
  const until = h("select", { id: "dialog-until" }, ...HOLDS.map(([value, text]) => h("option", { value }, text)));
  const answer = h("div", { class: "answer", id: "dialog-answer", "aria-live": "polite", tabindex: "-1" });
  const cancel = h("button", { type: "button", id: "dialog-cancel", onclick: () => dialog.close() }, "Cancel");
  const go = h("button", { type: "button", id: "dialog-confirm", class: action.danger ? "danger" : "primary", disabled: true,
    onclick: () => commit(state) }, action.confirm);
  Object.assign(state, { dialog, reason, until, answer, cancel, go });
  until.addEventListener("change", () => look(state));
  dialog.replaceChildren(
    h("h2", { id: "dialog-title" }, action.title(target.keyset, target.key)),
    target.key ? h("p", { class: "dim mono" }, target.key.kid) : "",
    h("p", { class: "dim" }, action.about),
    action.until ? h("div", { class: "field" }, h("label", { for: "dialog-until" }, "How long"), until) : "",
    h("div", { class: "field" }, h("label", { for: "dialog-reason" }, "Reason, for the audit log"), reason),
    answer,
    h("div", { class: "buttons" }, cancel, go),
  );
  const opener = `${target.keyset}/${kind}${target.key ? `/${target.key.serial}` : ""}`;
  if (shown) shown.closed = true;
  shown = state;
  dialog.onclose = () => {
    if (dialog.open) return; // The event of the dialog before, which comes late.
    state.closed = true;
    dialog.replaceChildren();
    const again = [...document.querySelectorAll("[data-focus]")].find((element) => element.dataset.focus === opener);
    if (again) again.focus();
  };
  dialog.showModal();
  reason.focus();
  look(state);
}

function bodyOf(state, dryRun) {
  const body = { ...state.extra, dry_run: dryRun };
  if (state.reason.value.trim()) body.reason = state.reason.value.trim();
  if (state.action.until && state.until.value) {
    body.until = new Date(now() + Number.parseInt(state.until.value, 10) * 3600e3).toISOString();
  }
  return body;
}

/// Asks what would happen.
async function look(state) {
  const round = ++state.looked;
  state.go.disabled = true;
  state.pending = null;
  renew(state.answer, h("p", { class: "dim" }, "Asking what would happen …"));
  const [method, path] = state.action.request(state.target);
  const answer = await ask(method, path, { body: bodyOf(state, true), generation: state.generation });
  if (state.closed || round !== state.looked) return;
  if (!answer.ok) return refuse(state, answer);
  renew(state.answer, h("h3", {}, "What will happen"), describe(state, answer.body), options(state));
  state.go.disabled = false;
}

/// Does it. A request without an answer may have been carried out: trying again repeats the very same one.
async function commit(state) {
  state.go.disabled = true;
  state.reason.disabled = state.until.disabled = true;
  state.pending ||= { body: bodyOf(state, false), key: freshKey() };
  const [method, path] = state.action.request(state.target);
  const answer = await ask(method, path, { ...state.pending, generation: state.generation });
  if (state.closed) return;
  if (answer.lost) {
    renew(state.answer, h("p", { class: "notice bad", role: "alert" },
      "No answer came: it may have been done or not. Trying again repeats the same request, which is carried out once at most."));
    state.go.textContent = "Try again";
    state.go.disabled = false;
    return;
  }
  state.reason.disabled = state.until.disabled = false;
  if (!answer.ok) return refuse(state, answer);
  say(`Done: ${state.action.title(state.target.keyset, state.target.key)}.`);
  renew(state.answer, h("p", { class: "notice", id: "dialog-done" }, h("b", {}, "Done. ")), describe(state, answer.body, true));
  state.go.hidden = true;
  state.reason.disabled = state.until.disabled = true;
  state.cancel.textContent = "Close";
  state.cancel.focus();
  refresh();
}

/// Why not, and what would make it possible.
function refuse(state, answer) {
  if (answer.status === 401) return state.dialog.close();
  state.pending = null;
  state.go.disabled = true;
  const parts = [problemNotice(answer)];
  if (answer.slug === "generation-mismatch") {
    parts[0] = h("p", { class: "notice warn", role: "alert" }, h("b", {}, "Something has changed meanwhile. "),
      `${state.target.keyset} is not any more what was shown here, so nothing was done. Look at what would happen now, and decide anew.`);
    parts.push(h("button", { type: "button", id: "dialog-again", "data-focus": "again", onclick: () => lookAfresh(state) }, "Look again"));
  }
  if (answer.status === 0 || answer.status === 429 || answer.status >= 500) {
    parts.push(h("button", { type: "button", id: "dialog-again", "data-focus": "again", onclick: () => look(state) }, "Look again"));
  }
  if (answer.body && answer.body.next_standby_at) {
    parts.push(h("p", {}, "The next key is ready ", time(answer.body.next_standby_at, "in"), " (", time(answer.body.next_standby_at), ")."));
  }
  if (state.kind === "rotate" && ["no-standby", "algorithm-unconfirmed"].includes(answer.slug)) state.offer = answer.slug;
  renew(state.answer, ...parts, options(state));
  const again = $("dialog-again");
  if (again) again.focus();
}

async function lookAfresh(state) {
  const answer = await ask("GET", `/v1/keysets/${encodeURIComponent(state.target.keyset)}`);
  if (state.closed) return;
  if (!answer.ok) return refuse(state, answer);
  state.generation = answer.body.generation;
  state.reason.focus();
  refresh();
  look(state);
}

/// What an operator may insist on, once the daemon refused for the lack of it.
function options(state) {
  const choices = {
    "no-standby": ["allow_unpropagated", "Take a key that was not published for long enough: some verifiers may reject its tokens"],
    "algorithm-unconfirmed": ["confirm_algorithm", "All verifiers can read the new algorithm"],
  };
  if (!state.offer) return null;
  const [member, text] = choices[state.offer];
  const box = h("input", { type: "checkbox", id: "dialog-insist", "data-focus": "insist" });
  box.checked = Boolean(state.extra[member]);
  box.addEventListener("change", () => {
    state.extra = box.checked ? { [member]: true } : {};
    look(state);
  });
  return h("label", { class: "check" }, box, text);
}

/// The daemon's answer in words; holds have none of their own.
function describe(state, outcome, done) {
  if (state.kind === "hold") {
    return h("p", {}, done ? "Held " : "It will be held ", outcome.until ? ["until ", time(outcome.until)] : "until it is resumed", ".");
  }
  if (state.kind === "resume") return h("p", {}, done ? "The schedule goes on." : "The schedule will go on.");
  const items = outcome.changes.map((change) => h("li", {}, `#${change.serial} `, kidElement(change.kid), ` ${change.from || "new"} → ${change.to}`,
    change.unpublished_at ? [", published until ", time(change.unpublished_at)] : ""));
  const warnings = outcome.warnings.map((warning) => h("p", { class: "notice warn" }, warning));
  return [
    items.length ? h("ul", {}, ...items) : h("p", {}, "Nothing changes."),
    outcome.safe ? h("p", { class: "notice" }, "Safe: no verifier that caches as declared rejects a live token because of this.") : null,
    outcome.unpropagated ? h("p", { class: "notice warn" }, "The key that signs then was not published for long enough: some verifiers may not know it yet.") : null,
    ...exposure(outcome),
    ...warnings,
    verifiers(outcome.verifiers),
    outcome.next_standby_at && !done ? h("p", { class: "dim" }, "The next standby key is ready at ", time(outcome.next_standby_at), ".") : null,
  ].filter(Boolean);
}

function exposure(outcome) {
  const parts = [];
  if (outcome.exposure && outcome.exposure.until) {
    parts.push(h("p", { class: "notice warn" }, "Declared caches may accept the key until ", time(outcome.exposure.until), "."));
  }
  if (outcome.restart_verifiers.length) {
    parts.push(h("div", { class: "notice bad" }, h("b", {}, "Restart these verifiers: "), outcome.restart_verifiers.join(", "), ". They keep the key until then."));
  }
  if (outcome.exposure && outcome.unconfirmed_replicas === null) {
    parts.push(h("p", { class: "notice warn" }, "It is not known whether all replicas hear of it: look at jwksd replicas."));
  }
  if (outcome.unconfirmed_replicas && outcome.unconfirmed_replicas.length) {
    const replicas = outcome.unconfirmed_replicas.map((replica) => h("li", {}, `${replica.name}, seen `, time(replica.last_seen_at)));
    parts.push(h("div", { class: "notice bad" }, h("b", {}, "These replicas may not hear of it, and use the key on: "), h("ul", {}, ...replicas),
      "Take them out of the balancer, or stop them."));
  }
  return parts;
}

function verifiers(list) {
  if (!list.length) return null;
  const items = list.map((verifier) => h("li", {}, `${verifier.name}: `,
    verifier.sees_new_key_by ? ["sees the key by ", time(verifier.sees_new_key_by)] : "when it sees the key is not known",
    verifier.ok ? "" : h("b", {}, " — not yet")));
  return h("div", {}, h("h3", {}, "Verifiers"), h("ul", {}, ...items));
}

function freshKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return `page-${[...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("")}`;
}

