/** Colours of scores and strokes of operations. The scale is viridis: its brightness rises evenly, so that it
 *  reads the same to people who tell few colours apart, and in grey. */

import { number, operation } from "./format.js";
import { el, svg } from "./dom.js";

const VIRIDIS = ["#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"];
const STEPS = 64;

function channels(text) {
  return [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16));
}

function mixed(share) {
  const place = Math.min(0.9999, Math.max(0, share)) * (VIRIDIS.length - 1);
  const [one, two] = [channels(VIRIDIS[Math.floor(place)]), channels(VIRIDIS[Math.floor(place) + 1])];
  const part = place - Math.floor(place);
  return `rgb(${one.map((value, at) => Math.round(value + (two[at] - value) * part)).join(" ")})`;
}

// The ends that the background would swallow are left out.
const RAMPS = {
  light: Array.from({ length: STEPS }, (_, step) => mixed((step / (STEPS - 1)) * 0.96)),
  dark: Array.from({ length: STEPS }, (_, step) => mixed(0.1 + (step / (STEPS - 1)) * 0.9)),
};

/** The colours from the worst to the best. */
export function ramp(dark) {
  return dark ? RAMPS.dark : RAMPS.light;
}

/** Where a score stands between the worst (0) and the best (1) of sorted scores: by its rank, or by its value. */
export function standing(score, scores, colouring) {
  if (scores.length < 2) return 1;
  if (colouring === "value") {
    const [low, high] = [scores[0], scores[scores.length - 1]];
    return high > low ? (score - low) / (high - low) : 1;
  }
  let [low, high] = [0, scores.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (scores[middle] < score) low = middle + 1;
    else high = middle;
  }
  return Math.min(1, low / (scores.length - 1));
}

/** The step of the ramp for each node's score; -1 where it has none. */
export function steps(tree, verifier, colouring) {
  const scores = tree.scale(verifier);
  const found = new Int8Array(tree.nodes.length).fill(-1);
  for (const node of tree.nodes) {
    const score = node?.s?.[verifier];
    if (score !== null && score !== undefined) found[node.i] = Math.round(standing(score, scores, colouring) * (STEPS - 1));
  }
  return found;
}

// Operations differ in dashes as well as in colour.
const STROKES = {
  denoise: { dash: [], light: "#7a8494", dark: "#78839a" },
  renoise: { dash: [5, 4], light: "#b3561f", dark: "#e39a63" },
  mix: { dash: [1.5, 3.5], light: "#1d7a72", dark: "#5cc4b8" },
};
const OTHER = { dash: [9, 3, 2, 3], light: "#7b4fa3", dark: "#b899dd" };

/** How the edge of an operation is drawn. */
export function stroke(op, dark) {
  const found = STROKES[op] ?? OTHER;
  return { dash: found.dash, colour: dark ? found.dark : found.light };
}

/** The scale with its scores. */
export function legend({ tree, verifier, colouring, dark }) {
  const scores = tree.scale(verifier);
  const bar = el("canvas", { width: STEPS, height: 1, class: "legend-bar", role: "img", "aria-label": "Colours from the lowest to the highest score" });
  const pen = bar.getContext("2d");
  ramp(dark).forEach((colour, at) => {
    pen.fillStyle = colour;
    pen.fillRect(at, 0, 1, 1);
  });
  const ticks = [0, 0.5, 1].map((share) => {
    if (!scores.length) return el("span", {}, "\u2013");
    if (colouring === "value") return el("span", {}, number(scores[0] + share * (scores[scores.length - 1] - scores[0]), 3));
    return el("span", {}, number(scores[Math.round(share * (scores.length - 1))], 3));
  });
  return [el("div", { class: "legend-ticks" }, ticks), bar];
}

/** What edges and marks mean. */
export function marks({ tree, dark }) {
  const edges = tree.operations.filter((op) => op !== "draw" && op !== "noise").map((op) => {
    const { dash, colour } = stroke(op, dark);
    const line = svg("line", { x1: 1, y1: 5, x2: 27, y2: 5, stroke: colour, "stroke-width": 2, "stroke-dasharray": dash.length ? dash.join(" ") : null });
    return el("li", {}, svg("svg", { viewBox: "0 0 28 10", width: 28, height: 10, "aria-hidden": "true" }, line), operation(op));
  });
  const star = svg("svg", { viewBox: "0 0 20 20", width: 14, height: 14, "aria-hidden": "true", class: "legend-star" }, svg("path", { d: "M10 1l2.6 6 6.4.6-4.9 4.3 1.5 6.3L10 14.8l-5.6 3.4 1.5-6.3L1 7.6 7.4 7z" }));
  return [...edges, el("li", {}, star, "best")];
}
