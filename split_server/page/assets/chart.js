// Charts as plain SVG: a line over rounds, bars of bytes, a confusion matrix, a QR code.

import { h, megabytes } from "./dom.js";

const WIDTH = 480, HEIGHT = 230, LEFT = 58, RIGHT = 14, TOP = 22, BOTTOM = 34;

// Draw values over rounds.
//   points: [{round, value, mark}], second: the same, dashed; levels: [{value, name}], dotted.
//   show: writes a value; label: what a screen reader says.
export function lines({ points, second = [], levels = [], show, label, top }) {
  const all = [...points, ...second];
  if (!all.length) return h("p", { class: "soft" }, "Nothing is measured yet.");
  const rounds = all.map((point) => point.round);
  const first = Math.min(...rounds), last = Math.max(first + 1, ...rounds);
  const highest = top ?? 1.1 * Math.max(...all.map((p) => p.value), ...levels.map((l) => l.value));
  const x = (round) => LEFT + (WIDTH - LEFT - RIGHT) * (round - first) / (last - first);
  const y = (value) => HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / (highest || 1);
  const path = (series) => "M" + series.map((p) => `${x(p.round)},${y(p.value)}`).join("L");
  const parts = [];
  for (let step = 0; step <= 4; step += 1) {
    const value = highest * step / 4;
    parts.push(h("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }),
      h("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, show(value, true)));
  }
  const every = Math.ceil((last - first + 1) / 10);
  for (let round = first; round <= last; round += every) {
    parts.push(h("text", { x: x(round), y: HEIGHT - 14, "text-anchor": "middle" }, String(round)));
  }
  parts.push(h("text", { x: WIDTH - RIGHT, y: HEIGHT - 1, "text-anchor": "end" }, "round"));
  for (const level of levels) {
    parts.push(h("line", { class: "level", x1: LEFT, x2: WIDTH - RIGHT, y1: y(level.value),
      y2: y(level.value) }),
    h("text", { x: WIDTH - RIGHT, y: y(level.value) + 14, "text-anchor": "end" },
      `${level.name} ${show(level.value)}`));
  }
  if (second.length) parts.push(h("path", { class: "second", d: path(second) }));
  if (points.length) {
    parts.push(h("path", { class: "line", d: path(points) }));
    for (const point of points) {
      parts.push(h("circle", { class: "dot", cx: x(point.round), cy: y(point.value), r: 4 },
        h("title", {}, `round ${point.round}: ${show(point.value)}`)));
    }
    const end = points.at(-1), right = x(end.round) > WIDTH / 2;
    parts.push(h("text", { class: "strong", x: x(end.round), y: y(end.value) - 9,
      "text-anchor": right ? "end" : "start" }, show(end.value)));
  }
  return h("svg", { class: "chart", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img",
    "aria-label": label }, parts);
}

// Draw one bar for each row [name, bytes, class], on one linear scale from 0.
export function bars(rows, scale) {
  const most = scale ?? Math.max(1, ...rows.map(([, bytes]) => bytes));
  return h("div", { class: "bars" }, rows.flatMap(([name, bytes, kind]) => [
    h("span", {}, name),
    h("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" },
      h("rect", { class: kind, width: Math.max(0.4, 100 * bytes / most), height: 10, rx: 1 })),
    h("span", { class: "number" }, megabytes(bytes)),
  ]));
}

// Draw a QR code from rows of 0 and 1; scanners need the white margin.
export function qrCode(rows) {
  const size = rows.length + 8;
  const cells = rows.flatMap((row, y) =>
    [...row].flatMap((cell, x) => (cell === "1" ? [`M${x + 4},${y + 4}h1v1h-1z`] : [])));
  return h("svg", { class: "code", viewBox: `0 0 ${size} ${size}`, role: "img",
    "aria-label": "QR code of the command", "shape-rendering": "crispEdges" },
  h("path", { d: cells.join(""), fill: "#000000" }));
}

// Show how often images of a class (row) are predicted as another (column).
export function matrix(classes, cells) {
  const names = classes.map((each) => each.name);
  const count = new Map(cells.map(([label, predicted, n]) => [`${label},${predicted}`, n]));
  const head = h("tr", {}, h("th", {}, "is ↓ said →"),
    names.map((name) => h("th", { class: "number", scope: "col" }, name)),
    h("th", { class: "number", scope: "col" }, "found"));
  const rows = classes.map((each, label) => h("tr", {}, h("th", { scope: "row" }, each.name),
    names.map((_, predicted) => h("td", { class: "number" },
      String(count.get(`${label},${predicted}`) ?? "·"))),
    h("td", { class: "number" }, each.recall == null ? "–" : `${(100 * each.recall).toFixed(0)} %`)));
  return h("div", { class: "scroll" }, h("table", {}, h("thead", {}, head), h("tbody", {}, rows)));
}
