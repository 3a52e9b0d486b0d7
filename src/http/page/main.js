// The token, the requests and the round of refreshes.

const EVERY = 5000;
const AUDIT_KEPT = 100;

/// In memory and nowhere else.
let token = null;
let session = null;

/// Asks the API. An answer always comes back: `ok`, else `status`, `slug` and the problem; `lost` where none came.
async function ask(method, path, { body, generation, key } = {}) {
  const asked = session;
  const headers = { Accept: "application/json", Authorization: `Bearer ${token}` };
  if (body) headers["Content-Type"] = "application/json";
  if (generation !== undefined) headers["If-Match"] = `"${generation}"`;
  if (key) headers["Idempotency-Key"] = key;
  let response, text;
  try {
    response = await fetch(path, { method, headers, body: body && JSON.stringify(body), cache: "no-store", credentials: "omit", redirect: "error" });
    text = await response.text();
  } catch {
    return { ok: false, lost: true, status: 0, title: "No answer", detail: "The daemon cannot be reached." };
  }
  let value = null;
  try {
    value = text ? JSON.parse(text) : null;
  } catch {
    value = null;
  }
  if (response.ok) return { ok: true, status: response.status, body: value };
  const problem = value && typeof value === "object" ? value : {};
  const slug = String(problem.type || "").replace("urn:jwksd:problem:", "");
  const answer = { ok: false, status: response.status, slug, body: problem, title: problem.title || `Status ${response.status}`, detail: problem.detail || "" };
  if (response.status === 401 && asked && asked === session) {
    forget("The token is not valid any more: it was exchanged or removed. Paste the one that is valid now.");
  }
  return answer;
}

function problemNotice(answer) {
  const later = answer.body && answer.body.retry_after_seconds ? ` Try again in ${answer.body.retry_after_seconds} s.` : "";
  return h("p", { class: "notice bad", role: "alert" }, h("b", {}, `${answer.title}. `), answer.detail, later);
}

async function logIn(event) {
  event.preventDefault();
  const field = $("token");
  const given = field.value.trim();
  field.value = "";
  showLoginProblem("");
  if (!/^[\x21-\x7e]+$/.test(given)) return showLoginProblem("That is not a token: it is one line of letters, digits and signs.");
  token = given;
  const answer = await ask("GET", "/v1/whoami");
  if (!answer.ok) {
    token = null;
    const words = answer.status === 401 ? "The daemon does not know this token. Is it the whole one, and of this daemon?" : `${answer.title}. ${answer.detail}`;
    showLoginProblem(words);
    return field.focus();
  }
  session = { me: answer.body, audit: [], cursor: null };
  const may = mayChange(session.me) ? "" : session.me.role === "viewer" ? " (a viewer: sees everything, changes nothing)" : " (a signer changes nothing: ask a manager)";
  $("who").textContent = `${session.me.name}, ${session.me.role}${may}`;
  renew($("legend"), legend());
  $("login").hidden = true;
  $("overview").hidden = false;
  $("forget").hidden = false;
  say("Logged in.");
  refresh();
}

function showLoginProblem(text) {
  $("login-problem").textContent = text;
  $("login-problem").hidden = !text;
}

function forget(why) {
  token = session = null;
  cards.clear();
  if ($("dialog").open) $("dialog").close();
  for (const host of ["keysets", "replicas", "audit"]) $(host).replaceChildren();
  for (const line of ["who", "pulse", "trouble"]) $(line).textContent = "";
  $("filter").value = "";
  $("overview").hidden = $("forget").hidden = $("trouble").hidden = true;
  $("login").hidden = false;
  showLoginProblem(why || "");
  $("token").focus();
}

let timer = 0;
let refreshing = null;
let again = false;

/// Brings everything up to date, one round at a time, and comes back.
function refresh() {
  if (refreshing) {
    again = true;
    return;
  }
  clearTimeout(timer);
  const begun = performance.now();
  refreshing = round().finally(() => {
    refreshing = null;
    if (!session) return;
    // Large installations are not asked faster than they answer.
    const pause = again ? 0 : Math.max(EVERY, 10 * (performance.now() - begun));
    again = false;
    timer = setTimeout(() => (document.hidden ? undefined : refresh()), pause);
  });
}

async function round() {
  const mine = session;
  if (!mine) return;
  const [time, list] = await Promise.all([ask("GET", "/v1/clock"), ask("GET", "/v1/keysets")]);
  if (mine !== session) return;
  const failed = [time, list].find((answer) => !answer.ok);
  if (failed) return trouble(failed);
  setClock(time.body);
  mine.keysets = list.body.keysets;
  showKeysets(mine.keysets, mine.me);
  await showTimelines(mine.keysets);
  const [replicas] = await Promise.all([ask("GET", "/v1/replicas"), readAudit(mine)]);
  if (mine !== session) return;
  if (replicas.ok) showReplicas(replicas.body);
  else renew($("replicas"), problemNotice(replicas));
  $("trouble").hidden = true;
  $("pulse").className = "dim";
  $("pulse").textContent = `as of ${withSeconds.format(now())}${clock.frozen ? ", clock frozen" : ""}`;
}

function trouble(answer) {
  const words = answer.lost ? "The daemon does not answer. What is shown is old; it is tried again." : `${answer.title}. ${answer.detail} It is tried again.`;
  if ($("trouble").textContent !== words) $("trouble").textContent = words;
  $("trouble").hidden = false;
  $("pulse").className = "bad";
  $("pulse").textContent = "not up to date";
}

/// Goes on reading where the last round stopped, a few pages at a time.
async function readAudit(mine) {
  const span = mine.keysets.length > 50 ? 86400e3 : 120 * 86400e3;
  mine.cursor ||= new Date(now() - span).toISOString();
  let news = mine.audit.length === 0;
  for (let page = 0; page < 4; page++) {
    const answer = await ask("GET", `/v1/audit?after=${encodeURIComponent(mine.cursor)}`);
    if (mine !== session || !answer.ok) return;
    mine.cursor = answer.body.next || mine.cursor;
    if (!answer.body.items.length) break;
    mine.audit = [...mine.audit, ...answer.body.items].slice(-AUDIT_KEPT);
    news = true;
  }
  if (news) showAudit(mine.audit);
}

$("login-form").addEventListener("submit", logIn);
$("forget").addEventListener("click", () => forget());
$("filter").addEventListener("input", () => {
  if (!session || !session.keysets) return;
  showKeysets(session.keysets, session.me);
  refresh();
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && session) refresh();
});
let width = innerWidth;
addEventListener("resize", () => {
  if (width !== innerWidth) redraw();
  width = innerWidth;
});
setInterval(tickTimes, 1000);
$("token").focus();
