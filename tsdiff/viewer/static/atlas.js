/** Thumbnails: pages of 256, fetched when one of them is first wanted, and again when there are new ones on a page. */

import { state, watch } from "./state.js";
import { el } from "./dom.js";

export const CELLS = 16; // a page has so many rows and columns
const PAGE = CELLS * CELLS;
const AT_ONCE = 3;

let pages = new Map(); // page -> { image, known, asked, failed }
let filled = new Map(); // page -> how many thumbnails the tree names on it
let loading = 0;
const listeners = [];

/** Call `listener()` whenever a page has come. */
export function whenLoaded(listener) {
  listeners.push(listener);
}

watch(["runId"], forget);
watch(["version"], () => {
  filled = new Map();
  for (const node of state.tree?.nodes ?? []) {
    if (!node || node.th === null || node.th === undefined) continue;
    const page = Math.floor(node.th / PAGE);
    filled.set(page, Math.max(filled.get(page) ?? 0, (node.th % PAGE) + 1));
  }
});

function forget() {
  for (const { image } of pages.values()) image?.close?.();
  pages = new Map();
}

/** Where a thumbnail is: the picture, and the square of it; null until it is there. */
export function cell(th) {
  if (th === null || th === undefined) return null;
  const number = Math.floor(th / PAGE);
  const within = th % PAGE;
  const page = pages.get(number);
  const stale = page && !page.failed && page.known <= within && (filled.get(number) ?? 0) > page.known;
  if (!page || stale) load(number);
  if (!page?.image || page.known <= within) return null;
  const size = page.image.width / CELLS;
  return { image: page.image, x: (within % CELLS) * size, y: Math.floor(within / CELLS) * size, size };
}

async function load(number) {
  const page = pages.get(number) ?? { image: null, known: 0, asked: false, failed: false };
  pages.set(number, page);
  if (page.asked || loading >= AT_ONCE) {
    if (!page.asked) pages.delete(number); // asked for again when it is next drawn
    return;
  }
  page.asked = true;
  loading += 1;
  const known = filled.get(number) ?? 0;
  const mine = pages;
  try {
    const image = await state.source.atlas(state.runId, number);
    if (mine !== pages) image?.close?.();
    else Object.assign(page, { image, known, failed: image === null });
  } catch (error) {
    page.failed = true; // nodes are drawn in their colours alone
    console.warn(String(error));
  } finally {
    page.asked = false;
    loading -= 1;
    for (const listener of listeners) listener();
  }
}

const waiting = new Set();
whenLoaded(() => {
  for (const canvas of waiting) {
    if (!canvas.isConnected || paint(canvas)) waiting.delete(canvas);
  }
});

function paint(canvas) {
  const found = cell(Number(canvas.dataset.th));
  if (!found) return false;
  const pen = canvas.getContext("2d");
  pen.imageSmoothingQuality = "high";
  pen.drawImage(found.image, found.x, found.y, found.size, found.size, 0, 0, canvas.width, canvas.height);
  return true;
}

/** A small picture of a node for lists: its thumbnail, else a square in the colour of its score. */
export function thumbnail(node, size, colour) {
  if (node.th === null || node.th === undefined) {
    const square = el("span", { class: "thumb thumb-none", "aria-hidden": "true" });
    square.style.width = square.style.height = `${size}px`;
    if (colour) square.style.background = colour;
    return square;
  }
  const canvas = el("canvas", { class: "thumb", width: 64, height: 64, "data-th": node.th, "aria-hidden": "true" });
  canvas.style.width = canvas.style.height = `${size}px`;
  if (colour) canvas.style.borderColor = colour;
  if (!paint(canvas)) waiting.add(canvas);
  return canvas;
}
