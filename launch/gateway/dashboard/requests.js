
"use strict";
/* What the last requests did with their time, and why they went where they went. */

const STEPS = [
  ["earlier", "earlier attempts", "c5"], ["tokenize", "tokenise", "c7"], ["queue", "queue", "c4"],
  ["read", "read", "c1"], ["plan", "hand over", "c6"], ["prefill", "prefill", "c2"],
  ["first", "decode, to the first byte", "c3"], ["rest", "rest of the answer", "c5"],
];

/* [name, label, colour, begin, duration] of each step; what an attempt before took is not told. */
function steps(ended) {
  const took = ended.timings_s;
  const first = Math.max(0, (took.first_byte || 0) - (took.prefill || 0));
  const durations = { ...took, first };
  const told = sum(STEPS.map(([name]) => durations[name] || 0));
  durations[ended.attempts > 1 ? "earlier" : "rest"] = Math.max(0, (took.total || 0) - told);
  let begin = 0;
  return STEPS.map(([name, label, colour]) => {
    const one = [name, label, colour, begin, durations[name] || 0];
    begin += one[4];
    return one;
  });
}

/* `width`: the time that fills the line. */
function fall(parts, width) {
  const line = el("div", "fall");
  for (const [, label, colour, begin, took] of parts) {
    if (!took) continue;
    const part = titled(coloured(el("i", ""), colour), `${label}: ${seconds(took)}`);
    part.style.left = `${100 * begin / width}%`;
    part.style.width = `${100 * took / width}%`;
    line.append(part);
  }
  return line;
}

const idOf = (ended) => `${ended.plan}/${ended.rid}`;

function requests() {
  const table = byId("requests");
  const held = table.matches(":hover") && matchMedia("(hover: hover)").matches;
  if (!held) {
    const now = Date.now();
    shown.recent = shown.view.requests.recent.map((ended) => ({ ...ended, endedMs: now - 1000 * ended.age_s }));
  }
  const { chosen } = shown;
  const gone = chosen && !shown.recent.some((ended) => idOf(ended) === idOf(chosen));
  const recent = gone ? [chosen, ...shown.recent] : shown.recent;
  const longest = Math.max(0.001, ...recent.map((ended) => ended.timings_s.total || 0));
  const used = STEPS.filter(([name]) => name !== "earlier" || recent.some((e) => e.attempts > 1));
  byId("legend").replaceChildren(...(recent.length ? legend(used.map(([, label, colour]) => [label, colour])) : []),
    el("span", "", recent.length ? `whole width: ${seconds(longest)}${held ? "; held while the pointer is here" : ""}` : ""));
  const focused = document.activeElement && document.activeElement.dataset.id;
  const rows = recent.flatMap((ended) => requestRows(ended, longest));
  fill(table, ["ended", "request", "outcome", "engines", ["prompt", "num"], ["hit", "num"], "readers (blocks)",
    ["total", "num"], "where the time went"], rows, "No request has ended yet. Send one to /v1/chat/completions: the README has a chat of two turns.");
  for (const button of table.querySelectorAll("button")) if (button.dataset.id === focused) button.focus();
}

function requestRows(ended, longest) {
  const isOpen = shown.chosen !== null && idOf(ended) === idOf(shown.chosen);
  const button = titled(el("button", "rid", ended.rid), ended.rid);
  button.type = "button";
  button.dataset.id = idOf(ended);
  button.setAttribute("aria-expanded", isOpen);
  button.addEventListener("click", () => choose(isOpen ? null : ended));
  const readers = Object.entries(ended.readers).map(([name, blocks]) => `${name}: ${blocks}`).join(", ");
  const row = el("tr", isOpen ? "open" : "",
    el("td", "quiet", `${ago(Math.max(0, (Date.now() - ended.endedMs) / 1000))} ago`),
    el("td", "", button),
    el("td", ended.outcome === "ok" ? "ok" : "failed", ended.outcome + (ended.attempts > 1 ? ` (${ended.attempts} attempts)` : "")),
    el("td", "", ended.prefill ? `${ended.prefill} → ${ended.decode}` : "–"),
    el("td", "num", whole(ended.prompt_tokens)),
    el("td", "num", ended.prompt_tokens ? percent(ended.hit_tokens / ended.prompt_tokens) : "–"),
    el("td", "", readers || "–"),
    el("td", "num", seconds(ended.timings_s.total || 0)),
    el("td", "", fall(steps(ended), longest)));
  if (!isOpen) return [row];
  const cell = el("td", "open", why(ended));
  cell.colSpan = 9;
  return [row, el("tr", "", cell)];
}

async function choose(ended) {
  shown.chosen = ended;
  shown.plan = null;
  requests();
  if (ended === null || !ended.plan) return;
  try {
    const plan = await ask(`admin/plan/${ended.plan}`);
    if (shown.chosen === ended) shown.plan = plan;
  } catch (error) {
    if (shown.chosen === ended) shown.plan = { missing: error.message };
  }
  requests();
}

/* One request: its steps, one below the other, and the decision. */
function why(ended) {
  const width = Math.max(0.001, ended.timings_s.total || 0);
  const parts = steps(ended).filter((part) => part[4]);
  const beginOf = (name) => (parts.find((part) => part[0] === name) || [0, 0, 0, 0])[3];
  const beside = [
    ["slots", "read: wait for DRAM slots", "c5", beginOf("read"), ended.timings_s.slots || 0],
    ["deliver", "longest delivery, beside it", "c4", beginOf("prefill"), ended.timings_s.deliver || 0],
  ].filter((part) => part[4]);
  const table = el("table", "steps", ...[...parts, ...beside].map((part) => el("tr", "",
    el("td", "", part[1]), el("td", "num", seconds(part[4])), el("td", "", fall([part], width)))));
  return el("div", "why", el("div", "", el("h3", "", `Waterfall of ${ended.rid}`), table), decision(ended));
}

function decision(ended) {
  const { plan } = shown;
  const box = el("div", "told", el("h3", "", ended.plan ? `Plan ${ended.plan}` : "No plan was made"));
  if (!ended.plan) return box;
  if (plan === null || plan.missing) {
    box.append(el("p", "quiet", plan === null ? "asking …" : plan.missing));
    return box;
  }
  box.append(el("p", "", `Policy ${plan.policy}. Reads were estimated to take ${seconds(plan.estimated_read_s)}, `
    + `they took ${seconds(ended.timings_s.read || 0)}.` + (plan.load && plan.load.recompute_all_s
    ? ` First token expected in ${seconds(plan.load.load_all_s)} with the whole hit, ${seconds(plan.load.recompute_all_s)} without.` : "")));
  const candidates = [["prefill", "pending_tokens", "tokens to compute"], ["decode", "context_tokens", "tokens held"]]
    .flatMap(([role, field, unit]) => plan[role].candidates.map((one) => el("tr", "", el("td", "", tag(role)),
      el("td", one.name === plan[role].chosen ? "chosen" : "", one.name),
      el("td", "num", `${whole(one[field])} ${unit}, ${whole(one.sequences)} sequences`))));
  const readers = plan.agents.map((agent) => {
    const read = Object.entries(ended.read_bytes[agent.name] || {}).map(([tier, n]) => `${bytes(n)} from ${tier}`);
    const blocks = ended.readers[agent.name] || 0;
    const queue = Math.max(agent.backlog_s.ssd, agent.backlog_s.storage_nic);
    return el("tr", "", el("td", "", tag("reader")), el("td", "", agent.name), el("td", "num",
      `${blocks} blocks${read.length ? `, ${read.join(", ")}` : blocks ? " in DRAM" : ""}; its queue was ${seconds(queue)}`));
  });
  const table = el("table", "", ...candidates, ...readers);
  box.append(el("div", "scroll", table));
  return box;
}
