/** The drawing of the tree. Only what is in view is drawn; from far away nodes become ticks, the best of a pixel in front. */

import { cell, whenLoaded } from "./atlas.js";
import { ramp, steps, stroke } from "./colour.js";
import { foldedNodes, isLarge, place } from "./layout.js";
import { state, watch } from "./state.js";
import { byId } from "./dom.js";

const NODE = 50; // side of a node with a picture, at zoom 1
const PLAIN = 20; // of one without
const MARGIN = 44;
const LARGEST = 4;

const canvas = byId("tree");
const pen = canvas.getContext("2d");

/** What of the tree is in view: zoom along siblings and along generations, and where the origin is. */
export const view = { zoom: 1, left: 0, top: 0, free: false };
let places = null;
let levels = null;
let theme = null;
let frame = 0;
let painted = false;
let [width, height] = [0, 0];

export function currentPlaces() {
  return places;
}

// Generations are not squeezed as much as siblings: a broad tree fills the height as well.
function steepness(zoom) {
  return Math.max(zoom, Math.min(1, (span()[1] - 2 * MARGIN) / Math.max(places.deep, 1)));
}

/** The lengths of the view along siblings and along generations. */
function span() {
  return state.across ? [height, width] : [width, height];
}

function onScreen(index) {
  const breadth = places.breadth[index] * view.zoom + view.left;
  const depth = places.depth[index] * steepness(view.zoom) + view.top;
  return state.across ? [depth, breadth] : [breadth, depth];
}

/** Where a node is drawn, in CSS pixels of the canvas; null where it is folded away. */
export function locate(index) {
  if (!places || Number.isNaN(places.breadth[index] ?? NaN)) return null;
  const [x, y] = onScreen(index);
  return { x, y, side: side(state.tree.at(index)) };
}

function side(node) {
  return (isLarge(node) ? NODE : PLAIN) * view.zoom;
}

/** The node at a point of the canvas; with a little mercy for small ones. */
export function nodeAt(x, y) {
  if (!places) return null;
  let [found, nearest] = [null, Infinity];
  for (const node of places.shown) {
    if (hidden(node)) continue;
    const [left, top] = onScreen(node.i);
    const reach = Math.max(side(node) / 2, 7);
    const away = Math.max(Math.abs(x - left), Math.abs(y - top));
    if (away <= reach && away < nearest) [found, nearest] = [node, away];
  }
  return found;
}

function hidden(node) {
  return state.time !== null && node.i >= state.time;
}

/** Show the whole tree. */
export function fit() {
  if (!places || !width) return;
  view.free = false;
  const [broad, long] = span();
  view.zoom = Math.min(1.15, (broad - 2 * MARGIN) / Math.max(places.high - places.low, 1), 1e3);
  view.zoom = Math.max(view.zoom, 1e-4);
  if (places.deep * view.zoom > long - 2 * MARGIN) view.zoom = Math.max(view.zoom * 0.2, Math.min(view.zoom, (long - 2 * MARGIN) / places.deep));
  view.left = broad / 2 - ((places.low + places.high) / 2) * view.zoom;
  view.top = Math.max(MARGIN, (long - places.deep * steepness(view.zoom)) / 2);
  draw();
}

/** Zoom by a factor around the chosen node if it is in view, else around the middle. */
export function zoom(factor) {
  const spot = state.node === null ? null : locate(state.node);
  if (spot && spot.x >= 0 && spot.x <= width && spot.y >= 0 && spot.y <= height) zoomAt(factor, spot.x, spot.y);
  else zoomAt(factor, width / 2, height / 2);
}

/** Zoom by a factor around a point of the canvas. */
export function zoomAt(factor, x, y) {
  if (!places) return;
  const [breadth, depth] = state.across ? [y, x] : [x, y];
  const before = steepness(view.zoom);
  const smallest = Math.min(0.5, span()[0] / Math.max(places.high - places.low, 1) / 2);
  const wanted = Math.min(LARGEST, Math.max(smallest, view.zoom * factor));
  view.left = breadth - ((breadth - view.left) * wanted) / view.zoom;
  view.zoom = wanted;
  view.top = depth - ((depth - view.top) * steepness(wanted)) / before;
  view.free = true;
  draw();
}

/** Move by CSS pixels. */
export function panBy(x, y) {
  view.left += state.across ? y : x;
  view.top += state.across ? x : y;
  view.free = true;
  draw();
}

/** Move so that a node is in view. */
export function reveal(index, close = false) {
  const spot = width ? locate(index) : null;
  if (!spot) return;
  if (close && view.zoom < 0.6) {
    zoomAt(0.8 / view.zoom, spot.x, spot.y);
    return reveal(index);
  }
  const keep = MARGIN + 20;
  const x = spot.x < keep ? keep - spot.x : Math.min(0, width - keep - spot.x);
  const y = spot.y < keep ? keep - spot.y : Math.min(0, height - keep - spot.y);
  if (x || y) panBy(x, y);
}

/** Draw at the next frame. */
export function draw() {
  if (!frame) frame = requestAnimationFrame(paint);
}

function paint() {
  frame = 0;
  if (!places || !state.tree || !theme || state.view !== "tree") return;
  const scale = devicePixelRatio || 1;
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.fillStyle = theme.ground;
  pen.fillRect(0, 0, width, height);
  const steep = steepness(view.zoom);
  const spots = visible(steep);
  edges(steep);
  trail(state.tree.path(state.tree.bestAt(state.time)?.i), theme.best, 2);
  trail(state.tree.path(state.node), theme.accent, 2.5);
  if (NODE * view.zoom < 9) ticks(spots, steep);
  else nodes(spots);
  marks();
  if (!painted) {
    painted = true;
    performance.mark("tsdiff-painted");
  }
}

/** Nodes in view and a little beyond, row by row. */
function visible(steep) {
  const found = [];
  const [broad, long] = span();
  const rim = NODE * view.zoom + 12;
  for (const row of places.rows) {
    if (!row.length) continue;
    const depth = places.depth[row[0].i] * steep + view.top;
    if (depth < -rim || depth > long + rim) continue;
    let [low, high] = [0, row.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (places.breadth[row[middle].i] * view.zoom + view.left < -rim) low = middle + 1;
      else high = middle;
    }
    for (let at = low; at < row.length; at += 1) {
      const breadth = places.breadth[row[at].i] * view.zoom + view.left;
      if (breadth > broad + rim) break;
      if (!hidden(row[at])) found.push(row[at]);
    }
  }
  return found;
}

function edges(steep) {
  const byKind = new Map();
  const { breadth, depth, rows } = places;
  const [broad, long] = span();
  const far = view.zoom < 0.15;
  for (let at = 1; at < rows.length; at += 1) {
    const row = rows[at];
    const end = depth[row[0].i] * steep + view.top;
    const start = depth[rows[at - 1][0].i] * steep + view.top;
    if (end < 0 || start > long) continue;
    let [lastOne, lastTwo] = [NaN, NaN];
    for (const node of row) {
      if (hidden(node)) continue;
      const one = breadth[node.p] * view.zoom + view.left;
      const two = breadth[node.i] * view.zoom + view.left;
      if ((one < 0 && two < 0) || (one > broad && two > broad)) continue;
      if (far) {
        // Siblings stand in order: edges that are one line from far away come one after the other.
        if (Math.abs(one - lastOne) < 1.5 && Math.abs(two - lastTwo) < 1) continue;
        [lastOne, lastTwo] = [one, two];
      }
      let list = byKind.get(node.op);
      if (!list) byKind.set(node.op, (list = []));
      list.push(one, start, two, end);
    }
  }
  for (const [op, list] of byKind) {
    const { dash, colour } = stroke(op, state.dark);
    pen.strokeStyle = colour;
    pen.globalAlpha = far ? 0.3 : state.found ? 0.35 : 0.75;
    pen.lineWidth = far ? 0.75 : Math.min(1.75, Math.max(1, 1.4 * view.zoom));
    pen.setLineDash(far ? [] : dash);
    pen.beginPath();
    for (let at = 0; at < list.length; at += 4) curve(list[at], list[at + 1], list[at + 2], list[at + 3], far);
    pen.stroke();
  }
  pen.setLineDash([]);
  pen.globalAlpha = 1;
}

function curve(one, start, two, end, straight = false) {
  const middle = (start + end) / 2;
  if (state.across) {
    pen.moveTo(start, one);
    if (straight) pen.lineTo(end, two);
    else pen.bezierCurveTo(middle, one, middle, two, end, two);
  } else {
    pen.moveTo(one, start);
    if (straight) pen.lineTo(two, end);
    else pen.bezierCurveTo(one, middle, two, middle, two, end);
  }
}

/** The way from the root to a node, over its edges. */
function trail(path, colour, thick) {
  const steep = steepness(view.zoom);
  pen.strokeStyle = colour;
  pen.lineWidth = thick;
  pen.beginPath();
  for (const node of path) {
    if (node.p === null || hidden(node) || Number.isNaN(places.breadth[node.i])) continue;
    const [one, two] = [node.p, node.i].map((index) => places.breadth[index] * view.zoom + view.left);
    const [start, end] = [node.p, node.i].map((index) => places.depth[index] * steep + view.top);
    curve(one, start, two, end);
  }
  pen.stroke();
}

/** From far away: a tick for each node, one for each pixel, the best in front. Nodes come row by row, in order. */
function ticks(spots, steep) {
  const lists = new Map();
  let [lastAlong, lastDown, best] = [NaN, NaN, -3];
  const flush = () => {
    if (best === -3) return;
    let list = lists.get(best);
    if (!list) lists.set(best, (list = []));
    if (state.across) list.push(lastDown, lastAlong);
    else list.push(lastAlong, lastDown);
  };
  for (const node of spots) {
    const along = Math.round(places.breadth[node.i] * view.zoom + view.left);
    const down = Math.round(places.depth[node.i] * steep + view.top);
    const level = state.found && !state.found.has(node.i) ? -2 : levels[node.i];
    if (along !== lastAlong || down !== lastDown) {
      flush();
      [lastAlong, lastDown, best] = [along, down, level];
    } else if (level > best) best = level;
  }
  flush();
  const thin = Math.max(1.6, NODE * view.zoom);
  const long = Math.max(7, thin * 1.2);
  const [wide, high] = state.across ? [long, thin] : [thin, long];
  for (const level of [...lists.keys()].sort((one, two) => one - two)) {
    const list = lists.get(level);
    pen.fillStyle = level < 0 ? theme.faint : ramp(state.dark)[level];
    pen.globalAlpha = level === -2 ? 0.35 : 1;
    const [w, h] = level < 0 ? [wide * 0.75, high * 0.5] : [wide, high];
    for (let at = 0; at < list.length; at += 2) pen.fillRect(list[at] - w / 2, list[at + 1] - h / 2, w, h);
  }
  pen.globalAlpha = 1;
}

function nodes(spots) {
  pen.imageSmoothingQuality = "medium";
  for (const node of spots) {
    const [x, y] = onScreen(node.i);
    one(node, x, y, side(node));
  }
  pen.globalAlpha = 1;
}

function one(node, x, y, size) {
  const level = levels[node.i];
  const colour = level < 0 ? theme.faint : ramp(state.dark)[level];
  pen.globalAlpha = state.found && !state.found.has(node.i) ? 0.18 : 1;
  const half = size / 2;
  const picture = size >= 14 ? cell(node.th) : null;
  const round = Math.min(6, size * 0.16);
  pen.beginPath();
  if (level < 0 && !picture) pen.arc(x, y, Math.max(2, half * 0.62), 0, 2 * Math.PI);
  else pen.roundRect(x - half, y - half, size, size, round);
  if (picture) {
    const rim = Math.min(4.5, Math.max(2, size * 0.085));
    pen.fillStyle = colour;
    pen.fill();
    pen.fillStyle = theme.sunk;
    pen.fillRect(x - half + rim, y - half + rim, size - 2 * rim, size - 2 * rim);
    pen.drawImage(picture.image, picture.x, picture.y, picture.size, picture.size, x - half + rim, y - half + rim, size - 2 * rim, size - 2 * rim);
  } else if (node.d) {
    pen.fillStyle = theme.ground;
    pen.fill();
    pen.strokeStyle = colour;
    pen.lineWidth = 2;
    pen.stroke();
  } else {
    pen.fillStyle = colour;
    pen.fill();
  }
  if (level >= 0) {
    pen.strokeStyle = theme.rim;
    pen.lineWidth = 1;
    pen.stroke();
  }
  if (node.f !== null && node.f !== undefined) cross(x, y, half);
  if (places.folded.has(node.i) && node.children.length) more(node, x, y, half);
}

function cross(x, y, half) {
  const arm = Math.max(3, half * 0.6);
  pen.strokeStyle = theme.bad;
  pen.lineWidth = 2;
  pen.beginPath();
  pen.moveTo(x - arm, y - arm);
  pen.lineTo(x + arm, y + arm);
  pen.moveTo(x + arm, y - arm);
  pen.lineTo(x - arm, y + arm);
  pen.stroke();
}

/** A folded subtree: how many nodes are behind this one. */
function more(node, x, y, half) {
  if (view.zoom < (isLarge(node) ? 0.5 : 1)) return;
  const text = `+${node.below}`;
  pen.font = `600 11px ${theme.font}`;
  const long = pen.measureText(text).width + 12;
  const [left, top] = state.across ? [x + half + 5, y - 9] : [x - long / 2, y + half + 5];
  pen.fillStyle = theme.panel;
  pen.strokeStyle = theme.line;
  pen.lineWidth = 1;
  pen.beginPath();
  pen.roundRect(left, top, long, 18, 9);
  pen.fill();
  pen.stroke();
  pen.fillStyle = theme.ink;
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  pen.fillText(text, left + long / 2, top + 9.5);
}

/** Rings around the chosen node, the one that it is compared with, and the best. */
function marks() {
  const best = state.tree.bestAt(state.time);
  ring(best?.i, theme.best, 2.5, 2.5);
  if (state.other !== state.node) ring(state.other, theme.accent, 2, 4, [4, 3]);
  ring(state.node, theme.accent, 3, 3.5);
  const spot = best && locate(best.i);
  if (spot && view.zoom > 0.3) star(spot.x + spot.side / 2, spot.y - spot.side / 2);
}

function ring(index, colour, thick, away, dash = []) {
  const spot = index === null || index === undefined ? null : locate(index);
  if (!spot || hidden(state.tree.at(index))) return;
  const half = Math.max(5, spot.side / 2) + away;
  pen.strokeStyle = colour;
  pen.lineWidth = thick;
  pen.setLineDash(dash);
  pen.beginPath();
  pen.roundRect(spot.x - half, spot.y - half, 2 * half, 2 * half, Math.min(9, half * 0.4));
  pen.stroke();
  pen.setLineDash([]);
}

function star(x, y) {
  pen.beginPath();
  for (let point = 0; point < 10; point += 1) {
    const reach = point % 2 ? 3.6 : 8.2;
    const turn = (point * Math.PI) / 5 - Math.PI / 2;
    pen.lineTo(x + reach * Math.cos(turn), y + reach * Math.sin(turn));
  }
  pen.closePath();
  pen.fillStyle = theme.best;
  pen.strokeStyle = theme.ground;
  pen.lineWidth = 2;
  pen.stroke();
  pen.fill();
}

function readTheme() {
  const style = getComputedStyle(document.documentElement);
  const read = (name) => style.getPropertyValue(name).trim();
  theme = { ground: read("--ground"), panel: read("--panel"), sunk: read("--sunk"), ink: read("--ink"), line: read("--line"), faint: read("--dot"), rim: read("--rim"), accent: read("--accent"), best: read("--best"), bad: read("--bad"), font: getComputedStyle(document.body).fontFamily };
}

function resize() {
  const box = canvas.parentElement.getBoundingClientRect();
  if (!box.width || !box.height) return;
  const scale = devicePixelRatio || 1;
  [width, height] = [box.width, box.height];
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  if (view.free) draw();
  else fit();
}

/** Lay the tree out anew; the view stays where the reader has put it. */
function arrange() {
  if (!state.tree?.size) {
    places = null;
    pen.clearRect(0, 0, canvas.width, canvas.height);
    return;
  }
  const anchor = view.free && places ? anchored() : null;
  places = place(state.tree, foldedNodes(state.tree, state));
  levels = steps(state.tree, state.verifier, state.colouring);
  if (!view.free) fit();
  else if (anchor) hold(anchor);
  draw();
}

/** A node that should stay where it is while others come and go: the chosen one, else one in the middle. */
function anchored() {
  const at = (index) => (Number.isNaN(places.breadth[index] ?? NaN) ? null : { index, spot: onScreen(index) });
  const chosen = state.node === null ? null : at(state.node);
  if (chosen) return chosen;
  const node = nodeNear(width / 2, height / 2);
  return node ? at(node.i) : null;
}

function nodeNear(x, y) {
  let [found, nearest] = [null, Infinity];
  for (const node of places.shown) {
    const [left, top] = onScreen(node.i);
    const away = (x - left) ** 2 + (y - top) ** 2;
    if (away < nearest) [found, nearest] = [node, away];
  }
  return found;
}

function hold({ index, spot }) {
  if (Number.isNaN(places.breadth[index] ?? NaN)) return;
  const [x, y] = onScreen(index);
  panBy(spot[0] - x, spot[1] - y);
}

watch(["runId", "across"], () => {
  view.free = false;
  if (places) arrange();
});
watch(["version", "fold", "opened", "closed"], arrange);
watch(["verifier", "colouring"], () => {
  if (state.tree?.size && places) levels = steps(state.tree, state.verifier, state.colouring);
  draw();
});
watch(["node"], () => {
  if (places && state.node !== null && Number.isNaN(places.breadth[state.node] ?? NaN)) arrange();
  if (state.node !== null) reveal(state.node);
  draw();
});
watch(["time", "found", "other", "view"], draw);
watch(["dark"], () => {
  readTheme();
  draw();
});
whenLoaded(draw);
readTheme();
new ResizeObserver(resize).observe(canvas.parentElement);
