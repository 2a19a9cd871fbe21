
"use strict";
/* Asks the gateway every two seconds, and shows what it says. */

const POLL_MS = 2000;
const ANSWER_MS = 5000;
const STALE_MS = 7000;
const POINTS_MAX = 300;
const NOW_MS = 30000;
const KEY = "dualpath-key";

const shown = {
  view: null, points: [], keptMs: 300000, askedMs: 0, answeredMs: 0, silent: 0,
  recent: [], chosen: null, plan: null,
};

/* ---- what is asked ---- */

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/* Paths are relative: a proxy may have put the gateway below a path of its own. */
async function ask(path) {
  const key = sessionStorage.getItem(KEY);
  const answer = await fetch(path, {
    headers: key ? { Authorization: `Bearer ${key}` } : {},
    signal: AbortSignal.timeout(ANSWER_MS),
    cache: "no-store",
    credentials: "omit",
  });
  if (answer.ok) return answer.json();
  let message = `the gateway answered ${answer.status}`;
  try {
    message = (await answer.json()).error.message;
  } catch { /* a proxy's page: the status has to do */ }
  throw new Refused(answer.status, message);
}

async function look() {
  const last = shown.points.length ? shown.points[shown.points.length - 1].at_ms : 0;
  const after = shown.silent > 5 ? 0 : last; // its clock may have been set back
  const [view, history] = await Promise.all([
    ask("admin/cluster"), ask(`admin/history?after_ms=${after}`),
  ]);
  if (after === 0) shown.points = [];
  shown.silent = history.points.length ? 0 : shown.silent + 1;
  const known = shown.points.length ? shown.points[shown.points.length - 1].at_ms : 0;
  const fresh = history.points.filter((point) => point.at_ms > known); // two looks may be under way
  shown.points = shown.points.concat(fresh).slice(-POINTS_MAX);
  shown.keptMs = 1000 * history.kept_s;
  shown.view = view;
  shown.answeredMs = Date.now();
}

let waiting = 0;

async function poll() {
  clearTimeout(waiting);
  if (document.hidden) return; // it goes on when somebody looks
  try {
    await look();
    tell("");
    byId("door").hidden = true;
    show();
  } catch (error) {
    failed(error);
  }
  freshness();
  clearTimeout(waiting);
  if (byId("door").hidden) waiting = setTimeout(poll, POLL_MS);
}

function failed(error) {
  if (error instanceof Refused && error.status === 401) {
    tell(sessionStorage.getItem(KEY) ? `That key does not open it: ${error.message}` : "");
    sessionStorage.removeItem(KEY);
    Object.assign(shown, { view: null, points: [], recent: [], chosen: null, plan: null, answeredMs: 0 });
    byId("cluster").hidden = true;
    byId("door").hidden = false;
    byId("key").focus();
  } else if (error instanceof Refused) {
    tell(error.message);
  } else if (!shown.view) {
    tell("The gateway does not answer. It is asked again every two seconds.");
  }
}

function tell(text) {
  byId("notice").textContent = text;
  byId("notice").hidden = !text;
}

function freshness() {
  const pill = byId("state");
  const age = Date.now() - shown.answeredMs;
  const stale = Boolean(shown.view) && age > STALE_MS;
  byId("cluster").classList.toggle("stale", stale);
  byId("forget").hidden = !sessionStorage.getItem(KEY);
  pill.className = `pill ${stale ? "stale" : shown.view ? "live" : ""}`;
  if (!byId("door").hidden) pill.textContent = "locked";
  else if (!shown.view) pill.textContent = byId("notice").hidden ? "connecting" : "no data";
  else if (!stale) pill.textContent = "live";
  else {
    const at = new Date(shown.answeredMs).toLocaleTimeString("en-GB");
    pill.textContent = `stale: no answer for ${ago(age / 1000)}, this is the state of ${at}`;
  }
}

/* ---- the page ---- */

function show() {
  byId("cluster").hidden = false;
  const { view } = shown;
  byId("policy").textContent = `reads ${view.policy}, loads ${view.load_policy}`;
  for (const kept of document.querySelectorAll(".kept")) kept.textContent = ago(shown.keptMs / 1000);
  for (const part of [figures, charts, nodes, engines, matrix, tiers, drains, requests]) part();
}

byId("door").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = byId("key").value.trim();
  byId("key").value = "";
  if (!/^[!-~]+$/.test(key)) {
    tell("A key has printable ASCII characters only.");
    return;
  }
  sessionStorage.setItem(KEY, key);
  byId("door").hidden = true;
  poll();
});
byId("forget").addEventListener("click", () => {
  sessionStorage.removeItem(KEY);
  location.reload();
});
document.addEventListener("visibilitychange", poll);
makeCharts();
setInterval(freshness, 1000);
poll();
