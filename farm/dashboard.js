// The dashboard: what /overview tells, every two seconds, and what an operator does about it.
// In this order: elements, times, calls, the filter, lists, the drawer of a user, dialogs, actions, refreshing.

// ---- Elements ----------------------------------------------------------------------------------------------

const $ = (id) => document.getElementById(id);
function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat());
  return element;
}
const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
const link = (text, click, title = null) => h("button", {class: "link", click, title}, text);

// Change only what differs, so that nothing that stays the same loses a selection.
const write = (element, text) => { if (element.textContent !== text) element.textContent = text; };
const show = (element, visible) => { element.hidden = !visible; };
const number = (value) => value.toLocaleString("en");
const plural = (count, one, many = `${one}s`) => `${number(count)} ${count === 1 ? one : many}`;
let saying;
function say(text) {
  clearTimeout(saying);
  write($("said"), text);
  if (text) saying = setTimeout(say, 8000, "");
}

// ---- Times: by the clock of the service, which its Date header tells -----------------------------------------

let ahead = 0;  // milliseconds by which it is ahead of the one here
const now = () => Date.now() + ahead;
function setClock(answer) {
  const differs = Date.parse(answer.headers.get("Date")) + 500 - now();  // the header knows whole seconds alone
  if (Math.abs(differs) > 1500) ahead += differs;
}

function clock(moment) {
  const date = new Date(moment), time = date.toLocaleTimeString("en-GB", {hour: "2-digit", minute: "2-digit"});
  if (Math.abs(date - now()) < 43200e3) return time;
  return `${date.toLocaleDateString("en-GB", {day: "numeric", month: "short"})} ${time}`;
}

function span(milliseconds) {
  const seconds = Math.max(0, Math.floor(milliseconds / 1000));
  const minutes = Math.floor(seconds / 60), hours = Math.floor(minutes / 60);
  const two = (part) => String(part).padStart(2, "0");
  if (minutes < 1) return `${seconds} s`;
  if (hours < 1) return `${minutes} min ${two(seconds % 60)} s`;
  return hours < 48 ? `${hours} h ${two(minutes % 60)} min` : `${Math.floor(hours / 24)} days`;
}
const between = (from, to) => span(new Date(to) - new Date(from));
const told = {left: (moment) => span(moment - now()), ago: (moment) => span(now() - moment), at: clock};
function timer(kind, moment) {
  const date = new Date(moment);
  return h("time", {datetime: moment, title: date.toLocaleString("en-GB"), "data-kind": kind}, told[kind](date));
}

setInterval(() => {
  for (const time of document.querySelectorAll("time")) write(time, told[time.dataset.kind](new Date(time.dateTime)));
}, 1000);

// ---- Calls -------------------------------------------------------------------------------------------------

let session = null;  // {token, until, scopes, id, secret}: in memory alone, gone with the page
const IMPLIED = {admin: ["users:read", "users:write", "locks"], "users:write": ["users:read"]};
const may = (scope) => session === null || session.scopes.has(scope);
const authorization = () => (session ? {Authorization: `Bearer ${session.token}`} : {});

// What was refused: an error with the words of the problem, and its members.
function problem(status, body) {
  const text = body.detail ?? body.error_description ?? `The service answered with ${status}.`;
  return Object.assign(new Error(text), {...body, status});
}
const problemOf = async (answer) => problem(answer.status, await answer.json().catch(() => ({})));
function address(path, query) {
  const given = Object.entries(query).filter(([, value]) => value);
  return given.length ? `${path}?${new URLSearchParams(given)}` : path;
}

async function call(method, path, {json, headers = {}, query = {}, patience = 20e3} = {}) {
  await renew();
  const sent = {...headers, ...authorization(), ...(json ? {"Content-Type": "application/json"} : {})};
  const options = {method, headers: sent, cache: "no-store", signal: AbortSignal.timeout(patience)};
  const answer = await fetch(address(path, query), {...options, body: json && JSON.stringify(json)});
  if (answer.status === 401) leave(session ? "The token does not count any more: sign in again." : "");
  if (!answer.ok && answer.status !== 304) throw await problemOf(answer);
  setClock(answer);
  return answer;
}
const read = async (path, query) => (await call("GET", path, {query})).json();
function begin(token, scope, seconds, id, secret) {
  const scopes = new Set(scope.split(" ").flatMap((each) => [each, ...(IMPLIED[each] ?? [])]));
  session = {token, scopes, id, secret, until: Date.now() + seconds * 1000};
}

async function grant(id, secret) {
  const body = new URLSearchParams({grant_type: "client_credentials", client_id: id, client_secret: secret});
  // Without credentials: a browser would ask for a password itself when the secret is wrong.
  const answer = await fetch("/token", {method: "POST", body, credentials: "omit"});
  if (!answer.ok) throw await problemOf(answer);
  const {access_token: token, scope, expires_in: seconds} = await answer.json();
  begin(token, scope, seconds, id, secret);
}

// Who came with a token has no secret to renew it by, and signs in again.
async function renew() {
  if (!session?.secret || session.until - Date.now() > 60e3) return;
  await grant(session.id, session.secret).catch((error) => {
    if (error.status === 401) leave(error.message);
    throw error;
  });
}

function enterToken(token) {
  try {
    const claims = JSON.parse(atob(token.split(".")[1].replaceAll("-", "+").replaceAll("_", "/")));
    begin(token, claims.scope, claims.exp - Date.now() / 1000);
  } catch {
    throw new Error("This is not a token of BotFarm: that has three parts with dots between them.");
  }
}

function leave(why) {
  session = found = etag = null;
  for (const dialog of document.querySelectorAll("dialog[open]")) dialog.close();
  for (const each of ["pools", "users", "lately"]) list($(each), [], String);
  write($("entry-fault"), why);
  face("entry");
}
$("leave").addEventListener("click", () => location.reload());
$("enter").addEventListener("submit", async (event) => {
  event.preventDefault();
  const {client_id: id, client_secret: secret, token} = event.target.elements;
  try {
    if (token.value) enterToken(token.value.trim());
    else await grant(id.value, secret.value);
    event.target.reset();
    write($("entry-fault"), "");
    await refresh();
  } catch (error) {
    write($("entry-fault"), error.message);
  }
});

// ---- The filter: it stands in the address ----------------------------------------------------------------------

const FILTERS = ["project_id", "env", "domain", "state", "holder", "login"];
const fields = $("filter").elements;
let filter = {}, typing;

// What can be chosen grows; what was chosen stays.
function choose(field, values) {
  const known = [...field.options].map((option) => option.value);
  for (const value of new Set(values)) if (!known.includes(value)) field.add(new Option(value, value));
}

function setFields(values) {
  for (const [name, value] of Object.entries(values)) {
    if (fields[name].tagName === "SELECT") choose(fields[name], [value]);
    fields[name].value = value;
  }
  filter = Object.fromEntries(FILTERS.map((name) => [name, fields[name].value]));
}

function writeAddress() {
  const kept = {...filter, state: filter.state === "locked" ? "" : filter.state, user: opened?.id};
  history.replaceState(null, "", address("/", kept));
}

function narrow(values = {}) {
  clearTimeout(typing);
  setFields(values);
  writeAddress();
  refresh(true);
}
$("filter").addEventListener("submit", (event) => event.preventDefault());
$("filter").addEventListener("reset", () => setTimeout(narrow));
$("filter").addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(narrow, 300); });
$("states").addEventListener("change", () => narrow());
const ofPool = (item) => (!filter.env || item.env === filter.env) && (!filter.domain || item.domain === filter.domain);
const ofHolder = (item) => (item.login ?? "").startsWith(filter.login) && [item.holder, ""].includes(filter.holder);

// ---- Lists: rows keep their place, their focus and their selection ----------------------------------------------

const rows = new WeakMap();  // list -> (name -> row)
function list(parent, items, nameOf, make) {
  const before = rows.get(parent) ?? new Map(), after = new Map(), focus = document.activeElement;
  // While somebody points at the list or is in it, what is there stays where it is.
  const isBusy = [focus, getSelection().focusNode].some((node) => parent.contains(node)) || parent.matches(":hover");
  for (const item of items) {
    const name = nameOf(item), row = before.get(name) ?? make(item);
    before.delete(name);
    after.set(name, row);
    row.update?.(item);
    row.element.classList.remove("gone");
  }
  for (const [name, row] of before) {
    const isUsed = row.element.contains(focus);
    row.element.classList.toggle("gone", isUsed);
    if (isUsed) after.set(name, row);
    else row.element.remove();
  }
  rows.set(parent, after);
  let place = parent.firstElementChild;
  for (const {element} of after.values()) {
    if (element === place) place = place.nextElementSibling;
    else if (!isBusy) parent.insertBefore(element, place);
    else if (!element.isConnected) parent.append(element);
  }
}
const short = (project) => h("span", {class: "id soft", title: `project ${project}`}, project.slice(0, 8));
const look = (state) => (state === "free" ? {class: state} : {fill: `url(#${state})`});
const square = (state) => svg("rect", {...look(state), width: 14, height: 14});
const sign = (state) => svg("svg", {class: "sign", "aria-hidden": "true"}, square(state));

// ---- Pools, the worst first --------------------------------------------------------------------------------------

const STATES = ["free", "locked", "resting", "quarantined"];
const POOLS = 30;
function worse(one, other) {
  const waits = (other.waiting > 0) - (one.waiting > 0), free = one.free / one.total - other.free / other.total;
  return waits || free || other.quarantined / other.total - one.quarantined / one.total;
}

function makePool({project_id, env, domain}) {
  const rects = STATES.map((state) => svg("rect", {...look(state), height: "100%"}));
  const bar = svg("svg", {class: "bar", role: "img"}, rects);
  const counts = STATES.map((state) => h("span", {}, sign(state), h("span")));
  const pick = link(h("b", {}, env), () => narrow({project_id, env, domain}), "Show this alone");
  pick.append(` · ${domain}`);
  const wait = h("p", {class: "wait"});
  let before = "";
  const update = (pool) => {
    let x = 0;
    STATES.forEach((state, place) => {
      const width = 100 * pool[state] / pool.total;
      fill(rects[place], {x: `${x}%`, width: `${width}%`}, []);
      x += width;
      write(counts[place].lastChild, `${number(pool[state])} ${state}`);
      counts[place].className = pool[state] ? "" : "soft";
    });
    bar.setAttribute("aria-label", STATES.map((state) => `${pool[state]} ${state}`).join(", "));
    const after = JSON.stringify([pool.waiting, pool.longest_wait_since, pool.next_free_at, pool.free]);
    if (after !== before) wait.replaceChildren(...waitOf(pool));
    before = after;
    wait.classList.toggle("bad", pool.waiting > 0);
  };
  const name = h("div", {}, pick, " ", short(project_id));
  return {element: h("li", {}, name, bar, h("div", {class: "shares"}, counts), wait), update};
}

function waitOf({waiting, longest_wait_since: since, next_free_at: next, free}) {
  const longest = since ? [", the longest for ", timer("ago", since), " (since ", timer("at", since), ")"] : [];
  const parts = waiting ? [plural(waiting, "call waits", "calls wait"), ...longest, ". "] : [];
  if (next) return [...parts, "The next comes free in ", timer("left", next), "."];
  return free ? parts : [...parts, "None comes free by itself."];
}

function showPools(pools) {
  const fitting = pools.filter(ofPool).sort(worse), shown = fitting.slice(0, POOLS);
  list($("pools"), shown, (pool) => `${pool.project_id} ${pool.env} ${pool.domain}`, makePool);
  const cut = `the ${POOLS} worst of ${number(fitting.length)}; filter to see others`;
  write($("pools-count"), fitting.length > POOLS ? cut : "the worst first");
  const sums = [...STATES, "waiting"].map((name) => [name, fitting.reduce((sum, pool) => sum + pool[name], 0)]);
  $("sums").replaceChildren(...sums.map(([name, sum], place) =>
    h("div", {class: sum && place > 2 ? "bad" : null}, h("dt", {}, name), h("dd", {}, number(sum)))));
  document.title = sums[4][1] ? `${sums[4][1]} waiting · BotFarm` : "BotFarm";
}

// ---- Users by their state: who holds whom ------------------------------------------------------------------------

// The locks that end first are there already; what goes beyond them is looked for by the service.
async function usersOf({locks}) {
  const {state, login, ...query} = filter, isCut = locks.items.length < locks.total;
  if (state === "locked" && (!isCut || !(filter.env || filter.domain || filter.holder || login))) {
    const items = locks.items.map(({user_id: id, ...lock}) => ({...lock, id, state}));
    const cut = `the ${items.length} of ${number(locks.total)} that end first; filter to find others`;
    return {items: items.filter((item) => ofPool(item) && ofHolder(item)), cut: isCut && cut};
  }
  const page = await read("/users", {...query, state, login_prefix: login, limit: 200});
  const cut = `the oldest ${page.items.length}; narrow the filter to find others`;
  return {items: page.items.map((user) => ({...user, ...user.lock})), cut: page.next && cut};
}

function makeUser({id, env, domain, project_id: project}) {
  const login = link("", () => open(id)), act = h("td"), who = h("td");
  const [since, left] = ["since", "ends in"].map((name) => h("td", {class: "time", "data-name": name}));
  const pool = h("td", {}, `${env} · ${domain} `, short(project));
  let before = "";
  const update = (user) => {
    const after = JSON.stringify(user), isHeld = user.state === "locked";
    if (after === before) return;
    before = after;
    write(login, user.login);
    const holder = isHeld && user.holder, end = isHeld ? user.expires_at : user.available_at;
    if (!holder) write(who, user.quarantine ?? (isHeld ? "(nobody told)" : ""));
    else if (who.textContent !== holder) who.replaceChildren(link(holder, () => narrow({holder}), "Show this alone"));
    since.replaceChildren(isHeld ? timer("at", user.acquired_at) : "");
    left.replaceChildren(end ? timer("left", end) : "");
    const release = h("button", {click: () => force(id), "aria-label": `Release ${user.login}`}, "Release");
    if (isHeld && may("admin") && !act.firstChild) act.append(release);
  };
  return {element: h("tr", {"data-id": id}, h("td", {}, login), pool, who, since, left, act), update};
}

function showUsers({items, cut}) {
  const {state, holder} = filter, holders = [...new Set(items.map((user) => user.holder ?? ""))].sort();
  list($("users"), items, (user) => user.id + user.state, makeUser);
  write($("users-count"), cut || number(items.length));
  write($("who"), {locked: "Holder", quarantined: "Reason"}[state] ?? "");
  write($("since"), state === "locked" ? "Since" : "");
  write($("left"), {locked: "Ends in", resting: "Free again in"}[state] ?? "");
  show($("none"), !items.length);
  write($("none"), `No user that fits is ${state}.`);
  if (!holder) $("holders").replaceChildren(...holders.map((value) => h("option", {value})));
  show($("release-all"), holder && state === "locked" && items.length && may("locks"));
  write($("release-all"), `Release all of ${holder}`);
}
$("release-all").addEventListener("click", () => releaseAll(filter.holder));

// ---- Lately ------------------------------------------------------------------------------------------------------

const nobody = "somebody who told no name";
const HOW = {released: ["given back", "by"], expired: ["ran out", "while held by"], forced: ["taken by force", "from"]};
function endOf({holder, acquired_at: from, ended_at: to, ended_by: how}) {
  const [what, by] = how ? HOW[how] : ["held", "by"];
  const length = h("span", {class: "soft"}, to ? ` after ${between(from, to)}` : " now");
  return [h("b", {}, what), ` ${by} ${holder || nobody}`, length];
}

function makeEnd(end) {
  const {user_id: id, login, ended_at: to, ended_by: how} = end;
  const who = login === null ? "(a user that is deleted)" : link(login, () => open(id));
  return {element: h("li", {class: how}, timer("at", to), h("div", {}, who, " ", endOf(end)))};
}

function showLately(ended) {
  list($("lately"), ended.filter(ofHolder), (end) => end.user_id + end.ended_at, makeEnd);
  show($("nothing"), !$("lately").children.length);
}

// ---- The drawer of a user ----------------------------------------------------------------------------------------

let opened = null;  // {id, update, from}

function open(id) {
  const [title, place, state, why] = ["title", "place", "state", "why"].map((name) => h("p", {class: name}));
  const [labels, chart, past] = [h("ul", {class: "labels"}), h("div"), h("ol", {class: "past"})];
  const none = h("p", {class: "soft"}), fault = h("p", {class: "fault", role: "alert"});
  let user = null, before = "";
  const actions = [
    ["Quarantine", "users:write", () => user.quarantine === null, () => quarantine(user)],
    ["Put back", "users:write", () => user.quarantine !== null, () => putBack(user)],
    ["Release by force", "admin", () => user.lock !== null, () => force(id)],
    ["Release all of this holder", "locks", () => user.lock?.holder, () => releaseAll(user.lock.holder)],
  ].map(([name, scope, fits, click]) =>
    ({button: h("button", {click, hidden: ""}, name), fits: () => may(scope) && fits()}));
  const update = async () => {
    const [fresh, locks] = await Promise.all([read(`/users/${id}`), read(`/users/${id}/history`, {limit: 500})]);
    const after = JSON.stringify([fresh, locks]);
    if (after === before || opened?.id !== id) return;
    [before, user] = [after, fresh];
    write(title, user.login);
    place.replaceChildren(`${user.env} · ${user.domain} · project `, h("span", {class: "id"}, user.project_id));
    state.replaceChildren(sign(user.state), user.state);
    why.replaceChildren(...reasonOf(user));
    for (const {button, fits} of actions) show(button, fits());
    if (document.activeElement?.hidden) close.focus();
    labels.replaceChildren(...Object.entries(user.labels).map(([name, value]) => h("li", {}, `${name}: ${value}`)));
    chart.replaceChildren(...chartOf(locks));
    list(past, locks.items.slice(0, 20), (lock) => lock.fence + (lock.ended_by ?? ""), (lock) =>
      ({element: h("li", {}, timer("at", lock.acquired_at), " ", endOf(lock))}));
    write(none, locks.items.length ? "" : "It was never locked.");
  };
  title.id = "drawer-title";
  const close = h("button", {click: () => $("drawer").close()}, "Close");
  $("drawer").replaceChildren(h("div", {class: "top"}, title, close), place, fault, state, why,
    h("div", {class: "buttons"}, actions.map(({button}) => button)), labels,
    h("h3", {}, "Use in the last 24 hours"), chart, h("h3", {}, "The last 20 locks"), past, none);
  opened = {id, update, from: opened?.from ?? document.activeElement};
  update().catch((error) => write(fault, error.message));
  writeAddress();
  if (!$("drawer").open) $("drawer").show();
}
$("drawer").addEventListener("close", () => { opened?.from.focus(); opened = null; writeAddress(); });
addEventListener("keydown", (event) => { if (event.key === "Escape" && !$("ask").open) $("drawer").close(); });
function reasonOf({state, lock, quarantine: reason, available_at: rested}) {
  const again = (moment) => ["free again at ", timer("at", moment), ", in ", timer("left", moment), "."];
  if (state === "locked") {
    const then = reason === null ? again(lock.expires_at) : [`then quarantined: ${reason}`];
    return [`Held by ${lock.holder || nobody} since `, timer("at", lock.acquired_at), "; ", ...then];
  }
  if (state === "resting") return ["It was given back with a rest; ", ...again(rested)];
  return [state === "free" ? "The next test that fits may get it." : `${reason}. Nobody gets it until it is put back.`];
}

// A bar an hour, as high as the share of it in which the user was locked.
function chartOf({items, next: more}) {
  const hour = 3600e3, end = now(), start = end - 24 * hour;
  const shares = Array.from({length: 24}, (_, place) => {
    const from = start + place * hour, to = from + hour;
    const used = items.map(({acquired_at: began, ended_at: ended}) =>
      Math.min(to, ended ? new Date(ended) : end) - Math.max(from, new Date(began)));
    return used.reduce((sum, part) => sum + Math.max(0, part), 0) / hour;
  });
  const used = Math.round(100 * shares.reduce((sum, part) => sum + part, 0) / 24);
  const text = `In use ${used} % of the time${more ? ", by its last 500 locks" : ""}`;
  const bars = shares.map((part, place) => {
    const rect = {class: "locked", x: place * 10 + 1, y: 60 - 56 * part, width: 8, height: 56 * part};
    return svg("rect", rect, svg("title", {}, `from ${clock(start + place * hour)}: ${Math.round(100 * part)} %`));
  });
  const drawing = {class: "chart", viewBox: "0 0 240 60", preserveAspectRatio: "none", role: "img", "aria-label": text};
  const ends = [clock(start), text, "now"].map((part) => h("span", {}, part));
  return [svg("svg", drawing, bars), h("p", {class: "ends soft"}, ends)];
}

// ---- Dialogs: each names the user, its holder, and what will happen ------------------------------------------------

function makeField({name, label, tag = "input", value = "", ...attributes}) {
  const fault = h("span", {class: "small", id: `fault-${name}`});
  const input = h(tag, {name, "aria-describedby": fault.id, ...attributes});
  if (value) input.value = value;
  return {name, input, fault, label: h("label", {}, label, input, fault)};
}

function ask({title, text = [], inputs = [], action, danger = false, run}) {
  const fault = h("div", {class: "fault", role: "alert"}), made = inputs.map(makeField);
  const main = h("button", {class: danger ? "danger" : "main"}, action);
  const submit = async (event) => {
    event.preventDefault();
    main.disabled = true;
    fault.replaceChildren();
    for (const field of made) field.input.removeAttribute("aria-invalid"), write(field.fault, "");
    try {
      const values = made.map(({name, input}) => [name, input.files?.[0] ?? input.value]);
      const done = await run(Object.fromEntries(values), form);
      $("ask").close();
      say(done);
      refresh(true);
    } catch (error) {
      refuse(error, made, fault);
    }
    main.disabled = false;
  };
  const cancel = h("button", {type: "button", click: () => $("ask").close()}, "Cancel");
  const form = h("form", {submit, novalidate: ""}, h("h2", {id: "ask-title"}, title), h("p", {}, text),
    made.map(({label}) => label), fault, h("div", {class: "buttons"}, main, cancel));
  $("ask").replaceChildren(form);
  $("ask").showModal();
}

// What was refused, in the words of the problem, beside the field where it names one.
function refuse(error, made, box) {
  const isTaken = error.type === "urn:botfarm:login-taken";
  const errors = isTaken ? [{field: "login", message: error.message}] : error.errors ?? [];
  const lines = errors.filter(({line}) => line !== undefined);
  let placed = 0;
  for (const {field, message} of errors) {
    const place = made.find(({name}) => !lines.length && name === field?.split(".")[0]);
    if (!place) continue;
    place.input.setAttribute("aria-invalid", "true");
    write(place.fault, message);
    if ((placed += 1) === 1) place.input.focus();
  }
  const told = lines.map(({line, field, message}) => h("li", {}, `line ${line}, ${field ?? "all of it"}: ${message}`));
  if (lines.length) box.append(h("p", {}, "Nothing was stored:"), h("ol", {tabindex: 0, "aria-label": "Faults"}, told));
  else if (placed < errors.length || !errors.length) box.append(h("p", {}, error.message));
}

// ---- Actions -----------------------------------------------------------------------------------------------------

const named = (user) => [h("b", {}, user.login), ` (${user.env} · ${user.domain})`];
function holding({lock}) {
  if (!lock) return [" Nobody holds it."];
  return [" It is held by ", h("b", {}, lock.holder || nobody), " since ", timer("at", lock.acquired_at), "."];
}

const trying = (run) => (given) => run(given).catch((error) => say(error.message));  // before there is a dialog

function quarantine(user) {
  const then = user.lock ? " That lock runs on." : "";
  const text = [...named(user), " is not handed out any more until somebody puts it back.", ...holding(user), then];
  ask({title: `Quarantine ${user.login}`, action: "Quarantine", danger: true, text,
    inputs: [{name: "reason", label: "Reason", maxlength: 500}],
    async run(json) {
      await call("POST", `/users/${user.id}/quarantine`, {json});
      return `${user.login} is quarantined.`;
    }});
}

function putBack(user) {
  const text = [...named(user), ` was taken out: “${user.quarantine}”. It comes back.`, ...holding(user)];
  ask({title: `Put ${user.login} back`, action: "Put back", text, async run() {
    await call("DELETE", `/users/${user.id}/quarantine`);
    return `${user.login} is back.`;
  }});
}

const force = trying(async (id) => {
  const user = await read(`/users/${id}`), {login} = user;
  if (!user.lock) throw new Error(`Nobody holds ${login} any more.`);
  const risk = " If that test still runs, it goes on with a user that another may get.";
  const text = [...named(user), " comes free at once.", ...holding(user), risk];
  ask({title: `Release ${login} by force`, action: "Release by force", danger: true, text, async run() {
    const {lock} = await read(`/users/${id}`);  // another may have done it meanwhile: no other lock is meant
    const who = lock ? lock.holder || nobody : "nobody";
    if (lock?.fence !== user.lock.fence) throw new Error(`That lock has ended: ${login} is held by ${who} now.`);
    await call("DELETE", `/users/${id}/lock`);
    return `${login} was released by force.`;
  }});
});

const releaseAll = trying(async (holder) => {
  const query = {holder, project_id: filter.project_id};
  const {items, next: more} = await read("/users", {...query, state: "locked", limit: 1000});
  const logins = items.slice(0, 5).map(({login}) => login).join(", "), rest = items.length > 5 ? ", …" : "";
  const count = more ? "over 1,000 users" : plural(items.length, "user");
  const others = may("admin") ? "" : " Locks of other clients stay.";
  const text = [h("b", {}, holder), ` holds ${count}: ${logins}${rest}. All come free at once.${others}`];
  ask({title: `Release all of ${holder}`, action: "Release all", danger: true, text, async run() {
    const {released} = await (await call("DELETE", "/locks", {query})).json();
    return `${plural(released, "lock")} of ${holder} released.`;
  }});
});

$("add").addEventListener("click", () => {
  const {project_id, env} = found.pools[0] ?? {};
  const inputs = [
    {name: "login", label: "Login", maxlength: 254, autocomplete: "off", spellcheck: "false"},
    {name: "password", label: "Password", type: "password", autocomplete: "new-password"},
    {name: "project_id", label: "Project (UUID)", value: filter.project_id || project_id, spellcheck: "false"},
    {name: "env", label: "Env", value: filter.env || env},
    {name: "domain", label: "Domain", value: filter.domain || "regular"},
    {name: "labels", label: "Labels, one a line: key=value", tag: "textarea", rows: 2},
  ];
  ask({title: "Add a user", action: "Add", inputs, async run({labels, ...user}) {
    const pairs = labels.split("\n").filter((line) => line.trim()).map((line) => line.split(/=(.*)/s).slice(0, 2));
    const json = {...user, labels: Object.fromEntries(pairs.map(([name, value = ""]) => [name.trim(), value.trim()]))};
    await call("POST", "/users", {json});
    return `${user.login} was added.`;
  }});
});

// By XMLHttpRequest: fetch tells no progress.
async function upload(file, bar) {
  await renew();
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", "/users/import");
    const type = /\.csv$/i.test(file.name) ? "text/csv" : "application/x-ndjson";
    const headers = Object.entries({"Content-Type": type, ...authorization()});
    for (const [name, value] of headers) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => { bar.value = event.loaded / event.total; };
    request.upload.onload = () => bar.removeAttribute("value");  // all is sent, and the service is at it
    request.onerror = () => reject(new Error("No answer: whether the file was imported is not known."));
    request.onload = () => {
      const body = JSON.parse(request.responseText || "{}");
      if (request.status === 200) resolve(body);
      else reject(problem(request.status, body));
    };
    request.send(file);
  });
}

$("import").addEventListener("click", () => {
  const text = "Lines of JSON (NDJSON) or CSV, all or nothing. A user that is known is changed, and keeps its lock.";
  const inputs = [{name: "file", label: "File", type: "file", accept: ".ndjson,.jsonl,.json,.csv"}];
  ask({title: "Import users", action: "Import", text: [text], inputs, async run({file}, form) {
    if (!file) throw new Error("Choose a file.");
    const bar = h("progress", {max: 1, value: 0, "aria-label": "Sent"});
    form.querySelector(".buttons").before(bar);
    const {created, updated, unchanged} = await upload(file, bar).finally(() => bar.remove());
    return `${plural(created, "user")} added, ${number(updated)} changed, ${number(unchanged)} as they were.`;
  }});
});

$("export").addEventListener("click", () => {
  setFields({});
  const text = ["All users that fit the filter, in any state, without passwords, as lines of JSON: a file to import."];
  ask({title: "Export users", action: "Export", text, async run() {
    const {state, login, ...query} = filter;
    const answer = await call("GET", "/users/export", {query: {...query, login_prefix: login}, patience: 3600e3});
    const file = h("a", {href: URL.createObjectURL(await answer.blob()), download: "users.ndjson"});
    file.click();
    setTimeout(() => URL.revokeObjectURL(file.href), 60e3);
    return "users.ndjson is saved.";
  }});
});

// ---- Refreshing: every 2 s, 10 s when nothing changes, and not in a hidden tab --------------------------------------

let found = null, etag = null;  // the overview that is shown
let turns = 0, next, quiet = 0, failures = 0, answered = null;
function face(name) {
  for (const each of ["entry", "empty", "farm"]) show($(each), each === name);
  const buttons = document.querySelectorAll("[data-needs]");
  for (const button of buttons) show(button, name !== "entry" && may(button.dataset.needs));
  show($("leave"), session !== null);
  if (name === "entry") $("sums").textContent = $("pulse").textContent = "";
}

function draw({pools, ended}, users) {
  face(pools.length || filter.project_id ? "farm" : "empty");
  for (const name of ["project_id", "env", "domain"]) choose(fields[name], pools.map((pool) => pool[name]).sort());
  showPools(pools);
  showUsers(users);
  showLately(ended);
}

function lose(error) {
  const text = `no answer since ${clock(answered ?? now())}`;
  write($("pulse"), error.status ? `${text}: ${error.message}` : text);
  $("pulse").classList.add("gone");
  if ((failures += 1) === 1) say(`The service gives ${text}.`);
}

function live() {
  if (failures) say("The service answers again.");
  [failures, answered] = [0, now()];
  write($("pulse"), `as of ${new Date(answered).toLocaleTimeString("en-GB")}`);
  $("pulse").classList.remove("gone");
}

async function update(turn) {
  const headers = etag ? {"If-None-Match": etag} : {};
  const answer = await call("GET", "/overview", {query: {project_id: filter.project_id}, headers});
  const isNew = answer.status !== 304, overview = isNew ? await answer.json() : found;
  const users = isNew ? await usersOf(overview) : null;
  if (turn !== turns) return;
  [found, etag, quiet] = [overview, answer.headers.get("ETag"), isNew ? 0 : quiet + 1];
  write($("filter-fault"), "");
  if (isNew) draw(overview, users), opened?.update().catch(() => {});
  live();
}

async function refresh(anew = false) {
  clearTimeout(next);
  if (document.hidden) return;
  const turn = (turns += 1);
  if (anew) etag = null;
  try {
    await update(turn);
  } catch (error) {
    if (turn !== turns || error.status === 401) return;
    if (error.status === 403 && session && !filter.project_id) return leave(error.message);
    if (error.status < 500) face("farm"), write($("filter-fault"), error.message);
    else lose(error);
  }
  const pause = failures ? Math.min(30e3, 1000 * 2 ** failures) : quiet > 3 ? 10e3 : 2e3;
  if (turn === turns) next = setTimeout(refresh, pause);
}
document.addEventListener("visibilitychange", () => refresh());
addEventListener("online", () => refresh());

const pool = {project_id: "22222222-2222-4222-8222-222222222222", env: "stage"};
const [ada, lock] = [{login: "ada", password: "correct horse", ...pool}, {...pool, holder: "me"}].map(JSON.stringify);
const line = (path, body) => `curl ${location.origin}${path} -H 'Content-Type: application/json' -d '${body}'`;
write($("first"), `${line("/users", ada)}\n${line("/locks", lock)}`);

const given = new URLSearchParams(location.search);
setFields(Object.fromEntries(FILTERS.filter((name) => given.get(name)).map((name) => [name, given.get(name)])));
await refresh();
if (given.get("user") && found) open(given.get("user"));
