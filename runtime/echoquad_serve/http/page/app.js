// The page of the service. Everything that comes from the network is set as text, never as HTML, and nothing is kept in
// the browser: pictures are fetched past its cache, and the list holds one page of results.

const PAGE = 50; // results in the list
const SHOW_MS = 500; // between two new results that are shown by themselves
const LIVE_MS = 200; // between two changes of the live text
const STALE_MS = 2000; // after which a live decision is not current any more
const WATCH_MS = 700; // between two checks of the connection; with the next, a loss shows within two seconds
const ANSWER_MS = 1200; // for the answer to a check
const MAX_PROBLEMS = 100; // lines in the list of files without a decision

const FLAGS = {
  "blank": "The frame has no signal: it is black, white or uniform.",
  "no-signal-LA": "Quadrant LA has no signal.",
  "no-signal-RA": "Quadrant RA has no signal.",
  "no-signal-LV": "Quadrant LV has no signal.",
  "no-signal-RV": "Quadrant RV has no signal.",
  "saturated": "Large parts are pure white: the gain may be too high.",
  "screen": "This looks like a picture of a whole screen, not of the ultrasound image alone.",
  "nan": "Some numbers of the file are missing.",
  "uncropped": "The file names no ultrasound region, so captions and toolbars may have been used as well.",
  "region-clamped": "The ultrasound region reached beyond the frame and was cut at its edge.",
  "colour": "Large parts are in colour: this may be a Doppler image, or no ultrasound image.",
  "tie": "Two or more classes have the same number of votes.",
  "unlike-training": "The frame is unlike those that the network was trained on.",
};

const LIVE_STATES = {
  "frozen": ["FROZEN PICTURE", "The picture does not change any more. Check the freeze key of the scanner, and the cable."],
  "no signal": ["NO SIGNAL", "No picture comes from the source. Check the cable and the scanner's video output."],
  "stopped": ["STOPPED", "The live source has stopped. The service tries to open it again."],
  "silent": ["NO ANSWER", "No live decision came for two seconds."],
};

const ORIGINS = { http: "sent from a page or program", folder: "watched folder", dicom: "DICOM", live: "live view" };

const $ = (id) => document.getElementById(id);
const sleep = (ms) => new Promise((done) => setTimeout(done, ms));

let shown = null; // the result on display
let row = 0; // of it
let list = []; // the page of results, latest first, each as `summary`
let known = 0; // the highest number of a result that was seen
let atNewest = true; // the list is its newest page
let active = ""; // the identifier of the option that is selected
let live = null; // the latest live event, and when it came
let watching = false; // the live view is on display
let online = null; // whether the service answers; null until it is known
let source = null; // of server-sent events
let heard = 0; // when something last came from the service

// Words

function element(tag, text = "", className = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  made.className = className;
  return made;
}

function percent(share) {
  if (typeof share !== "number") return "";
  if (share > 0.99 && share < 1) return "over 99 %"; // a rounded 100 % would claim certainty
  if (share < 0.01 && share > 0) return "under 1 %";
  return `${Math.round(100 * share)} %`;
}

function time(unix, { date = false } = {}) {
  const then = new Date(1000 * unix);
  // Swedish writes 2026-11-27 14:03:05, which is read the same way everywhere.
  return date || then.toDateString() !== new Date().toDateString() ? then.toLocaleString("sv-SE") : then.toLocaleTimeString("sv-SE");
}

function seconds(value) {
  if (value < 1) return "less than a second";
  if (value < 120) return `${Math.round(value)} s`;
  return value < 7200 ? `${Math.round(value / 60)} min` : `${Math.round(value / 3600)} h`;
}

const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;
const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1).replace(/[\p{L}\p{N}]$/u, "$&.");
const undecided = (one) => one.pred_image === "INDETERMINATE";
const classesOf = (one) => Object.keys(one).filter((key) => key.startsWith("prob_")).map((key) => key.slice(5));
const quadrantsOf = (one) => Object.keys(one).filter((key) => /^pred_(?!image$)/.test(key)).map((key) => key.slice(5));
const problem = ({ code, message }) => (code ? `${message} (${code})` : message);

function confidenceOf(one) {
  if (typeof one.confidence === "number") return one.confidence;
  return Math.max(...classesOf(one).map((name) => one[`prob_${name}`]));
}

function nearest(one) {
  if (one.predicted_class) return one.predicted_class; // by a vote, it need not have the highest mean
  return classesOf(one).reduce((best, name) => (one[`prob_${name}`] > one[`prob_${best}`] ? name : best));
}

function summary(result) {
  const { id, number, name, finished, status, rows } = result;
  const flags = new Set(rows.flatMap((one) => one.flags ?? []));
  let what = status === "expired" ? "Not decided: too late" : "Not decided";
  if (rows.length === 1) what = undecided(rows[0]) ? "INDETERMINATE" : `${rows[0].pred_image}, ${percent(confidenceOf(rows[0]))}`;
  if (rows.length > 1) what = `${plural(rows.length, "frame")}: ${counts(rows)}`;
  return { id, number, name, finished, what, flags: flags.size };
}

function counts(rows) {
  const count = new Map();
  for (const one of rows) count.set(one.pred_image, (count.get(one.pred_image) ?? 0) + 1);
  return [...count].map(([name, times]) => `${times} ${name}`).join(", ");
}

let spoken = { text: "", timer: 0 };
function speak(text) {
  // A screen reader would read out each of many results in a row; the latest of a second is enough.
  spoken.text = text;
  spoken.timer ||= setTimeout(() => { $("spoken").textContent = spoken.text; spoken.timer = 0; }, 1000);
}

// The service

async function get(path, options = {}) {
  const answer = await fetch(path, { cache: "no-store", ...options });
  if (answer.ok) return answer;
  throw await errorOf(answer);
}

async function errorOf(answer) {
  const text = await answer.text();
  const error = new Error(`The service answered ${answer.status}.`);
  try {
    return Object.assign(error, JSON.parse(text).error);
  } catch {
    return error;
  }
}

// The decision

function say(level, { subject = "", verdict = "", confidence = "", reason = "", flags = [], notes = [] }) {
  $("decision").dataset.level = level;
  $("subject").replaceChildren(...[subject].flat());
  $("verdict").textContent = verdict;
  $("verdict").dataset.length = verdict.length <= 6 ? "short" : verdict.length <= 14 ? "middle" : "long";
  $("confidence").textContent = confidence;
  $("reason").textContent = reason;
  const sentences = [...notes, ...flags.map((flag) => FLAGS[flag] ?? `Flag ${flag}; the documentation explains it.`)];
  $("flags").replaceChildren(...sentences.map((text) => {
    const item = element("li", text, "state");
    item.dataset.level = "warn";
    return item;
  }));
}

function wordsOf(one) {
  const words = { verdict: one.pred_image, flags: one.flags ?? [] };
  const smoothed = one.smoothed_over > 1 ? `, mean of ${one.smoothed_over} frames` : "";
  if (!undecided(one)) return { ...words, confidence: `Confidence ${percent(confidenceOf(one))}${smoothed}` };
  // The flag says it already.
  const told = one.flags?.includes("unlike-training") && one.abstained_because?.startsWith("unlike");
  const reason = one.abstained_because && !told ? sentence(one.abstained_because) : "";
  return { ...words, reason, confidence: `Nearest is ${nearest(one)}, ${percent(confidenceOf(one))}${smoothed}` };
}

const levelOf = (one) => (undecided(one) || one.flags?.length ? "warn" : "good");

function showRow() {
  const { rows, failures, name, number, finished } = shown;
  const one = rows[row];
  const subject = [element("bdi", name), `, result ${number}, ${time(finished, { date: true })}`];
  if (one) {
    if (rows.length > 1) subject.push(`, frame ${row + 1} of ${rows.length} (${counts(rows)})`);
    const notes = failures.length ? [`${plural(failures.length, "frame")} could not be decided: ${problem(failures[0])}`] : [];
    say(notes.length ? "warn" : levelOf(one), { subject, notes, ...wordsOf(one) });
  } else {
    const late = shown.status === "expired" && "Its deadline had passed before it could be decided.";
    say("bad", { subject, verdict: "NOT DECIDED", reason: late || failures.map(problem).map(sentence).join(" ") });
  }
  $("frames").hidden = rows.length < 2;
  $("frame").max = rows.length || 1;
  $("frame").value = row + 1;
  $("frame").setAttribute("aria-valuetext", $("frame-text").value = `${row + 1} of ${rows.length}`);
  $("map-choice").hidden = !one;
  showEvidence(one);
  showRan(one, shown);
  showPicture(one);
}

function showEvidence(one) {
  $("shares").hidden = !one;
  if (!one) return;
  const classes = classesOf(one);
  const cells = (tag, texts) => texts.map(([text, className]) => element(tag, text, className));
  const head = element("tr");
  head.append(...cells("th", [["Quadrant"], ...classes.map((name, index) => [name, `swatch class${index % 7}`])]));
  for (const cell of head.children) cell.scope = "col";
  $("quadrant-head").replaceChildren(head);
  const line = (title, decided, share) => {
    const made = element("tr");
    made.append(element("th", title), ...cells("td", classes.map((name) => [share(name), name === decided ? "winner" : ""])));
    made.firstChild.scope = "row";
    return made;
  };
  $("quadrants").replaceChildren(
    ...quadrantsOf(one).map((place) => line(place, one[`pred_${place}`], (name) => percent(one[`p_${place}_${name}`]))),
    line("Mean", one.pred_image, (name) => percent(one[`prob_${name}`])),
  );
}

function showRan(one, { bundle = {}, origin, timings_ms: timings = {} } = {}) {
  $("ran-part").hidden = !origin;
  const typicality = typeof one?.typicality === "number" ? one.typicality.toFixed(2) : "";
  const calibrated = one && Math.abs(confidenceOf(one) - one[`prob_${nearest(one)}`]) > 0.005;
  const entries = {
    "Bundle": [bundle.name, (one?.bundle_sha256 ?? bundle.sha256)?.slice(0, 12)].filter(Boolean).join(" "),
    "Device": [one?.device, one?.provider, one?.precision].filter(Boolean).join(", "),
    "Vote": one?.method,
    "Confidence": calibrated ? "calibrated; the mean above is not" : "",
    "Typicality": typicality,
    "Origin": ORIGINS[origin] ?? origin,
    "Time": Object.entries(timings).map(([stage, ms]) => `${stage} ${Math.round(ms)} ms`).join(", "),
  };
  $("ran").replaceChildren(...Object.entries(entries).filter(([, text]) => text).flatMap(
    ([term, text]) => [element("dt", term), element("dd", text)],
  ));
}

// The picture. It is shown only together with its decision: until it is there, there is none.

let drawing = null;
async function showPicture(one) {
  drawing?.abort();
  drawing = null;
  $("picture").replaceChildren();
  delete $("picture").dataset.stale;
  $("picture-note").textContent = one ? "Loading the picture." : "There is no picture of an object that was not decided.";
  if (!one) return;
  const control = drawing = new AbortController();
  try {
    const path = `api/v1/results/${shown.id}/overlay?row=${row}&cam=${$("map").checked ? 1 : 0}`;
    const answer = await get(path, { signal: control.signal });
    const bitmap = await createImageBitmap(await answer.blob());
    if (control.signal.aborted) return bitmap.close();
    const canvas = element("canvas");
    [canvas.width, canvas.height] = [bitmap.width, bitmap.height];
    canvas.getContext("bitmaprenderer").transferFromImageBitmap(bitmap);
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `Frame ${shown.name} with the boxes ${quadrantsOf(one).join(", ")}, decided ${one.pred_image}`);
    $("picture").replaceChildren(canvas);
    $("picture-note").textContent = "";
  } catch (error) {
    if (!control.signal.aborted) $("picture-note").textContent = `There is no picture: ${problem(error)}`;
  }
}

function show(result, { speaking = true } = {}) {
  if (watching) leaveLive();
  shown = result;
  row = 0;
  showRow();
  mark(result.id);
  if (speaking) speak(`Result ${result.number}: ${$("verdict").textContent}. ${$("confidence").textContent} ${$("reason").textContent} ${$("flags").innerText}`);
}

let coming = { result: null, timer: 0, at: 0 };
function showSoon(result) {
  if (coming.result && coming.result.number > result.number) return;
  coming.result = result;
  coming.timer ||= setTimeout(() => {
    const { result: newest } = coming;
    coming = { result: null, timer: 0, at: performance.now() };
    if ($("follow").checked && !watching) show(newest);
  }, Math.max(0, coming.at + SHOW_MS - performance.now()));
}

// The list of results

function received(result) {
  if (list.some(({ id }) => id === result.id)) return; // an answer and its event, or an event that was sent again
  const latest = result.number > known;
  known = Math.max(known, result.number);
  if (atNewest) {
    // In order: the answer to this page may overtake the events of results before it.
    list = [...list, summary(result)].sort((a, b) => b.number - a.number).slice(0, PAGE);
  }
  drawList();
  if (latest && $("follow").checked && !watching) showSoon(result);
}

let listing = 0;
function drawList() {
  listing ||= requestAnimationFrame(() => {
    listing = 0;
    $("list").replaceChildren(...list.map((entry) => {
      const option = element("div");
      option.id = `r${entry.id}`;
      option.setAttribute("role", "option");
      option.dataset.id = entry.id;
      const flags = entry.flags ? `${plural(entry.flags, "flag")}` : "";
      option.append(element("span", entry.what, "what"), element("span", flags, "flag"));
      option.append(element("bdi", entry.name, "name"), element("span", time(entry.finished), "when"));
      return option;
    }));
    mark(active);
    const newer = atNewest || !list.length ? 0 : known - list[0].number;
    $("list-note").textContent = list.length
      ? `Results ${list.at(-1).number} to ${list[0].number} of ${known}${newer ? `; ${newer} are newer` : ""}`
      : "No results yet.";
    $("newest").disabled = $("newer").disabled = atNewest;
    $("older").disabled = !list.length || list.at(-1).number <= 1 || list.length < PAGE;
  });
}

function mark(id) {
  active = id;
  $("list").removeAttribute("aria-activedescendant");
  for (const option of $("list").children) {
    const selected = option.dataset.id === id;
    option.setAttribute("aria-selected", selected);
    if (selected) {
      $("list").setAttribute("aria-activedescendant", option.id);
      if (document.activeElement === $("list")) option.scrollIntoView({ block: "nearest" });
    }
  }
}

async function loadPage(query) {
  const { results } = await (await get(`api/v1/results?limit=${PAGE}${query}`)).json();
  if (query.includes("after")) results.reverse();
  if (!results.length || results[0].number >= known) return loadNewest();
  list = results.map(summary);
  atNewest = false;
  drawList();
}

async function loadNewest() {
  if (!atNewest) [list, atNewest] = [[], true];
  const { results } = await (await get(`api/v1/results?limit=${PAGE}`)).json();
  if (!atNewest) return; // another page was asked for meanwhile
  const latest = results[0];
  const since = list.filter(({ number }) => number > (latest?.number ?? 0)); // events that came during the request
  list = [...since, ...results.map(summary)].slice(0, PAGE);
  drawList();
  if (!latest) return;
  const missed = latest.number > known;
  known = Math.max(known, latest.number);
  if ((missed || (!shown && !since.length)) && $("follow").checked && !watching) show(latest, { speaking: Boolean(shown) });
}

async function countResults() {
  const { results } = await (await get("api/v1/results?limit=1")).json();
  known = Math.max(known, results[0]?.number ?? 0);
  drawList();
}

let choosing = null;
async function select(id) {
  mark(id);
  $("follow").checked = false; // or the next result would replace the one that was chosen
  choosing?.abort();
  const control = choosing = new AbortController();
  try {
    const result = await (await get(`api/v1/results/${id}`, { signal: control.signal })).json();
    if (!control.signal.aborted) show(result);
  } catch (error) {
    if (control.signal.aborted) return;
    say("bad", { verdict: "NO ANSWER", reason: `The result cannot be shown: ${problem(error)}` });
    $("picture").replaceChildren();
  }
}

function turn(loading) {
  loading.catch((error) => { $("list-note").textContent = `The list cannot be read: ${problem(error)}`; });
}

// The live view

function watchLive() {
  watching = true;
  drawing?.abort();
  $("live").setAttribute("aria-pressed", "true");
  $("live").textContent = "Leave the live view";
  $("map-choice").hidden = $("frames").hidden = true;
  mark("");
  openStream();
  drawLive();
}

function openStream() {
  const image = new Image();
  image.alt = "Live picture";
  image.onerror = () => setTimeout(() => { if (watching && image.isConnected) openStream(); }, 1000);
  image.src = "api/v1/live/stream";
  $("picture").replaceChildren(image);
  $("picture-note").textContent = "";
}

function leaveLive() {
  watching = false;
  $("live").setAttribute("aria-pressed", "false");
  $("live").textContent = "Watch the live view";
  const image = $("picture").querySelector("img");
  if (image) image.src = ""; // ends the connection
  $("picture").replaceChildren();
  delete $("picture").dataset.stale;
}

let liveTimer = 0;
let liveSaid = "";
function drawLive() {
  clearTimeout(liveTimer);
  if (!watching) return;
  liveTimer = setTimeout(drawLive, LIVE_MS);
  const silent = !live || performance.now() - live.at > STALE_MS;
  const state = online === false ? "lost" : live && live.state !== "ok" ? live.state : silent ? "silent" : "ok";
  const dropped = live ? `, ${plural(live.dropped ?? 0, "frame")} dropped` : "";
  $("picture").toggleAttribute("data-stale", state !== "ok");
  if (state === "ok") {
    say(levelOf(live.row), { subject: `Live view, age ${Math.round(live.age_ms)} ms${dropped}`, ...wordsOf(live.row) });
    showEvidence(live.row);
    showRan(live.row, { bundle: live.bundle, origin: "live" });
  } else {
    const lost = ["NO CONNECTION", "The last decision is not shown, since it is not current."];
    const [verdict, reason] = state === "lost" ? lost : LIVE_STATES[state] ?? [state.toUpperCase(), ""];
    say("bad", { subject: `Live view${dropped}`, verdict, reason });
    showEvidence(null);
    showRan(null);
  }
  const text = `Live view: ${$("verdict").textContent}`;
  if (text !== liveSaid) speak(liveSaid = text);
}

function showLatest() {
  leaveLive();
  shown = null;
  $("follow").checked = true;
  say("off", { verdict: "No result yet" });
  showEvidence(null);
  showRan(null);
  turn(loadNewest());
}

// Status

function showStatus(status) {
  const lines = [];
  const add = (level, title, text) => lines.push([level, title, text]);
  const ways = { http: "Upload", folder: "Watched folder", dicom: "DICOM" };
  for (const [key, title] of Object.entries(ways)) {
    const intake = status.intake?.[key];
    for (const one of [intake ?? []].flat()) {
      const error = one.error || one.last_error || (one.listening === false ? "it does not listen; see the log" : "");
      const well = one.ok !== false && !error;
      const place = one.path ? ` ${one.path.split(/[\\/]/).at(-1)}` : "";
      add(well ? "good" : "bad", `${title}${place}`, well ? "open" : `closed: ${error || "see the log"}`);
    }
  }
  const queue = status.queue ?? {};
  const oldest = queue.waiting ? `, the oldest for ${seconds(queue.oldest_waiting_s ?? 0)}` : "";
  if (queue.full) add("bad", "Queue", `full, nothing more is accepted; ${queue.waiting} wait${oldest}`);
  else if (queue.waiting) add("busy", "Queue", `${queue.waiting} wait${oldest}`);
  else add("good", "Queue", "empty");
  if (typeof queue.free_mb === "number") add(queue.full ? "bad" : "good", "Disk", `${Math.round(queue.free_mb / 102.4) / 10} GiB free`);
  for (const { name, waiting, refused, last_error: error, note, ok } of status.destinations ?? []) {
    const parts = [refused && `${refused} refused`, waiting && `${waiting} wait`, !ok && error, note].filter(Boolean);
    add(refused ? "bad" : ok ? (waiting ? "busy" : "good") : "warn", `To ${name}`, parts.join(", ") || "all sent");
  }
  if (status.live) {
    const { state, last_error: error } = status.live;
    add(state === "ok" ? "good" : "bad", "Live", [state === "ok" ? "picture" : state, error].filter(Boolean).join(", "));
  }
  const { name, sha256, device, precision, self_test: test } = status.bundle ?? {};
  const passed = test === undefined || test === "passed" || test === true;
  const runs = [name, sha256?.slice(0, 12), device, precision].filter(Boolean).join(", ");
  if (runs) add(passed ? "good" : "bad", "Bundle", `${runs}, self-test ${passed ? "passed" : "failed"}`);
  else add("bad", "Bundle", "none is loaded");
  $("status-list").replaceChildren(...lines.map(([level, title, text]) => {
    const item = element("li", "", "state-line");
    const state = element("span", title, "state");
    state.dataset.level = level;
    item.append(state, `: ${text}`);
    return item;
  }));
  $("status-title").textContent = "Status";
  $("live").hidden = !status.live;
  if (!status.live && watching) showLatest();
  const ready = status.ready !== false;
  setService(ready ? "good" : "bad", ready ? "Ready" : `Not ready: ${(status.reasons ?? []).join("; ")}`);
}

function setService(level, text) {
  $("service").dataset.level = level;
  $("service").textContent = text;
}

// The connection

function lost() {
  if (online === false) return;
  online = false;
  setService("bad", "No connection");
  $("status-title").textContent = "Status, as last known";
  for (const state of $("status-list").querySelectorAll(".state")) state.dataset.level = "off";
  $("alert").textContent = "Connection lost, trying again. What is shown may not be current.";
  drawLive();
}

function connect() {
  source?.close();
  const events = source = new EventSource("api/v1/events");
  const on = (name, act) => events.addEventListener(name, (event) => {
    heard = performance.now();
    act(JSON.parse(event.data));
  });
  events.onopen = () => {
    heard = performance.now();
    found();
  };
  events.onerror = () => { if (events === source) lost(); };
  on("result", received);
  on("status", showStatus);
  on("live", (event) => { live = { ...event, at: performance.now() }; });
}

async function found() {
  const before = online;
  online = true;
  $("alert").textContent = "";
  if (before === false) speak("The connection is back.");
  try {
    // What came while nobody listened; the stream itself begins with the status. An older page of the list stays as it
    // is, and the note below it counts what is newer.
    if (atNewest) await loadNewest();
    else await countResults();
    if (watching && before === false) openStream();
  } catch {
    lost();
  }
}

async function watchConnection() {
  // A stream whose cable was pulled reports no error, and a refused one is not tried again by the browser.
  for (;;) {
    await sleep(WATCH_MS);
    if (document.hidden || (online && performance.now() - heard < WATCH_MS / 2)) continue;
    try {
      await get("api/v1/live", { signal: AbortSignal.timeout(ANSWER_MS) });
      if (!online || source.readyState === EventSource.CLOSED) connect();
    } catch {
      lost();
    }
  }
}

document.addEventListener("visibilitychange", () => {
  // A browser opens six connections to a service: pages that nobody sees would use them up.
  if (document.hidden) {
    source?.close();
    if (watching) $("picture").replaceChildren();
  } else {
    connect();
    if (watching) openStream();
  }
});

// Sending

const queue = { waiting: [], sent: 0, total: 0, problems: [], request: null, stopped: false, running: false };

function send(files) {
  queue.waiting.push(...files);
  queue.total += files.length;
  if (watching) showLatest();
  $("follow").checked = true;
  if (!queue.running) run();
}

async function run() {
  queue.running = true;
  queue.stopped = false;
  $("sending").hidden = false;
  while (queue.waiting.length && !queue.stopped) {
    const file = queue.waiting.shift();
    queue.sent += 1;
    const error = await sendFile(file);
    if (error && !queue.stopped) addProblem(file.name, error);
  }
  speak(queue.stopped ? "Sending was stopped." : `${plural(queue.sent, "file")} sent.`);
  Object.assign(queue, { waiting: [], sent: 0, total: 0, running: false, request: null });
  $("sending").hidden = true;
}

function progress(file, doing, share) {
  const bytes = typeof share === "number" ? `, ${Math.floor(100 * share)} %` : "";
  $("sending-text").textContent = `${doing} ${queue.sent} of ${queue.total}: ${file.name}${bytes}`;
  if (typeof share === "number") $("progress").value = share;
  else $("progress").removeAttribute("value");
}

async function sendFile(file) {
  // Repeated attempts have one key, so that the service decides the object once.
  const key = Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
  for (let cut = 0; !queue.stopped; ) {
    const { status, body, retryAfter } = await post(file, key);
    const error = body.error ?? { message: `The service answered ${status}.` };
    if (status === 200 || body.rows) {
      received(body);
      return body.status === "done" ? null : { message: body.failures?.map(problem).join(" ") || "It was not decided." };
    }
    if (status === 202) return null;
    if (status === 429 || status === 503 || status === 504) {
      await pause(file, retryAfter, error.message);
    } else if (status !== 0) {
      return error;
    } else if (!(await readable(file))) {
      return { message: "It cannot be read; choose files, not folders, and do not change them while they are sent." };
    } else {
      if (online && (cut += 1) === 3) return { message: "The connection broke three times while it was sent; it may be too large." };
      await pause(file, 1, "The connection is lost");
    }
  }
  return null;
}

function post(file, key) {
  return new Promise((done) => {
    const request = queue.request = new XMLHttpRequest(); // fetch does not report the progress of a body
    request.open("POST", `api/v1/predict?${new URLSearchParams({ name: file.name })}`);
    const known = /^(image|video)\/|^application\/dicom$/.test(file.type);
    request.setRequestHeader("Content-Type", known ? file.type : "application/octet-stream");
    request.setRequestHeader("Accept", "application/json");
    request.setRequestHeader("Idempotency-Key", key);
    request.upload.onprogress = ({ loaded, total }) => progress(file, "Sending", total ? loaded / total : 1);
    request.upload.onload = () => progress(file, "Deciding");
    request.onloadend = () => {
      let body = {};
      try {
        body = JSON.parse(request.responseText);
      } catch { /* the status says enough */ }
      done({ status: request.status, body, retryAfter: Number(request.getResponseHeader("Retry-After")) || 2 });
    };
    progress(file, "Sending", 0);
    request.send(file);
  });
}

async function pause(file, duration, why) {
  for (let left = Math.min(60, Math.ceil(duration)); left > 0 && !queue.stopped; left -= 1) {
    progress(file, `${why}. Trying again in ${left} s:`);
    await sleep(1000);
  }
}

async function readable(file) {
  try {
    await file.slice(0, 1).arrayBuffer();
    return true;
  } catch {
    return false;
  }
}

function addProblem(name, error) {
  queue.problems.push(error);
  const item = element("li");
  item.append(element("bdi", name), `: ${problem(error)}`);
  if (queue.problems.length <= MAX_PROBLEMS) $("problem-list").append(item);
  $("problems-title").textContent = `${plural(queue.problems.length, "file")} without a decision`;
  $("problems").hidden = false;
  speak(`${name}: ${problem(error)}`);
}

// What the user does

$("files").addEventListener("change", () => {
  send([...$("files").files]);
  $("files").value = ""; // or choosing the same file again would do nothing
});
$("stop").addEventListener("click", () => {
  queue.stopped = true;
  queue.request?.abort();
  $("files").focus();
});
$("clear").addEventListener("click", () => {
  queue.problems = [];
  $("problem-list").replaceChildren();
  $("problems").hidden = true;
  $("files").focus();
});

let inside = 0;
const dropping = (change) => {
  inside = Math.max(0, inside + change);
  document.body.classList.toggle("dropping", inside > 0);
};
document.addEventListener("dragenter", () => dropping(1));
document.addEventListener("dragleave", () => dropping(-1));
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  dropping(-inside);
  if (event.dataTransfer.files.length) send([...event.dataTransfer.files]);
});

$("map").addEventListener("change", () => { if (shown) showPicture(shown.rows[row]); });
let sliding = 0;
$("frame").addEventListener("input", () => {
  row = Number($("frame").value) - 1;
  cancelAnimationFrame(sliding);
  sliding = requestAnimationFrame(showRow);
});
$("live").addEventListener("click", () => (watching ? showLatest() : watchLive()));
$("follow").addEventListener("change", () => { if ($("follow").checked) showLatest(); });
$("newest").addEventListener("click", () => turn(loadNewest()));
$("newer").addEventListener("click", () => turn(loadPage(`&after=${list[0].number}`)));
$("older").addEventListener("click", () => turn(loadPage(`&before=${list.at(-1).number}`)));
$("list").addEventListener("click", (event) => {
  const option = event.target.closest("[role=option]");
  if (option) select(option.dataset.id);
});
$("list").addEventListener("keydown", (event) => {
  const at = list.findIndex((entry) => entry.id === active);
  const next = { ArrowDown: at + 1, ArrowUp: at - 1, PageDown: at + 10, PageUp: at - 10, Home: 0, End: list.length - 1 }[event.key];
  if (next === undefined || !list.length) return;
  event.preventDefault();
  select(list[Math.min(list.length - 1, Math.max(0, next))].id);
});

drawList();
connect();
watchConnection();
