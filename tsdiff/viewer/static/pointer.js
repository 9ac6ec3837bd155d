/** Mouse, pen and fingers on the tree: drag to move, wheel or pinch to zoom, press to choose. */

import { currentPlaces, draw, nodeAt, panBy, zoomAt } from "./canvas.js";
import { choose, state, change } from "./state.js";
import { number, operation } from "./format.js";
import { byId, el } from "./dom.js";

const canvas = byId("tree");
const tip = byId("tip");
const fingers = new Map();
let moved = 0;

function spot(event) {
  const box = canvas.getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top];
}

canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  fingers.set(event.pointerId, spot(event));
  if (fingers.size === 1) moved = 0;
  tip.hidden = true;
});

canvas.addEventListener("pointermove", (event) => {
  const [x, y] = spot(event);
  const before = fingers.get(event.pointerId);
  if (!before) {
    hover(x, y);
    return;
  }
  fingers.set(event.pointerId, [x, y]);
  const others = [...fingers].filter(([id]) => id !== event.pointerId).map(([, place]) => place);
  if (others.length) {
    const [ox, oy] = others[0];
    const factor = Math.hypot(x - ox, y - oy) / Math.max(1, Math.hypot(before[0] - ox, before[1] - oy));
    zoomAt(factor, (x + ox) / 2, (y + oy) / 2);
    moved += 10;
    return;
  }
  moved += Math.abs(x - before[0]) + Math.abs(y - before[1]);
  if (moved > 4) {
    canvas.classList.add("moving");
    panBy(x - before[0], y - before[1]);
  }
});

canvas.addEventListener("pointerup", (event) => {
  const single = fingers.size === 1;
  fingers.delete(event.pointerId);
  canvas.classList.remove("moving");
  if (!single || moved > 4) return;
  const node = nodeAt(...spot(event));
  if (!node) {
    choose(null);
    return;
  }
  if (currentPlaces().folded.has(node.i)) unfold(node.i);
  choose(node.i);
});

canvas.addEventListener("pointercancel", (event) => fingers.delete(event.pointerId));
canvas.addEventListener("pointerleave", () => {
  tip.hidden = true;
});

canvas.addEventListener("dblclick", (event) => {
  const node = nodeAt(...spot(event));
  if (node) toggleFold(node.i);
});

canvas.addEventListener(
  "wheel",
  (event) => {
    event.preventDefault();
    const [x, y] = spot(event);
    if (event.shiftKey) panBy(-event.deltaY - event.deltaX, 0);
    else zoomAt(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.0016)), x, y);
  },
  { passive: false },
);

function hover(x, y) {
  const node = nodeAt(x, y);
  canvas.classList.toggle("over", Boolean(node));
  tip.hidden = !node;
  if (!node) return;
  const score = node.s?.[state.verifier];
  const folded = currentPlaces().folded.has(node.i) && node.children.length;
  tip.replaceChildren(
    el("strong", {}, `Node ${node.i}`),
    el("span", {}, `${operation(node.op)}, level ${node.l}`),
    score === null || score === undefined ? null : el("span", {}, `${state.verifier} ${number(score)}`),
    ...(folded ? [el("span", {}, `${node.below} folded; press to open`)] : []),
  );
  const box = canvas.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(x + 14, box.width - tip.offsetWidth - 8))}px`;
  tip.style.top = `${y + 18 + tip.offsetHeight > box.height ? y - tip.offsetHeight - 12 : y + 18}px`;
}

/** Show what is folded behind a node. */
export function unfold(index) {
  const closed = new Set(state.closed);
  closed.delete(index);
  change({ opened: new Set(state.opened).add(index), closed });
}

/** Fold what came of a node, or show it. */
export function toggleFold(index) {
  const node = state.tree?.at(index);
  if (!node?.children.length) return;
  if (currentPlaces()?.folded.has(index)) {
    unfold(index);
    return;
  }
  const opened = new Set(state.opened);
  opened.delete(index);
  change({ opened, closed: new Set(state.closed).add(index) });
}

document.fonts?.ready.then(draw);
