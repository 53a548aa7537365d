"use strict";
// Okabe and Ito's palette without its yellow, one set for each background; dash and marker tell curves apart too.
const COLOURS = {
  light: ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B8860B", "#56B4E9", "#1c2024"],
  dark: ["#56B4E9", "#FF8A3D", "#3BCB9B", "#E39BC4", "#E6B422", "#9AD3F5", "#f2f4f6"],
};
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
const MARKERS = ["circle", "square", "diamond", "triangle-up", "x", "cross", "triangle-down", "star", "pentagon"];
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
    margin: { l: 20, r: 12, t: 34, b: 20 }, hovermode: "closest", showlegend: true,
    modebar: { bgcolor: "rgba(0,0,0,0)", color: variable("--soft"), activecolor: variable("--accent") },
    legend: { orientation: "h", y: -0.2, x: 0, font: { size: narrow() ? 11 : 13 } },
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
const name = (label) => short(label, narrow() ? 34 : 60).replace(/&/g, "&amp;").replace(/</g, "&lt;");

function drawCurves(figure, plot, state) {
  const axis = figure.axes.find((one) => one.key === state.against) || figure.axes[0];
  const traces = [], ends = [];
  figure.curves.forEach((one) => {
    const style = look(one.index), x = one.x[axis.key], key = String(one.index);
    const keep = x.map((v, i) => i).filter((i) => !(state.logx && x[i] <= 0) && one.y[i] !== null);
    if (one.low) {
      const back = [...keep].reverse();
      traces.push({
        x: [...keep.map((i) => x[i]), ...back.map((i) => x[i])], y: [...keep.map((i) => one.high[i]), ...back.map((i) => one.low[i])],
        fill: "toself", fillcolor: see(style.color, 0.18), line: { width: 0 }, mode: "lines", hoverinfo: "skip", showlegend: false, legendgroup: key,
      });
    }
    traces.push({
      x: keep.map((i) => x[i]), y: keep.map((i) => one.y[i]), name: name(one.label), legendgroup: key,
      mode: keep.length <= 60 ? "lines+markers" : "lines", line: { color: style.color, dash: style.dash, width: 2.2 },
      marker: { color: style.color, symbol: style.symbol, size: 7 }, hovertemplate: `<b>${name(one.label)}</b><br>%{x:.4g}: %{y:.4g}<extra></extra>`,
    });
    const known = keep.map((i) => one.y[i]);
    ends.push(...(state.whole ? known : known.slice(Math.floor(known.length / 3))));
  });
  const low = Math.min(...ends), high = Math.max(...ends), pad = 0.06 * (high - low || Math.abs(high) || 1);
  const range = state.logy ? undefined : [low - pad, high + pad];
  Plotly.react(plot, traces, layout({
    xaxis: { title: { text: axis.label }, type: state.logx ? "log" : "linear" },
    yaxis: { title: { text: figure.label }, type: state.logy ? "log" : "linear", range, autorange: range ? false : true },
  }), CONFIG);
}
function drawBoxes(figure, plot, state) {
  const many = new Set(figure.series.flatMap((one) => one.x)).size;
  const traces = figure.series.map((one) => {
    const style = look(one.index);
    const own = { name: name(one.label), marker: { color: style.color, symbol: style.symbol, size: 5 }, line: { color: style.color }, boxpoints: one.y.length <= 400 ? "outliers" : false };
    return many === figure.series.length
      ? { ...own, type: "box", orientation: "h", x: one.y, y0: name(short(one.label, 28)), showlegend: false }
      : { ...own, type: "box", x: one.x, y: one.y };
  });
  const across = many === figure.series.length;
  const shapes = (figure.limits || []).map((one) => ({ type: "line", yref: "paper", y0: 0, y1: 1, x0: one.value, x1: one.value, line: { dash: "dot", width: 1.5, color: variable("--soft") } }));
  const notes = (figure.limits || []).map((one) => ({ x: state.logx ? Math.log10(one.value) : one.value, y: 1, yref: "paper", yanchor: "bottom", text: one.label, showarrow: false, font: { size: 11, color: variable("--soft") } }));
  const value = { title: { text: figure.label }, type: (across ? state.logx : state.logy) ? "log" : "linear", rangemode: "tozero" };
  Plotly.react(plot, traces, layout({ boxmode: across ? "overlay" : "group", margin: { l: 20, r: 12, t: 52, b: 20 }, xaxis: across ? value : {}, yaxis: across ? { autorange: "reversed" } : { ...value, rangemode: "normal" }, shapes: across ? shapes : [], annotations: across ? notes : [] }), CONFIG);
}
function drawBars(figure, plot, state) {
  const part = figure.parts[Number(state.part) || 0];
  const traces = figure.labels.map((label, index) => ({
    type: "bar", orientation: "h", x: [part.values[index]], y: [name(short(label, 28))], showlegend: false, marker: { color: look(index).color, pattern: { shape: ["", "/", "x", ".", "-"][Math.floor(index / 7 + index) % 5], fillmode: "overlay", fgcolor: variable("--paper"), fgopacity: 0.5, size: 6 } },
    text: [part.values[index] === null ? "" : Number(part.values[index].toPrecision(3)).toLocaleString("en")], textposition: "outside", cliponaxis: false, textangle: 0, hovertemplate: `<b>${name(label)}</b><br>%{x:.4g}<extra></extra>`,
  }));
  Plotly.react(plot, traces, layout({ barmode: "overlay", xaxis: { title: { text: part.label }, type: state.logx ? "log" : "linear" }, yaxis: { autorange: "reversed" }, margin: { l: 20, r: 70, t: 34, b: 20 } }), CONFIG);
}
function drawMaps(figure, plot, state) {
  const one = figure.maps[Number(state.map) || 0], back = theme() === "dark";
  const scale = back ? [[0, "#14171b"], [0.001, "#1d2b3a"], [1, "#7cc8ff"]] : [[0, "#ffffff"], [0.001, "#e3eef7"], [1, "#08519c"]];
  const z = state.sparse ? one.values.map((row) => row.map((v) => (v === null ? null : 1 - v))) : one.values;
  const what = state.sparse ? "sparsity" : "coverage";
  Plotly.react(plot, [{
    type: "heatmap", x: one.rounds, y: one.layers.map((layer) => name(short(layer, narrow() ? 18 : 40))), z, zmin: 0, zmax: 1, colorscale: scale, xgap: one.rounds.length < 80 ? 1 : 0, ygap: 1,
    colorbar: { title: { text: what, side: "right" }, thickness: 12, outlinewidth: 0 }, hovertemplate: `%{y}<br>round %{x}: ${what} %{z:.3f}<extra></extra>`,
  }], layout({ xaxis: { title: { text: "round" } }, yaxis: { autorange: "reversed", type: "category" } }), CONFIG);
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
const redraws = [];
FIGURES.forEach((figure) => {
  const plot = document.getElementById(figure.id), box = document.getElementById(`${figure.id}-controls`), state = {};
  const draw = () => DRAW[figure.kind](figure, plot, state);
  const set = (key) => (value) => { state[key] = value; draw(); };
  if (figure.kind === "curves") {
    choose(box, "against", figure.axes.map((one) => [one.key, one.label]), set("against"));
    tick(box, "logarithmic x", set("logx"));
    tick(box, "logarithmic y", set("logy"));
    tick(box, "from the first round", set("whole"));
  }
  if (figure.kind === "boxes") {
    tick(box, "logarithmic", (value) => { state.logx = state.logy = value; draw(); });
  }
  if (figure.kind === "bars") {
    choose(box, "part", figure.parts.map((one, index) => [index, one.label]), set("part"));
    tick(box, "logarithmic", set("logx"));
  }
  if (figure.kind === "maps") {
    if (figure.maps.length > 1) choose(box, "method", figure.maps.map((one, index) => [index, one.label]), set("map"));
    tick(box, "sparsity instead", set("sparse"));
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
