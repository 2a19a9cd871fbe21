
"use strict";
/* Who is there, who reads for whom, what is kept where, what is drained. */

/* ---- nodes, engines ---- */

function stateOf(process) {
  const word = !process.alive ? "silent"
    : process.draining ? (process.idle ? "drained" : "draining")
      : process.idle ? "idle" : "busy";
  return titled(el("span", word === "drained" ? "draining" : word, word),
    `heard ${process.last_seen_s < 1e9 ? ago(process.last_seen_s) : "long"} ago`);
}

const byName = (a, b) => a.name.localeCompare(b.name, "en", { numeric: true });
const tag = (role) => el("span", `tag ${role}`, role);

/* Prefill first. */
function sortedEngines() {
  return [...shown.view.engines].sort((a, b) => (a.role < b.role) - (a.role > b.role) || byName(a, b));
}

/* Of each agent: its own picture, in the scale of all. */
function sparks(ways, agents) {
  const drawn = agents.map((agent) => perSecond(names(ways), agent.name));
  const top = Math.max(0, ...drawn.map(highest));
  return new Map(agents.map((agent, i) => [
    agent.name, areas("spark", drawn[i], colours(ways), top, shown.keptMs),
  ]));
}

function nodes() {
  const agents = [...shown.view.agents].sort(byName);
  const all = sortedEngines();
  const [read, moved] = [sparks(STORAGE, agents), sparks(MOVED, agents)];
  const rows = agents.map((agent) => {
    const engines = all.filter((engine) => engine.agent === agent.name);
    const roles = [...new Set(engines.map((engine) => engine.role))];
    const used = agent.dram_slots ? 1 - agent.dram_slots_free / agent.dram_slots : 0;
    return el("tr", "", named(agent.name),
      el("td", "", ...(roles.length ? roles : ["reader"]).map(tag)),
      el("td", "", stateOf(agent)),
      el("td", "", engines.map((engine) => engine.name).join(" ") || "–"),
      el("td", "", read.get(agent.name), rate(rateNow(STORAGE, agent.name))),
      el("td", "", moved.get(agent.name), rate(rateNow(MOVED, agent.name))),
      el("td", "num", bytes(agent.backlog_bytes)),
      el("td", "num", seconds(agent.backlog_s)),
      el("td", "num", bytes(agent.deliver_queue_bytes)),
      titled(el("td", "wide", bar([used, "c2"])), `${percent(used)} of ${agent.dram_slots} slots in use`));
  });
  fill(byId("nodes"), ["node", "role", "state", "engines", "storage NIC and SSD", "KV moved",
    ["to read", "num"], ["takes", "num"], ["to deliver", "num"], "DRAM in use"], rows,
  "No agent has reported yet. Each does within a second of its start: look into its log.");
}

function engines() {
  const rows = sortedEngines().map((engine) => el("tr", "", named(engine.name),
    el("td", "", tag(engine.role)), el("td", "", engine.agent), el("td", "", stateOf(engine)),
    el("td", "num", whole(engine.load_sequences)), el("td", "num", whole(engine.load_tokens)),
    el("td", "num", whole(engine.context_tokens)), el("td", "num", whole(engine.free_tokens)),
    el("td", "num", engine.prefill_tokens_per_s ? `${whole(engine.prefill_tokens_per_s)}/s` : "–")));
  fill(byId("engines"), ["engine", "role", "node", "state", ["sequences", "num"],
    ["tokens to compute", "num"], ["tokens held", "num"], ["tokens free", "num"],
    ["prefill speed", "num"]], rows,
  "No engine has reported yet. They load their model first: /health says what is missing.");
}

/* ---- readers, tiers, drains ---- */

const PAIRS_SHOWN_MAX = 16;

function matrix() {
  const pairs = new Map();
  for (const { nodes: of } of shown.points) {
    for (const agent in of) {
      const row = pairs.get(agent) || pairs.set(agent, {}).get(agent);
      const given = of[agent].delivered_bytes;
      for (const engine in given) row[engine] = (row[engine] || 0) + given[engine];
    }
  }
  const known = (agent, engine) => (pairs.get(agent) || {})[engine] || 0;
  let to = sortedEngines().map((engine) => engine.name);
  let from = [...shown.view.agents].sort(byName).map((agent) => agent.name);
  if (to.length > PAIRS_SHOWN_MAX) { // of a large cluster, those between which something went
    to = to.filter((engine) => from.some((agent) => known(agent, engine)));
    from = from.filter((agent) => to.some((engine) => known(agent, engine)));
  }
  const given = from.map((agent) => to.map((engine) => known(agent, engine)));
  const all = sum(given.flat());
  const most = Math.max(1, ...given.flat());
  const rows = !all ? [] : from.map((agent, row) => el("tr", "", named(agent),
    ...given[row].map((n) => {
      const cell = el("td", n ? "heat" : "num quiet", n ? bytes(n) : "·");
      if (n) cell.style.setProperty("--share", n / most);
      return cell;
    }),
    el("td", "num", percent(sum(given[row]) / all))));
  fill(byId("matrix"), ["reader", ...to.map((name) => [name, "num"]), ["of all", "num"]], rows,
    "No KV was delivered. Hits come with a conversation's second turn: send one, then the same with more.");
}

const TIERS = [["dram", "DRAM", "c2"], ["ssd", "SSD", "c1"], ["remote", "remote", "c3"]];

function tiers() {
  const { view, points } = shown;
  const hits = TIERS.map(([tier]) => counted(points, "hits", tier));
  const all = sum(hits);
  byId("found").replaceChildren(...(all ? [
    bar(...TIERS.map(([, , colour], i) => [hits[i] / all, colour])),
    el("div", "legend", ...legend(TIERS.map(([, name, colour], i) => [`${name} ${percent(hits[i] / all)}`, colour]))),
  ] : []));
  const agents = Object.keys(view.tiers).sort((a, b) => byName({ name: a }, { name: b }));
  const cell = (agent, [tier, , colour]) => {
    const of = view.tiers[agent][tier];
    if (!of) return el("td", "quiet", "off");
    const found = counted(points, "hits", tier, agent);
    const room = of.capacity_bytes ? `${bytes(of.bytes)} of ${bytes(of.capacity_bytes)}` : `${bytes(of.bytes)}, no bound`;
    return titled(el("td", "wide", of.capacity_bytes ? bar([of.bytes / of.capacity_bytes, colour]) : null,
      el("div", "", room), el("div", "under", `${whole(found)} hits`)),
    `${whole(of.blocks)} blocks; ${bytes(of.write_queue_bytes)} to be written; ${whole(of.hits_total)} hits since its start`);
  };
  const rows = agents.map((agent) => el("tr", "", named(agent), ...TIERS.map((tier) => cell(agent, tier))));
  fill(byId("tiers"), ["agent", ...TIERS.map(([, name]) => name)], rows, "No agent has reported its tiers yet.");
}

function drains() {
  const { view } = shown;
  const left = (p) => (p.role ? `${p.load_sequences} sequences run there` : `${bytes(p.backlog_bytes)} to read, ${bytes(p.deliver_queue_bytes)} to deliver`);
  const rows = [...sortedEngines(), ...[...view.agents].sort(byName)].filter((p) => p.draining)
    .map((p) => el("tr", "", named(p.name), el("td", "", p.role ? tag(p.role) : "agent"), el("td", "", stateOf(p)),
      el("td", "", p.idle ? "nothing runs there: it may be stopped, or taken back with \"on\": false" : left(p))));
  const box = byId("drains");
  if (rows.length) {
    const table = el("table", "");
    fill(table, ["name", "what", "state", "what is left"], rows, "");
    box.replaceChildren(el("div", "scroll", table));
    return;
  }
  const example = view.agents.length ? view.agents[0].name : "NAME";
  box.replaceChildren(el("div", "empty", "Nothing is drained. An engine or an agent that is gets nothing new, and finishes what it has:",
    el("code", "", `curl -s ${new URL("admin/drain", location)} -H 'Content-Type: application/json' -d '{"name": "${example}", "on": true}'`)));
}
