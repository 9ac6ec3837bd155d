/** The best score so far against network evaluations. */

import { count, number } from "./format.js";
import { choose, state, watch } from "./state.js";
import { byId, el, svg } from "./dom.js";

const section = byId("curve");
const BOX = { width: 860, height: 420, left: 76, right: 24, top: 20, bottom: 48 };
let data = null;
let asked = "";

async function render() {
  if (state.view !== "curve" || !state.tree) return;
  const key = `${state.runId} ${state.version}`;
  if (asked !== key) {
    asked = key;
    const mine = state.runId;
    try {
      const found = await state.source.curve(state.runId);
      if (mine !== state.runId) return;
      data = found;
    } catch (error) {
      section.replaceChildren(el("p", { class: "bad" }, error.message));
      return;
    }
  }
  if (data) show();
}

function show() {
  const points = data.points.filter((point, at) => !at || point[1] > data.points[at - 1][1]); // the last may only say where it ends
  const first = state.run?.baseline?.scores?.[data.verifier] ?? null;
  const head = el("div", { class: "section-head" }, el("h2", {}, "Best score against network evaluations"), el("p", { class: "quiet" }, data.verifier));
  if (!points.length) {
    section.replaceChildren(head, el("p", { class: "quiet" }, "No sample is finished and scored yet."));
    return;
  }
  section.replaceChildren(head, chart(points, first), table(points, first));
}

/** Round numbers that span a range. */
function ticks(low, high, about) {
  const rough = (high - low) / about || 1;
  const size = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * size).find((candidate) => candidate >= rough);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-9; at += step) found.push(Math.abs(at) < step * 1e-9 ? 0 : at);
  return found;
}

function chart(points, first) {
  const spent = Math.max(data.points[data.points.length - 1][0], ...state.tree.nodes.slice(-1).map((node) => node?.n ?? 0), 1);
  const scores = points.map((point) => point[1]).concat(first === null ? [] : [first]);
  let [low, high] = [Math.min(...scores), Math.max(...scores)];
  const air = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  [low, high] = [low - air, high + air];
  const x = (nfe) => BOX.left + (nfe / spent) * (BOX.width - BOX.left - BOX.right);
  const y = (score) => BOX.height - BOX.bottom - ((score - low) / (high - low)) * (BOX.height - BOX.top - BOX.bottom);
  let way = `M${x(points[0][0])} ${y(points[0][1])}`;
  for (const [nfe, score] of points.slice(1)) way += `H${x(nfe)}V${y(score)}`;
  way += `H${x(spent)}`;
  const foot = BOX.height - BOX.bottom;
  return el("figure", { class: "chart" },
    svg("svg", { viewBox: `0 0 ${BOX.width} ${BOX.height}`, role: "img", "aria-label": `The best score rises from ${number(points[0][1])} to ${number(points[points.length - 1][1])} in ${count(spent)} network evaluations` },
      ticks(low, high, 5).map((score) => [svg("line", { class: "grid", x1: BOX.left, x2: BOX.width - BOX.right, y1: y(score), y2: y(score) }), svg("text", { class: "tick", x: BOX.left - 10, y: y(score) + 4, "text-anchor": "end" }, number(score))]),
      ticks(0, spent, 7).map((nfe) => svg("text", { class: "tick", x: x(nfe), y: foot + 20, "text-anchor": "middle" }, count(nfe))),
      svg("line", { class: "axis", x1: BOX.left, x2: BOX.width - BOX.right, y1: foot, y2: foot }),
      svg("text", { class: "tick", x: (BOX.left + BOX.width - BOX.right) / 2, y: BOX.height - 8, "text-anchor": "middle" }, "network evaluations"),
      first === null ? null : [svg("line", { class: "first", x1: BOX.left, x2: BOX.width - BOX.right, y1: y(first), y2: y(first) }), svg("text", { class: "tick", x: BOX.width - BOX.right, y: y(first) - 7, "text-anchor": "end" }, `one plain sample, ${number(first)}`)],
      svg("path", { class: "fill", d: `${way}V${foot}H${x(points[0][0])}Z` }),
      svg("path", { class: "rise-line", d: way }),
      points.map(([nfe, score, node]) => dot(x(nfe), y(score), nfe, score, node))));
}

function dot(x, y, nfe, score, node) {
  const chosen = node === state.node;
  const mark = svg("circle", { cx: x, cy: y, r: chosen ? 7 : 5, class: chosen ? "dot chosen" : "dot", onclick: () => choose(node) });
  mark.append(svg("title", {}, `Node ${node}: ${number(score)} after ${count(nfe)} evaluations`));
  return mark;
}

function table(points, first) {
  const rows = [...points].reverse().slice(0, 40);
  return el("table", { class: "versus steps" },
    el("thead", {}, el("tr", {}, ["Evaluations", "Best so far", first === null ? null : "Against one sample", "Node"].filter(Boolean).map((name) => el("th", { scope: "col" }, name)))),
    el("tbody", {}, rows.map(([nfe, score, node]) => el("tr", {}, el("td", { class: "figure" }, count(nfe)), el("td", { class: "figure" }, number(score)),
      first === null ? null : el("td", { class: "figure" }, `${score > first ? "+" : ""}${number(score - first)}`),
      el("td", {}, el("button", { type: "button", class: "link", onclick: () => choose(node) }, `node ${node}`))))));
}

watch(["view", "version", "runId", "tree", "run", "node"], render);
