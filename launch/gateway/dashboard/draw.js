
"use strict";
/* Elements, figures and pictures. Names come from clients and processes: they become text nodes. */

const byId = (id) => document.getElementById(id);

/* An element with a class; its children are elements or text. */
function el(tag, kind, ...children) {
  const made = document.createElement(tag);
  if (kind) made.className = kind;
  made.append(...children.filter((child) => child !== null).map((c) => (c instanceof Node ? c : String(c))));
  return made;
}

function titled(element, title) {
  element.title = title;
  return element;
}

function coloured(element, colour) {
  element.style.setProperty("--mine", `var(--${colour})`);
  return element;
}

/* ---- figures ---- */

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];

function bytes(count) {
  let unit = 0;
  while (count >= 999.5 && unit < UNITS.length - 1) [count, unit] = [count / 1024, unit + 1];
  return `${count.toFixed(unit && count < 99.95 ? 1 : 0)} ${UNITS[unit]}`;
}

const rate = (perSecond) => `${bytes(perSecond)}/s`;
const whole = (count) => Math.round(count).toLocaleString("en");
const percent = (part) => `${(100 * part).toFixed(part > 0 && part < 0.1 ? 1 : 0)} %`;
const few = (count) => (count >= 100 ? whole(count) : count.toFixed(count >= 10 ? 0 : 1));

function seconds(time) {
  if (time < 0.0995) return `${(1000 * time).toFixed(time < 0.00995 ? 1 : 0)} ms`;
  return time < 99.5 ? `${time.toFixed(time < 9.95 ? 2 : 1)} s` : `${Math.round(time / 60)} min`;
}

function ago(time) {
  if (time < 99.5) return `${Math.round(time)} s`;
  return time < 5700 ? `${Math.round(time / 60)} min` : `${Math.round(time / 3600)} h`;
}

/* ---- tables ---- */

/* Heads are names, or [name, class]; without rows, `empty` says what to do. */
function fill(table, heads, rows, empty) {
  if (!rows.length) {
    const cell = el("td", "empty", empty);
    table.replaceChildren(el("tbody", "", el("tr", "", cell)));
    return;
  }
  const head = el("tr", "");
  for (const one of heads) {
    const [name, kind] = Array.isArray(one) ? one : [one, ""];
    const cell = el("th", kind, name);
    cell.scope = "col";
    head.append(cell);
  }
  table.replaceChildren(el("thead", "", head), el("tbody", "", ...rows));
}

function named(name) {
  const head = el("th", "", name);
  head.scope = "row";
  return head;
}

/* Parts are [share of the whole, colour]. */
function bar(...parts) {
  const line = el("span", "bar");
  for (const [share, colour] of parts) {
    const part = coloured(el("i", ""), colour);
    part.style.width = `${100 * Math.min(1, Math.max(0, share))}%`;
    line.append(part);
  }
  return line;
}

function legend(entries) {
  return entries.map(([name, colour]) => coloured(el("span", "key", name), colour));
}

/* ---- pictures ---- */

const WIDTH = 300;
const HEIGHT = 100;

function shape(tag, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

/* Stacked areas: `points` are [ms, [value of each colour]], `top` is the value at the upper edge. */
function areas(kind, points, colours, top, span) {
  const svg = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", class: kind });
  svg.setAttribute("aria-hidden", "true");
  if (points.length < 2 || top <= 0) return svg;
  const end = points[points.length - 1][0];
  const x = points.map(([at]) => WIDTH * (1 - (end - at) / span));
  let floor = points.map(() => 0);
  colours.forEach((colour, index) => {
    const roof = points.map(([, values], i) => floor[i] + values[index]);
    const y = (value) => (HEIGHT * (1 - value / top)).toFixed(1);
    const there = roof.map((value, i) => `${x[i].toFixed(1)},${y(value)}`);
    const back = floor.map((value, i) => `${x[i].toFixed(1)},${y(value)}`).reverse();
    const area = shape("polygon", { points: [...there, ...back].join(" ") });
    area.style.fill = `var(--${colour})`;
    svg.append(area);
    floor = roof;
  });
  return svg;
}

const highest = (points) => Math.max(0, ...points.map(([, values]) => values.reduce((a, b) => a + b, 0)));
