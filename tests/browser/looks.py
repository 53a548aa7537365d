"""What a reader would see at a glance, as JavaScript that a page answers: marks, cut or overlapping text, contrast."""

from __future__ import annotations

MARKS = """[...document.querySelectorAll(".plot")].map((plot) => ({
  title: plot.closest("figure").querySelector("h3").textContent,
  marks: [...plot.querySelectorAll(".scatterlayer path, .boxlayer path.box, .barlayer path, .heatmaplayer image")]
    .filter((one) => one.getBoundingClientRect().width + one.getBoundingClientRect().height > 2).length,
}))"""

# texts of plots that leave their figure, or lie on each other by more than the padding of their boxes
TEXT = """[...document.querySelectorAll(".plot")].flatMap((plot) => {
  const edge = plot.getBoundingClientRect(), found = [];
  const texts = [...plot.querySelectorAll("svg text")].filter((one) => one.textContent.trim() && !one.closest(".modebar"))
    .map((one) => ({ says: one.textContent, box: one.getBoundingClientRect(), turned: /rotate\\((?!0)/.test(one.getAttribute("transform") || "") }))
    .filter(({ box }) => box.width > 0);
  texts.forEach(({ says, box }) => {
    if (box.left < edge.left - 1 || box.right > edge.right + 1 || box.top < edge.top - 1 || box.bottom > edge.bottom + 1) found.push(`cut: ${says}`);
  });
  texts.forEach((a, i) => texts.slice(i + 1).forEach((b) => {
    const wide = Math.min(a.box.right, b.box.right) - Math.max(a.box.left, b.box.left);
    const high = Math.min(a.box.bottom, b.box.bottom) - Math.max(a.box.top, b.box.top);
    if (wide > 3 && high > 4 && !a.turned && !b.turned) found.push(`overlap: ${a.says} | ${b.says}`);
  }));
  return found;
})"""  # noqa: E501

# elements that leave the window, but for what scrolls inside itself
OUTSIDE = """[...document.querySelectorAll("body *")].filter((one) => {
  const box = one.getBoundingClientRect();
  return box.width > 0 && box.right > window.innerWidth + 1
    && !one.closest(".wide, pre, svg, .md-typeset__table, .highlight")
    && getComputedStyle(one).position !== "fixed";
}).map((one) => one.outerHTML.slice(0, 90))"""

# texts whose contrast to what lies behind them is below 4.5:1 (WCAG 2.2, 1.4.3)
CONTRAST = """(() => {
  const parts = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const light = (rgb) => rgb.slice(0, 3).map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (one) => { for (let at = one; at; at = at.parentElement) { const c = parts(getComputedStyle(at).backgroundColor); if (c[3] > 0.9) return c; } return [255, 255, 255, 1]; };
  const found = new Set();
  document.querySelectorAll("h1, h2, h3, p, a, b, li, td, th, th button, caption span, button, select, label, summary, figcaption, pre, code, .plot svg text").forEach((one) => {
    if (!one.textContent.trim() || !one.getBoundingClientRect().width || one.closest(".modebar, .barlayer")) return;
    const style = getComputedStyle(one), ink = parts(one instanceof SVGElement ? style.fill : style.color), paper = behind(one);
    const [low, high] = [light(ink), light(paper)].sort((a, b) => a - b), ratio = (high + 0.05) / (low + 0.05);
    if (ratio < 4.5) found.add(`${one.tagName} ${one.textContent.trim().slice(0, 30)}: ${ratio.toFixed(2)}`);
  });
  return [...found];
})()"""  # noqa: E501

# places that fonts do not move: left edge and width of every figure and table, height of every plot
BOXES = """Object.fromEntries([...document.querySelectorAll("figure, .wide")].filter((one) => one.getBoundingClientRect().width)
  .map((one) => {
    const box = one.getBoundingClientRect(), plot = one.querySelector(".plot");
    const name = (one.querySelector("h3") || one.closest("section").querySelector("h2")).textContent;
    return [name, [box.left, box.width, plot ? plot.clientHeight : 0].map(Math.round)];
  }))"""  # noqa: E501

# what the tabulator key leads to, and whether its focus is seen
FOCUS = """(() => { const one = document.activeElement, style = getComputedStyle(one);
  return { what: `${one.tagName} ${(one.getAttribute("aria-label") || one.textContent).trim().slice(0, 40)}`,
    seen: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2 }; })()"""
