// Line charts as SVG: a title and a description for who does not see them.

import { el, number } from "./dom.js";

const HEIGHT = 200;
const LEFT = 46;
const BOTTOM = 22;
const MAX_POINTS = 400;

const svg = (tag, attributes, ...children) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
};

// At most MAX_POINTS: of neighbours the mean, so that what is drawn costs the same however long a job is.
export function thin(points) {
  if (points.length <= MAX_POINTS) return points;
  const size = points.length / MAX_POINTS;
  return Array.from({ length: MAX_POINTS }, (_, i) => {
    const some = points.slice(Math.floor(i * size), Math.max(Math.floor((i + 1) * size), Math.floor(i * size) + 1));
    return [some[some.length - 1][0], some.reduce((sum, point) => sum + point[1], 0) / some.length];
  });
}

function ticks(low, high, count) {
  const step = (high - low) / count || 1;
  const unit = 10 ** Math.floor(Math.log10(step));
  const nice = [1, 2, 5, 10].map((k) => k * unit).find((size) => size >= step);
  const found = [];
  for (let at = Math.ceil(low / nice) * nice; at <= high + nice * 1e-6 && found.length < 20; at += nice) found.push(at);
  return found;
}

// series: [{name, points: [[x, y], ...]}], marks: [{x, text}]; xLabel(x) -> text under the axis.
export function lineChart(node, { title, series, marks = [], xLabel = number }) {
  const drawn = series.map((one) => ({ ...one, points: thin(one.points.filter(([, y]) => Number.isFinite(y))) }));
  const all = drawn.flatMap((one) => one.points);
  // As wide as there is room, so that letters keep their size.
  const WIDTH = Math.max(240, node.clientWidth);
  if (!all.length) return node.replaceChildren();
  const xs = all.map(([x]) => x);
  const ys = all.map(([, y]) => y);
  const [x0, x1] = [Math.min(...xs), Math.max(...xs)];
  let [y0, y1] = [Math.min(...ys), Math.max(...ys)];
  if (y1 - y0 < 1e-9) [y0, y1] = [y0 - 0.5, y1 + 0.5];
  const x = (value) => LEFT + ((value - x0) / (x1 - x0 || 1)) * (WIDTH - LEFT - 12);
  const y = (value) => HEIGHT - BOTTOM - ((value - y0) / (y1 - y0)) * (HEIGHT - BOTTOM - 10);
  const root = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
  const name = svg("title", {});
  name.textContent = title;
  const told = svg("desc", {});
  told.textContent = drawn.map((one) => `${one.name}: from ${number(one.points[0]?.[1])} to ${number(one.points.at(-1)?.[1])}`).join("; ");
  root.append(name, told);
  for (const at of ticks(y0, y1, 4)) {
    const label = svg("text", { class: "axis", x: LEFT - 6, y: y(at) + 4, "text-anchor": "end" });
    label.textContent = number(at, 3);
    root.append(svg("line", { class: "grid", x1: LEFT, x2: WIDTH - 12, y1: y(at), y2: y(at) }), label);
  }
  for (const at of x1 > x0 ? [x0, x1] : [x0]) {
    const label = svg("text", { class: "axis", x: x(at), y: HEIGHT - 6, "text-anchor": at === x0 ? "start" : "end" });
    label.textContent = xLabel(at);
    root.append(label);
  }
  for (const mark of marks) {
    const label = svg("text", { class: "axis", x: x(mark.x), y: 10, "text-anchor": "middle" });
    label.textContent = mark.text;
    root.append(svg("line", { class: "mark", x1: x(mark.x), x2: x(mark.x), y1: 12, y2: HEIGHT - BOTTOM }), label);
  }
  drawn.forEach((one, i) => {
    const path = one.points.map(([px, py], at) => `${at ? "L" : "M"}${x(px).toFixed(1)} ${y(py).toFixed(1)}`).join("");
    // A line of one point would not be seen.
    root.append(svg("path", { class: `s${(i % 6) + 1}`, d: one.points.length === 1 ? `${path}h4` : path }));
  });
  const legend = el("ul", { class: "legend" }, drawn.map((one, i) => el("li", { class: `s${(i % 6) + 1}` }, one.name)));
  node.replaceChildren(root, ...(drawn.length > 1 ? [legend] : []));
}
