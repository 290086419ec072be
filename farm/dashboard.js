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
const unread = () => { throw new Error("No answer, or not all of it: try again."); };
const lost = () => { throw new Error("No answer: whether this was done is not known."); };
async function call(method, path, {json, headers = {}, query = {}, patience = 20e3} = {}) {
  await renew();
  const sent = {...headers, ...authorization(), ...(json ? {"Content-Type": "application/json"} : {})};
  const body = JSON.stringify(json), signal = AbortSignal.timeout(patience);
  const options = {method, headers: sent, body, cache: "no-store", signal};
  const answer = await fetch(address(path, query), options).catch(method === "GET" ? unread : lost);
  if (answer.status === 401) leave(session && "The token does not count any more: sign in again.");
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
  const options = {method: "POST", body, credentials: "omit", signal: AbortSignal.timeout(20e3)};
  const answer = await fetch("/token", options).catch(unread);
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
  turns += 1;  // what is on its way is not shown any more
  for (const dialog of document.querySelectorAll("dialog[open]")) dialog.close();
  for (const each of ["pools", "users", "lately"]) rows.delete($(each)), $(each).replaceChildren();
  if (why) write($("entry-fault"), why);
  face("entry");
}
$("leave").addEventListener("click", () => location.reload());

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
    const told = JSON.stringify(item);
    if (row.told !== told) row.update?.(item);
    row.told = told;
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

// What marks the shares of a bar beside their colours: stripes, dots, a lattice.
const MARKS = {locked: "M0 0h2v6h-2z", resting: "M2 2h2v2h-2z", quarantined: "M0 0h6v1.5h-4.5v4.5h-1.5z"};
const tile = {width: 6, height: 6};
$("patterns").append(...Object.entries(MARKS).map(([id, d]) =>
  svg("pattern", {id, ...tile, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)"},
    svg("rect", {class: id, ...tile}), svg("path", {class: "mark", d}))));

// ---- Pools, the worst first --------------------------------------------------------------------------------------
const STATES = ["free", "locked", "resting", "quarantined"];
const POOLS = 30;
function worse(one, other) {
  const [fails, waits] = ["failing", "waiting"].map((name) => (other[name] > 0) - (one[name] > 0));
  const free = one.free / one.total - other.free / other.total;
  return fails || waits || free || other.quarantined / other.total - one.quarantined / one.total;
}

function makePool({project_id, env, domain}) {
  const rects = STATES.map((state) => svg("rect", {...look(state), height: "100%"}));
  const bar = svg("svg", {class: "bar", role: "img"}, rects);
  const counts = STATES.map((state) => h("span", {}, sign(state), h("span")));
  const pick = link(h("b", {}, env), () => narrow({project_id, env, domain}), "Show this alone");
  pick.append(` · ${domain}`);
  const wait = h("p", {class: "wait"});
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
    wait.replaceChildren(...waitOf(pool));
    wait.classList.toggle("bad", pool.waiting + pool.failing > 0);
  };
  const name = h("div", {}, pick, " ", short(project_id));
  return {element: h("li", {}, name, bar, h("div", {class: "shares"}, counts), wait), update};
}

function waitOf({failing, waiting, longest_wait_since: since, next_free_at: next, free}) {
  const longest = since ? [", the longest for ", timer("ago", since), " (since ", timer("at", since), ")"] : [];
  const fails = failing ? [plural(failing, "account fails", "accounts fail"), ": the last login did not work. "] : [];
  const waits = waiting ? [plural(waiting, "call waits", "calls wait"), ...longest, ". "] : [];
  const parts = [...fails, ...waits];
  if (next) return [...parts, "The next comes free in ", timer("left", next), "."];
  return free ? parts : [...parts, "None comes free by itself."];
}

function showPools(pools) {
  const fitting = pools.filter(ofPool).sort(worse), shown = fitting.slice(0, POOLS);
  list($("pools"), shown, (pool) => `${pool.project_id} ${pool.env} ${pool.domain}`, makePool);
  const cut = `the ${POOLS} worst of ${number(fitting.length)}; filter to see others`;
  write($("pools-count"), fitting.length > POOLS ? cut : "the worst first");
  const sums = [...STATES, "failing", "waiting"].map((name) =>
    [name, fitting.reduce((sum, pool) => sum + pool[name], 0)]);
  $("sums").replaceChildren(...sums.map(([name, sum], place) =>
    h("div", {class: sum && place > 2 ? "bad" : null}, h("dt", {}, name), h("dd", {}, number(sum)))));
  const [, waiting] = sums.at(-1);
  document.title = waiting ? `${waiting} waiting · BotFarm` : "BotFarm";
}

// ---- Users by their state: who holds whom ------------------------------------------------------------------------
// Accounts that fail come first, as far as the latest ends and the reason of a quarantine tell.
async function usersOf({locks, ended}) {
  const {items, cut} = await someOf(locks), last = new Map();
  for (const {user_id: id, outcome} of ended) if (outcome && !last.has(id)) last.set(id, outcome);
  const fails = ({id, quarantine: why}) => last.get(id) === "bad-login" || /^\d+ locks ended in bad-login/.test(why);
  const marked = items.map((user) => ({...user, fails: fails(user)}));
  return {items: marked.sort((one, other) => other.fails - one.fails), cut};
}

// The locks that end first are there already; what goes beyond them is looked for by the service.
async function someOf(locks) {
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
  const pool = h("td", {}, `${env} · ${domain} `, short(project)), fault = h("div", {class: "small"});
  const update = (user) => {
    const {state, holder, note = ""} = user, isHeld = state === "locked";
    const end = isHeld ? user.expires_at : user.available_at;
    write(login, user.login);
    write(fault, user.fails ? WENT["bad-login"] : "");
    const whom = holder || (user.quarantine ?? (isHeld ? "(nobody told)" : ""));
    const shown = holder ? link(holder, () => narrow({holder}), "Show this alone") : whom;
    if (who.textContent !== whom + note) who.replaceChildren(shown, h("div", {class: "soft"}, noted(note)));
    since.replaceChildren(isHeld ? timer("at", user.acquired_at) : "");
    left.replaceChildren(end ? timer("left", end) : "");
    const release = h("button", {click: () => force(id), "aria-label": `Release ${user.login}`}, "Release");
    if (isHeld && may("admin") && !act.firstChild) act.append(release);
  };
  return {element: h("tr", {"data-id": id}, h("td", {}, login, fault), pool, who, since, left, act), update};
}

const HEADS = {locked: ["Holder", "Since", "Ends in"], quarantined: ["Reason"], resting: ["", "", "Free again in"]};
function showUsers({items, cut}) {
  const {state, holder} = filter;
  list($("users"), items, (user) => user.id + user.state + user.domain, makeUser);
  write($("users-count"), cut || number(items.length));
  ["who", "since", "left"].forEach((name, place) => write($(name), HEADS[state]?.[place] ?? ""));
  show($("none"), !items.length);
  write($("none"), `No user that fits is ${state}.`);
  show($("release-all"), holder && state === "locked" && items.length && may("locks"));
  write($("release-all"), `Release all of ${holder}`);
}
$("release-all").addEventListener("click", () => releaseAll(filter.holder));

// ---- Lately ------------------------------------------------------------------------------------------------------
const nobody = "somebody who told no name";
const HOW = {released: ["given back", "by"], expired: ["ran out", "while held by"], forced: ["taken by force", "from"]};
const WENT = {passed: "passed", failed: "failed", "bad-login": "the login did not work"};
// Of a note only what is plainly an address becomes a link.
const noted = (note) => note.split(/(https?:\/\/\S*[^\s.,;:!?)])/i).map((part, place) =>
  place % 2 ? h("a", {href: part, target: "_blank", rel: "noreferrer"}, part) : part);
function endOf({holder, acquired_at: from, ended_at: to, ended_by: how, outcome, note = ""}) {
  const [what, by] = how ? HOW[how] : ["held", "by"];
  const went = outcome ? [": ", h("b", {class: outcome}, WENT[outcome])] : [];
  const length = h("span", {class: "soft"}, to ? ` after ${between(from, to)}` : " now");
  const why = note ? h("div", {class: "soft"}, noted(note)) : "";
  return [h("b", {}, what), ` ${by} `, h("bdi", {}, holder || nobody), ...went, length, why];
}

function makeEnd(end) {
  const {user_id: id, login, ended_at: to, ended_by: how} = end;
  const who = login === null ? "(a user that is deleted)" : link(login, () => open(id));
  return {element: h("li", {class: how}, timer("at", to), h("div", {}, who, " ", endOf(end)))};
}

// ---- The drawer of a user ----------------------------------------------------------------------------------------
let opened = null;  // {id, update, from}

function open(id) {
  const [title, place, state, why, more] =
    ["title", "place", "state", "why", "more soft"].map((name) => h("p", {class: name}));
  const [labels, chart, past] = [h("ul", {class: "labels"}), h("div"), h("ol", {class: "past", "data-none": "Never."})];
  const fault = h("p", {class: "fault", role: "alert"});
  let user = null, before = "", asked = 0;
  const actions = [
    ["Quarantine", "users:write", () => user.quarantine === null, () => quarantine(user)],
    ["Put back", "users:write", () => user.quarantine !== null, () => putBack(user)],
    ["Hold", "locks", () => user.state === "free", () => hold(user)],
    ["End the hold", "locks", () => HOLD.test(user.lock?.holder), () => releaseAll(user.lock.holder)],
    ["Release by force", "admin", () => user.lock !== null, () => force(id)],
  ].map(([name, scope, fits, click]) =>
    ({button: h("button", {click, hidden: ""}, name), fits: () => may(scope) && fits()}));
  const showUser = async (turn) => {
    const [fresh, locks] = await Promise.all([read(`/users/${id}`), read(`/users/${id}/history`, {limit: 500})]);
    const after = JSON.stringify([fresh, locks]), focus = document.activeElement;
    if (turn !== asked || opened?.id !== id) return;
    chart.replaceChildren(...chartOf(locks));  // the time goes on where nothing else does
    if (after === before) return;
    [before, user] = [after, fresh];
    write(title, user.login);
    place.replaceChildren(`${user.env} · ${user.domain} · project `, h("span", {class: "id"}, user.project_id));
    state.replaceChildren(sign(user.state), user.state);
    why.replaceChildren(...reasonOf(user));
    const session = user.has_session ? "a live session" : "no session";
    write(more, `It has ${session} and ${user.has_totp ? "gives" : "no"} one-time codes.`);
    for (const {button, fits} of actions) show(button, fits());
    if (focus?.hidden) close.focus();
    labels.replaceChildren(...Object.entries(user.labels).map(([name, value]) => h("li", {}, `${name}: ${value}`)));
    list(past, locks.items.slice(0, 20), JSON.stringify, (lock) =>
      ({element: h("li", {}, timer("at", lock.acquired_at), " ", endOf(lock))}));
  };
  title.id = "drawer-title";
  const close = h("button", {click: () => $("drawer").close()}, "Close");
  $("drawer").replaceChildren(h("div", {class: "top"}, title, close), place, fault, state, why, more,
    h("div", {class: "buttons"}, actions.map(({button}) => button)), labels,
    h("h3", {}, "Use in the last 24 hours"), chart, h("h3", {}, "The last 20 locks"), past);
  const update = (turn = (asked += 1)) =>
    showUser(turn).then(() => write(fault, ""), (error) => turn === asked && write(fault, error.message));
  opened = {id, update, from: opened?.from ?? document.activeElement};
  update();
  writeAddress();
  if (!$("drawer").open) $("drawer").show();
}
$("drawer").addEventListener("close", () => { opened?.from.focus(); opened = null; writeAddress(); });
addEventListener("keydown", (event) => { if (event.key === "Escape" && !$("ask").open) $("drawer").close(); });
function reasonOf({state, lock, quarantine: reason, available_at: rested}) {
  const again = (moment) => ["free again at ", timer("at", moment), ", in ", timer("left", moment), "."];
  if (state === "locked") {
    const then = reason === null ? again(lock.expires_at) : [`then quarantined: ${reason}`];
    const who = h("bdi", {}, lock.holder || nobody), note = lock.note ? h("div", {}, "Note: ", noted(lock.note)) : "";
    return ["Held by ", who, " since ", timer("at", lock.acquired_at), "; ", ...then, note];
  }
  if (state === "resting") return ["It was given back with a rest; ", ...again(rested)];
  if (state === "free") return ["The next test that fits may get it."];
  return [h("bdi", {}, reason), ". Nobody gets it until it is put back."];
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
function makeField({name, label, tag = "input", ...attributes}) {
  const fault = h("span", {class: "small", id: `fault-${name}`});
  const input = h(tag, {name, "aria-describedby": fault.id, ...attributes});
  return {name, input, fault, label: h("label", {}, label, input, fault)};
}

function makeForm({head = [], fault, inputs = [], action, danger = false, cancel = [], run, then}) {
  const made = inputs.map(makeField), main = h("button", {class: danger ? "danger" : "main"}, action);
  const submit = async (event) => {
    event.preventDefault();
    main.disabled = true;
    fault.replaceChildren();
    for (const field of made) field.input.removeAttribute("aria-invalid"), write(field.fault, "");
    try {
      const values = made.map(({name, input}) => [name, input.files?.[0] ?? input.value]);
      const told = await run(Object.fromEntries(values), event.target);
      event.target.reset();  // no password stays
      then(told, event.target);
    } catch (error) {
      if (event.target.checkVisibility()) refuse(error, made, fault);
      else say(error.message);  // its dialog was closed meanwhile
    }
    main.disabled = false;
  };
  const buttons = h("div", {class: "buttons"}, main, cancel);
  return h("form", {submit, novalidate: ""}, head, made.map(({label}) => label), fault, buttons);
}

function ask({title, text = [], done, ...form}) {
  const head = [h("h2", {id: "ask-title"}, title), h("p", {}, text)], fault = h("div", {class: "fault", role: "alert"});
  const cancel = h("button", {type: "button", click: () => $("ask").close()}, "Cancel");
  const then = (told, own) => { if (own.checkVisibility()) $("ask").close(); say(done ?? told); refresh(true); };
  if ($("ask").open) return;  // a look came late: nobody is interrupted who was asked something else meanwhile
  $("ask").replaceChildren(makeForm({...form, head, fault, cancel, then}));
  $("ask").showModal();
}

// What was refused, in the words of the problem, beside the field where it names one.
function refuse(error, made, box) {
  const isTaken = error.type === "urn:botfarm:login-taken";
  const errors = isTaken ? [{field: "login", message: error.message}] : error.errors ?? [];
  const lines = errors.filter(({line}) => line !== undefined);
  const placeOf = ({field, line}) => made.find(({name}) => line === undefined && name === field?.split(".")[0]);
  for (const wrong of errors.filter(placeOf)) {
    placeOf(wrong).input.setAttribute("aria-invalid", "true");
    write(placeOf(wrong).fault, wrong.message);
  }
  made.find(({fault}) => fault.textContent)?.input.focus();
  const told = lines.map(({line, field, message}) => h("li", {}, `line ${line}, ${field ?? "all of it"}: ${message}`));
  if (lines.length) box.append(h("p", {}, "Nothing was stored:"), h("ol", {tabindex: 0, "aria-label": "Faults"}, told));
  else if (!errors.length || !errors.every(placeOf)) box.append(h("p", {}, error.message));
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
    inputs: [{name: "reason", label: "Reason", maxlength: 500}], done: `${user.login} is quarantined.`,
    run: (json) => call("POST", `/users/${user.id}/quarantine`, {json})});
}

function putBack(user) {
  const why = h("bdi", {}, user.quarantine), then = ["”. It comes back.", ...holding(user)];
  ask({title: `Put ${user.login} back`, action: "Put back", text: [...named(user), " was taken out: “", why, ...then],
    done: `${user.login} is back.`, run: () => call("DELETE", `/users/${user.id}/quarantine`)});
}

// The page knows no lock id: so a hold has a holder that no other lock has, and is ended by it.
const HOLD = /\(hold [0-9a-f]{8}\)$/;
function hold(user) {
  const until = " is kept for you until the time is over, or you end the hold. This page does not tell its password.";
  ask({title: `Hold ${user.login}`, action: "Hold", text: [...named(user), until], inputs: [
    {name: "holder", label: "Your name", maxlength: 180, autocomplete: "name"},
    {name: "ttl", label: "Minutes", type: "number", min: 1, value: 30},
    {name: "note", label: "Note: why, or a link to the run", maxlength: 500, autocomplete: "off"},
  ], done: `${user.login} is held.`, async run({holder, ttl, note}) {
    const json = {holder: `${holder} (hold ${user.id.slice(-8)})`.trim(), ttl: ttl * 60, note};
    // Its body is left unread: the password and the lock id stand there.
    await (await call("PUT", `/users/${user.id}/lock`, {json})).body.cancel();
  }});
}

const force = trying(async (id) => {
  const user = await read(`/users/${id}`), {login} = user;
  if (!user.lock) throw new Error(`Nobody holds ${login} any more.`);
  const risk = " If that test still runs, it goes on with a user that another may get.";
  const text = [...named(user), " comes free at once.", ...holding(user), risk];
  const done = `${login} was released by force.`;
  ask({title: `Release ${login} by force`, action: "Release by force", danger: true, text, done, async run() {
    const {lock} = await read(`/users/${id}`);  // another may have done it meanwhile: no other lock is meant
    const who = lock ? lock.holder || nobody : "nobody";
    if (lock?.fence !== user.lock.fence) throw new Error(`That lock has ended: ${login} is held by ${who} now.`);
    await call("DELETE", `/users/${id}/lock`);
  }});
});

const releaseAll = trying(async (holder) => {
  const isHold = HOLD.test(holder), query = {holder, project_id: isHold ? "" : filter.project_id};
  const {items, next: more} = await read("/users", {...query, state: "locked", limit: 1000});
  if (!items.length) throw new Error(`${holder} holds no user any more.`);
  const logins = items.slice(0, 5).map(({login}) => login).join(", "), rest = items.length > 5 ? ", …" : "";
  const count = more ? "over 1,000 users" : plural(items.length, "user");
  const end = `. All come free at once.${may("admin") ? "" : " Locks of other clients stay."}`;
  const text = [h("b", {}, holder), ` holds ${count}: `, h("bdi", {}, logins, rest), end];
  const [title, action] = isHold ? ["End the hold", "End it"] : [`Release all of ${holder}`, "Release all"];
  ask({title, action, danger: true, text, async run() {
    const {released} = await (await call("DELETE", "/locks", {query})).json();
    return `${plural(released, "lock")} of ${holder} released.`;
  }});
});

$("add").addEventListener("click", () => {
  const {project_id, env} = found?.pools[0] ?? {};
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
    request.responseType = "json";  // null where it is none: a proxy may answer, too
    const type = /\.csv$/i.test(file.name) ? "text/csv" : "application/x-ndjson";
    for (const pair of Object.entries({"Content-Type": type, ...authorization()})) request.setRequestHeader(...pair);
    request.upload.onprogress = (event) => { bar.value = event.loaded / event.total; };
    request.upload.onload = () => bar.removeAttribute("value");  // all is sent, and the service is at it
    $("ask").addEventListener("close", () => bar.hasAttribute("value") && request.abort(), {once: true});
    request.onabort = () => reject(new Error("Cancelled before the whole file was sent."));
    request.onerror = () => reject(new Error("No answer: whether the file was imported is not known."));
    request.onload = () => {
      if (request.status === 200) resolve(request.response);
      else reject(problem(request.status, request.response ?? {}));
    };
    request.send(file);
  });
}

$("import").addEventListener("click", () => {
  const text = "Lines of JSON (NDJSON) or CSV, all or nothing. A user that is known is changed, and keeps its lock.";
  const inputs = [{name: "file", label: "File", type: "file", accept: ".ndjson,.jsonl,.json,.csv"}];
  ask({title: "Import users", action: "Import", text: [text], inputs, async run({file}, form) {
    if (!file) throw new Error("Choose a file.");
    await file.slice(0, 1).arrayBuffer().catch(() => { throw new Error("The file has changed: choose it again."); });
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
    const file = h("a", {href: URL.createObjectURL(await answer.blob().catch(unread)), download: "users.ndjson"});
    file.click();
    setTimeout(() => URL.revokeObjectURL(file.href), 60e3);
    return "users.ndjson is saved.";
  }});
});

$("entry").append(makeForm({fault: $("entry-fault"), action: "Sign in", then: refresh, inputs: [
  {name: "client_id", label: "Client id", autocomplete: "username", spellcheck: "false"},
  {name: "client_secret", label: "Secret", type: "password", autocomplete: "current-password"},
  {name: "token", label: "Token", type: "password", autocomplete: "off"},
], async run({client_id: id, client_secret: secret, token}) {
  if (token) enterToken(token.trim());
  else await grant(id, secret);
}}));

// ---- Refreshing: every 2 s, 10 s when nothing changes, and not in a hidden tab --------------------------------------
let found = null, etag = null;  // the overview that is shown
let turns = 0, next, quiet = 0, failures = 0, answered = null;
function face(name) {
  for (const each of ["entry", "empty", "farm"]) show($(each), each === name);
  for (const each of document.querySelectorAll("[data-needs]")) show(each, name !== "entry" && may(each.dataset.needs));
  show($("leave"), session !== null);
  write($("first"), first.map((line) => line + (session ? ' -H "Authorization: Bearer $TOKEN"' : "")).join("\n"));
  if (name === "entry") [document.title, $("sums").textContent, $("pulse").textContent] = ["BotFarm", "", ""];
}

function draw({pools, ended}) {
  face(pools.length || filter.project_id ? "farm" : "empty");
  for (const name of ["project_id", "env", "domain"]) choose(fields[name], pools.map((pool) => pool[name]).sort());
  showPools(pools);
  list($("lately"), ended.filter(ofHolder), JSON.stringify, makeEnd);
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
  const users = await usersOf(overview);  // a list may change where no count does
  if (turn !== turns) return;
  [found, etag, quiet] = [overview, answer.headers.get("ETag"), isNew ? 0 : quiet + 1];
  write($("filter-fault"), "");
  if (isNew) draw(overview);
  showUsers(users);
  opened?.update();
  live();
  if (given.get("user")) open(given.get("user")), given.delete("user");  // once: maybe not before a sign-in
}

async function refresh(anew = false) {
  clearTimeout(next);
  if (anew) etag = null;
  if (document.hidden) return;
  const turn = (turns += 1);
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
const first = [line("/users", ada), line("/locks", lock)];

const given = new URLSearchParams(location.search);
setFields(Object.fromEntries(FILTERS.filter((name) => given.get(name)).map((name) => [name, given.get(name)])));
await refresh();
