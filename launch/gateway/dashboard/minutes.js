
"use strict";
/* The last minutes: figures and pictures. */

/* ---- figures of the last minutes ---- */

function since(ms) {
  const points = shown.points;
  return points.length ? points.filter((p) => p.at_ms > points[points.length - 1].at_ms - ms) : [];
}

const time = (points) => points.reduce((sum, point) => sum + point.seconds, 0) || 1;
const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);

/* Of one node, or of all. */
function counted(points, group, name, node) {
  let total = 0;
  for (const { nodes } of points) {
    if (node === undefined) for (const of in nodes) total += nodes[of][group][name] || 0;
    else if (nodes[node]) total += nodes[node][group][name] || 0;
  }
  return total;
}

function perSecond(names, node) {
  return shown.points.map((point) => [
    point.at_ms, names.map((name) => counted([point], "bytes", name, node) / point.seconds),
  ]);
}

const STORAGE = [["remote_read", "storage NIC (remote)", "c1"], ["ssd_read", "SSD", "c2"]];
const MOVED = [["sent", "sent", "c4"], ["fetched", "fetched", "c3"], ["local", "within a host", "c1"]];
const names = (ways) => ways.map(([name]) => name);
const colours = (ways) => ways.map(([, , colour]) => colour);

function rateNow(ways, node) {
  const points = since(NOW_MS);
  return sum(names(ways).map((name) => counted(points, "bytes", name, node))) / time(points);
}

const FAILURES = ["failed", "unavailable", "poison", "poison_refused"];

function figures() {
  const { view } = shown;
  const minute = since(60000);
  const tokens = (name) => sum(shown.points.map((point) => point.tokens[name] || 0));
  const outcomes = {};
  for (const point of shown.points) {
    for (const [name, n] of Object.entries(point.requests)) outcomes[name] = (outcomes[name] || 0) + n;
  }
  const answered = sum(minute.map((point) => point.requests.ok || 0));
  const bad = sum(FAILURES.map((name) => outcomes[name] || 0));
  const prompt = tokens("hit") + tokens("recomputed");
  const backlog = Math.max(0, ...view.agents.map((agent) => agent.backlog_s));
  const told = Object.entries(outcomes).map(([name, n]) => `${name}: ${n}`).join(", ");
  const made = [
    [few(answered / time(minute)), "requests/s", `answered, in the last minute`],
    [`${view.requests.admitted} / ${view.requests.admitted_max}`, `in flight, ${view.requests.queued} queued`, "parts of requests that are admitted, and how many may be"],
    [prompt ? percent(tokens("hit") / prompt) : "–", "tokens hit", "of the prompt tokens of the last minutes"],
    [rate(rateNow(STORAGE)), "read from storage", "by all agents; mean of the last 30 s"],
    [rate(rateNow(MOVED)), "KV moved", "between agents and engines; mean of the last 30 s"],
    [seconds(backlog), "longest queue", "until an agent has read what it was promised to read"],
    [whole(view.directory_blocks), "blocks known", "to the directory"],
    [whole(bad), "failed requests", `in the last minutes, of: ${told}`],
  ].map(([value, label, title]) => titled(el("div", "figure", el("b", "", value), el("span", "", label)), title || ""));
  if (bad) made[7].classList.add("bad");
  byId("figures").replaceChildren(...made);
}

/* ---- pictures of the last minutes ---- */

const CHARTS = [
  {
    title: "Read from storage", ways: STORAGE, format: rate,
    points: () => perSecond(names(STORAGE)),
  },
  {
    title: "KV moved between agents and engines", ways: MOVED, format: rate,
    points: () => perSecond(names(MOVED)),
  },
  {
    title: "Prompt tokens", ways: [["hit", "hit", "c2"], ["recomputed", "computed", "c4"]],
    format: (perS) => `${whole(perS)}/s`,
    points: () => shown.points.map((point) => [
      point.at_ms, ["hit", "recomputed"].map((name) => (point.tokens[name] || 0) / point.seconds),
    ]),
  },
];

function makeCharts() {
  for (const chart of CHARTS) {
    chart.read = el("span", "");
    chart.peak = el("span", "");
    chart.begin = el("span", "");
    chart.picture = el("div", "");
    chart.at = null;
    chart.picture.addEventListener("pointermove", (event) => {
      const box = chart.picture.getBoundingClientRect();
      chart.at = (event.clientX - box.left) / box.width;
      readOut(chart);
    });
    chart.picture.addEventListener("pointerleave", () => {
      chart.at = null;
      readOut(chart);
    });
    byId("charts").append(el("div", "card chart", el("h2", "", chart.title),
      el("div", "top", chart.peak, chart.read), chart.picture,
      el("div", "top", chart.begin, el("span", "", "now")),
      el("div", "legend", ...legend(chart.ways.map(([, name, colour]) => [name, colour])))));
  }
}

function readOut(chart) {
  const { drawn, at } = chart;
  if (!drawn.length || at === null) {
    chart.read.textContent = "";
    return;
  }
  const end = drawn[drawn.length - 1][0];
  const wanted = end - (1 - at) * shown.keptMs;
  const [ms, values] = drawn.reduce((a, b) => (Math.abs(b[0] - wanted) < Math.abs(a[0] - wanted) ? b : a));
  const told = values.map((value, i) => `${chart.ways[i][1]} ${chart.format(value)}`).join(", ");
  chart.read.textContent = `${ago((end - ms) / 1000)} ago: ${told}`;
}

function charts() {
  for (const chart of CHARTS) {
    chart.drawn = chart.points();
    const top = highest(chart.drawn);
    chart.peak.textContent = top ? `peak ${chart.format(top)}` : "nothing yet";
    chart.begin.textContent = `${ago(shown.keptMs / 1000)} ago`;
    chart.picture.replaceChildren(areas("", chart.drawn, colours(chart.ways), top, shown.keptMs));
    readOut(chart);
  }
}
