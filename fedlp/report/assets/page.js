"use strict";
// Colours come with the page; dash and marker tell curves apart too.
const COLOURS = JSON.parse(document.getElementById("palette").textContent);
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
const STROKES = ["", "7 4", "2 3", "7 3 2 3", "11 4"];
const MARKERS = ["circle", "square", "diamond", "triangle-up", "x", "cross", "triangle-down", "star", "pentagon"];
const SHAPES = [
  "M13 8a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z", "M13 4h8v8h-8z", "M17 3l5 5-5 5-5-5z", "M17 3l5 9h-10z", "M13 5l2-2 2 3 2-3 2 2-2 3 2 3-2 2-2-3-2 3-2-2 2-3z",
  "M15 3h4v3h3v4h-3v3h-4v-3h-3v-4h3z", "M17 13l5-9h-10z", "M17 2l1.6 4.2 4.4.2-3.4 2.8 1.2 4.3-3.8-2.4-3.8 2.4 1.2-4.3-3.4-2.8 4.4-.2z", "M17 3l5 3.8-1.9 6h-6.2l-1.9-6z",
];
const MOST_LABELS = 5; // names beside curves; more are told apart by the list of curves alone
const FIGURES = JSON.parse(document.getElementById("figures").textContent);
const root = document.documentElement;
const narrow = () => window.innerWidth < 700;

function theme() {
  if (root.dataset.theme) return root.dataset.theme;
  return matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
}
function look(index) {
  return { color: COLOURS[theme()][index % 7], dash: DASHES[Math.floor(index / 7 + index) % 5], symbol: MARKERS[index % 9] };
}
function variable(name) { return getComputedStyle(root).getPropertyValue(name).trim(); }
function see(color, opacity) {
  const n = parseInt(color.slice(1), 16);
  return `rgba(${n >> 16},${(n >> 8) & 255},${n & 255},${opacity})`;
}
function layout(more) {
  const line = variable("--line"), ink = variable("--ink");
  const axis = { title: { standoff: 8 }, gridcolor: line, linecolor: line, zerolinecolor: line, automargin: true };
  const base = {
    font: { family: "system-ui, sans-serif", size: 13, color: ink }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 20, r: 12, t: 34, b: 20 }, hovermode: "closest", showlegend: false,
    modebar: { bgcolor: "rgba(0,0,0,0)", color: variable("--soft"), activecolor: variable("--accent") },
    hoverlabel: { bgcolor: variable("--panel"), bordercolor: line, font: { color: ink } },
  };
  const merged = { ...base, ...more };
  for (const side of ["xaxis", "yaxis"]) {
    const own = more[side] || {};
    merged[side] = { ...axis, ...own, title: { ...axis.title, ...(own.title || {}) } };
  }
  return merged;
}
const short = (text, most) => (text.length > most ? text.slice(0, most - 1) + "…" : text);
const tail = (text, most) => (text.length > most ? "…" + text.slice(text.length - most + 1) : text);
const escaped = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;");
const name = (label) => escaped(short(label, narrow() ? 34 : 60));
function lines(label) { // of a name beside an axis: at most three
  const most = narrow() ? 15 : 26, found = [""];
  label.split(/(?<=[ ,])/).forEach((word) => {
    if (found.at(-1) && (found.at(-1) + word).trim().length > most) found.push("");
    found[found.length - 1] += word;
  });
  if (found.length > 3) found.splice(2, Infinity, found.slice(2).join(""));
  return found.map((line) => escaped(short(line.trim(), most))).join("<br>");
}
function named(labels) { // an axis of one row a name, so that names that look alike stay apart
  return { tickvals: labels.map((_, i) => i), ticktext: labels.map(lines), range: [labels.length - 0.5, -0.5], showgrid: false, zeroline: false };
}
const rows = (count, each) => `${Math.max(200, 110 + count * each)}px`;
const high = (labels) => Math.max(44, ...labels.map((label) => 10 + 17 * lines(label).split("<br>").length));
function extent(values, log, share) {
  const known = log ? values.filter((v) => v > 0).map(Math.log10) : values;
  if (!known.length) return undefined;
  const low = Math.min(...known), high = Math.max(...known), pad = share * (high - low || Math.abs(high) || 1);
  return [low - pad, high + pad];
}
const pen = document.createElement("canvas").getContext("2d");
function width(text) { pen.font = "13px system-ui, sans-serif"; return pen.measureText(text).width; }

function drawCurves(figure, plot, state) {
  const axis = figure.axes.find((one) => one.key === state.against) || figure.axes[0];
  const traces = [], seen = [], all = [], ends = [];
  const shown = figure.curves.filter((one) => !state.hidden.has(one.index));
  shown.forEach((one) => {
    const style = look(one.index), x = one.x[axis.key], known = (v) => v !== null && !(state.logy && v <= 0);
    const keep = x.map((v, i) => i).filter((i) => !(state.logx && x[i] <= 0) && known(one.y[i]));
    if (!keep.length) return;
    const banded = keep.filter((i) => one.low && known(one.low[i]) && known(one.high[i]));
    if (banded.length) {
      const back = [...banded].reverse();
      traces.push({
        x: [...banded.map((i) => x[i]), ...back.map((i) => x[i])], y: [...banded.map((i) => one.high[i]), ...back.map((i) => one.low[i])],
        fill: "toself", fillcolor: see(style.color, shown.length > MOST_LABELS ? 0.08 : 0.16), line: { width: 0 }, mode: "lines", hoverinfo: "skip",
      });
    }
    const marked = Math.ceil(keep.length / 16);
    traces.push({
      x: keep.map((i) => x[i]), y: keep.map((i) => one.y[i]), mode: "lines+markers", line: { color: style.color, dash: style.dash, width: 2.2 },
      marker: { color: style.color, symbol: style.symbol, opacity: 1, size: keep.map((_, k) => ((keep.length - 1 - k) % marked ? 0 : 7)) }, hovertemplate: `<b>${name(one.label)}</b><br>%{x:.4g}: %{y:.4g}<extra></extra>`,
    });
    const values = keep.map((i) => one.y[i]), last = keep.at(-1);
    all.push(...keep.map((i) => x[i]));
    const from = state.whole ? 0 : Math.floor(keep.length / 3);
    seen.push(...values.slice(from), ...keep.slice(from).filter((i) => banded.includes(i)).flatMap((i) => [one.low[i], one.high[i]]));
    ends.push({ x: x[last], y: one.y[last], text: short(one.label, 26), color: style.color });
  });
  const across = extent(all, state.logx, 0.03), up = extent(seen, state.logy, 0.06);
  const direct = ends.length > 0 && ends.length <= MOST_LABELS && !narrow() ? beside(ends, plot, state, across, up) : { right: 12, notes: [] };
  Plotly.react(plot, traces, layout({
    margin: { l: 20, r: direct.right, t: 34, b: 20 }, annotations: direct.notes,
    xaxis: { title: { text: axis.label }, type: state.logx ? "log" : "linear", range: across },
    yaxis: { title: { text: figure.label }, type: state.logy ? "log" : "linear", range: up },
  }), CONFIG);
}
// Names at the ends of curves: where two would overlap the lower one moves down, and all of them up where one would leave.
function beside(ends, plot, state, across, up) {
  const full = plot.clientWidth - 80, height = plot.clientHeight - 100, log = (v, on) => (on ? Math.log10(v) : v);
  const share = (end) => (log(end.x, state.logx) - across[0]) / (across[1] - across[0]);
  let right = 12;
  for (let turn = 0; turn < 4; turn++) right = Math.max(right, ...ends.map((end) => share(end) * (full - right) + 32 + width(end.text) - (full - right)));
  const placed = ends.map((end) => ({ ...end, left: share(end) * (full - right), top: (1 - (log(end.y, state.logy) - up[0]) / (up[1] - up[0])) * height }));
  placed.sort((a, b) => a.top - b.top);
  placed.forEach((one, index) => {
    one.at = Math.max(one.top, 8);
    placed.slice(0, index).forEach((other) => { if (other.left < one.left + 34 + width(one.text) && one.left < other.left + 34 + width(other.text)) one.at = Math.max(one.at, other.at + 19); });
  });
  const out = Math.max(0, ...placed.map((one) => one.at - height + 4));
  const notes = placed.map((one) => ({
    x: log(one.x, state.logx), y: log(one.y, state.logy), text: escaped(one.text), ax: 20, ay: one.at - out - one.top, xanchor: "left", showarrow: true, arrowhead: 0, arrowwidth: 1.4,
    arrowcolor: one.color, standoff: 5, bgcolor: see(variable("--paper"), 0.75), borderpad: 1, font: { size: 13, color: variable("--ink") },
  }));
  return { right, notes };
}
function drawBoxes(figure, plot, state) {
  const across = new Set(figure.series.flatMap((one) => one.x)).size === figure.series.length;
  const shown = figure.series.filter((one) => across || !state.hidden.has(one.index));
  const traces = shown.map((one, row) => {
    const style = look(one.index);
    const own = { type: "box", name: name(one.label), marker: { color: style.color, symbol: style.symbol, size: 5 }, line: { color: style.color }, boxpoints: one.y.length <= 400 ? "outliers" : false };
    return across ? { ...own, orientation: "h", x: one.y, y0: row, width: 0.55 } : { ...own, x: one.x, y: one.y };
  });
  if (across) plot.style.height = rows(shown.length, high(shown.map((one) => one.label)));
  const limits = across ? figure.limits || [] : [];
  const shapes = limits.map((one) => ({ type: "line", yref: "paper", y0: 0, y1: 1, x0: one.value, x1: one.value, line: { dash: "dot", width: 1.5, color: variable("--soft") } }));
  const notes = limits.map((one) => ({ x: state.logx ? Math.log10(one.value) : one.value, y: 1, yref: "paper", xanchor: "left", yanchor: "bottom", textangle: -35, text: escaped(one.label), showarrow: false, font: { size: 12, color: variable("--soft") } }));
  const value = { title: { text: figure.label }, type: state.logx ? "log" : "linear" };
  const top = limits.length ? 90 : 34;
  Plotly.react(plot, traces, layout({ boxmode: across ? "overlay" : "group", margin: { l: 20, r: 30, t: top, b: 20 }, shapes, annotations: notes,
    xaxis: across ? { ...value, rangemode: "tozero" } : { type: "category" }, yaxis: across ? named(shown.map((one) => one.label)) : value }), CONFIG);
}
function drawBars(figure, plot, state) {
  const part = figure.parts[Number(state.part) || 0], say = (v) => (v === null ? "" : Number(v.toPrecision(3)).toLocaleString("en"));
  const limit = figure.limit, shapes = limit ? [{ type: "line", yref: "paper", y0: 0, y1: 1, x0: limit.value, x1: limit.value, line: { dash: "dot", width: 1.5, color: variable("--soft") } }] : [];
  const notes = limit ? [{ x: state.logx ? Math.log10(limit.value) : limit.value, y: 1, yref: "paper", yanchor: "bottom", text: escaped(limit.label), showarrow: false, font: { size: 12, color: variable("--soft") } }] : [];
  plot.style.height = rows(figure.labels.length, high(figure.labels));
  Plotly.react(plot, [{
    type: "bar", orientation: "h", x: part.values, y: figure.labels.map((_, i) => i), width: 0.62, marker: { color: figure.labels.map((_, i) => look(figure.colours ? figure.colours[i] : i).color) },
    text: part.values.map(say), textposition: "outside", cliponaxis: false, textangle: 0, customdata: figure.labels.map(name), hovertemplate: "<b>%{customdata}</b><br>%{x:.4g}<extra></extra>",
  }], layout({ xaxis: { title: { text: part.label }, type: state.logx ? "log" : "linear" }, yaxis: named(figure.labels), margin: { l: 20, r: 64, t: limit ? 54 : 34, b: 20 }, shapes, annotations: notes }), CONFIG);
}
function drawMaps(figure, plot, state) {
  const one = figure.maps[Number(state.map) || 0], back = theme() === "dark";
  const scale = back ? [[0, "#1d2b3a"], [1, "#7cc8ff"]] : [[0, "#e3eef7"], [1, "#08519c"]];
  const z = state.sparse ? one.values.map((row) => row.map((v) => (v === null ? null : 1 - v))) : one.values;
  const what = state.sparse ? "sparsity" : "coverage", step = Math.ceil(one.layers.length / 40);
  const ticks = one.layers.map((_, i) => i).filter((i) => i % step === 0);
  plot.style.height = rows(Math.min(one.layers.length, 44), 18);
  Plotly.react(plot, [{
    type: "heatmap", x: one.rounds, y: one.layers.map((_, i) => i), z, zmin: 0, zmax: 1, colorscale: scale, xgap: one.rounds.length < 80 ? 1 : 0, ygap: 1, customdata: one.layers.map((layer) => one.rounds.map(() => escaped(layer))),
    colorbar: { title: { text: what, side: "right" }, thickness: 12, outlinewidth: 0 }, hovertemplate: `%{customdata}<br>round %{x}: ${what} %{z:.3f}<extra></extra>`,
  }], layout({ xaxis: { title: { text: "round" }, showgrid: false, zeroline: false }, yaxis: { tickvals: ticks, ticktext: ticks.map((i) => escaped(tail(one.layers[i], narrow() ? 14 : 34))), range: [one.layers.length - 0.5, -0.5], showgrid: false, zeroline: false } }), CONFIG);
}
const CONFIG = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"], toImageButtonOptions: { format: "svg" } };
const DRAW = { curves: drawCurves, boxes: drawBoxes, bars: drawBars, maps: drawMaps };

function control(box, text, element) {
  const label = document.createElement("label");
  label.append(text, " ", element);
  box.append(label);
}
function choose(box, text, options, set) {
  const select = document.createElement("select");
  options.forEach(([value, shown]) => select.append(new Option(short(shown, 60), value)));
  select.addEventListener("change", () => set(select.value));
  control(box, text, select);
}
function tick(box, text, set) {
  const input = document.createElement("input");
  input.type = "checkbox";
  input.addEventListener("change", () => set(input.checked));
  control(box, text, input);
}
function swatch(index) {
  const span = document.createElement("span");
  span.innerHTML = `<svg width="34" height="16" aria-hidden="true"><path d="M0 8H34" stroke="currentColor" stroke-width="2.2" stroke-dasharray="${STROKES[Math.floor(index / 7 + index) % 5]}"/><path d="${SHAPES[index % 9]}" fill="currentColor"/></svg>`;
  const paint = () => { span.style.color = look(index).color; };
  redraws.push(paint);
  paint();
  return span;
}
function curves(box, series, state, draw) { // which curves are drawn: the list is also the key to them
  const details = document.createElement("details"), summary = document.createElement("summary"), list = document.createElement("div");
  summary.textContent = "Curves";
  list.className = "controls";
  details.className = "curves";
  details.open = series.length > MOST_LABELS || narrow();
  series.forEach((one) => {
    const input = document.createElement("input"), label = document.createElement("label");
    input.type = "checkbox";
    input.checked = true;
    input.addEventListener("change", () => { state.hidden[input.checked ? "delete" : "add"](one.index); draw(); });
    label.append(input, swatch(one.index), one.label);
    list.append(label);
  });
  details.append(summary, list);
  box.after(details);
  return details;
}
const redraws = [];
FIGURES.forEach((figure) => {
  const plot = document.getElementById(figure.id), box = document.getElementById(`${figure.id}-controls`), state = { hidden: new Set() };
  const draw = () => DRAW[figure.kind](figure, plot, state);
  const set = (key) => (value) => { state[key] = value; draw(); };
  if (figure.kind === "curves") {
    choose(box, "against", figure.axes.map((one) => [one.key, one.label]), set("against"));
    tick(box, "logarithmic x", set("logx"));
    tick(box, "logarithmic y", set("logy"));
    tick(box, "from the first round", set("whole"));
    if (figure.curves.length > 1) curves(box, figure.curves, state, draw);
  }
  if (figure.kind === "boxes") {
    tick(box, "logarithmic", set("logx"));
    if (new Set(figure.series.flatMap((one) => one.x)).size !== figure.series.length) curves(box, figure.series, state, draw).open = true;
  }
  if (figure.kind === "bars") {
    choose(box, "part", figure.parts.map((one, index) => [index, one.label]), set("part"));
    tick(box, "logarithmic", set("logx"));
  }
  if (figure.kind === "maps") {
    if (figure.maps.length > 1) choose(box, "method", figure.maps.map((one, index) => [index, one.label]), set("map"));
    choose(box, "show", [["", "coverage"], ["sparsity", "sparsity"]], set("sparse"));
  }
  redraws.push(draw);
  draw();
});

// ---- light and dark
const redraw = () => redraws.forEach((draw) => draw());
document.getElementById("theme").addEventListener("click", () => {
  root.dataset.theme = theme() === "dark" ? "light" : "dark";
  redraw();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
let pause = 0;
window.addEventListener("resize", () => { clearTimeout(pause); pause = setTimeout(redraw, 150); });

// ---- tables: sorting and columns
document.querySelectorAll("table.numbers").forEach((table) => {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = (row) => { const cell = row.cells[column], number = parseFloat(cell.dataset.value ?? ""); return Number.isNaN(number) ? cell.textContent : number; };
      const rows = [...body.rows].sort((a, b) => { const x = value(a), y = value(b); return (typeof x === typeof y ? (x < y ? -1 : x > y ? 1 : 0) : typeof x === "number" ? -1 : 1) * (up ? 1 : -1); });
      body.append(...rows);
    });
  });
  const box = document.querySelector(".columns");
  heads.forEach((head, column) => {
    if (!column || !box) return;
    const input = document.createElement("input");
    input.type = "checkbox";
    input.checked = !("extra" in head.dataset);
    const show = () => [...table.rows].forEach((row) => { row.cells[column].hidden = !input.checked; });
    input.addEventListener("change", show);
    control(box, head.dataset.name, input);
    show();
  });
});
