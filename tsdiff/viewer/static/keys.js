/** The keyboard, and the page that explains it. */

import { currentPlaces, fit, reveal, zoom } from "./canvas.js";
import { compareWith } from "./panel.js";
import { neighbour } from "./layout.js";
import { toggle } from "./scrub.js";
import { toggleFold } from "./pointer.js";
import { change, choose, state } from "./state.js";
import { byId, el, iconButton } from "./dom.js";

const VIEWS = ["tree", "gallery", "compare", "curve", "runs"];
const TREE = new Set(["ArrowUp", "ArrowDown", "ArrowLeft", "ArrowRight", "Enter", "f", "+", "=", "-", "o", "w"]);
const help = byId("help");

const EXPLAINED = [
  ["\u2190 \u2191 \u2192 \u2193", "to the parent, the best child, the neighbours in the row"],
  ["Enter", "fold or open what came of the node"],
  ["b", "choose the best sample"],
  ["/", "search: a number, best, failed, an operation, level:8, >0.5"],
  ["space", "play the search in order of creation, or stop"],
  ["c", "compare the node with the best"],
  ["f", "fit the tree into the window"],
  ["+ \u2212", "zoom"],
  ["o", "let the tree grow down, or to the right"],
  ["w", "fold weak subtrees, or open them"],
  ["1 to 5", "tree, gallery, compare, curve, runs"],
  ["t", "light or dark"],
  ["Esc", "choose nothing; close this"],
];

function direction(key) {
  const down = { ArrowUp: "up", ArrowDown: "down", ArrowLeft: "before", ArrowRight: "after" };
  const across = { ArrowLeft: "up", ArrowRight: "down", ArrowUp: "before", ArrowDown: "after" };
  return (state.across ? across : down)[key];
}

function act(key) {
  const way = direction(key);
  if (way && state.tree && currentPlaces()) {
    const next = neighbour(state.tree, currentPlaces(), state.node, way);
    if (next !== null) {
      if (way === "down" && currentPlaces().folded.has(state.node)) toggleFold(state.node);
      choose(next);
    }
    return true;
  }
  const actions = {
    Enter: () => state.node !== null && toggleFold(state.node),
    b: () => { choose(state.tree?.best ?? null); queueMicrotask(() => state.node !== null && reveal(state.node, true)); },
    "/": () => byId("search").focus(),
    " ": toggle,
    c: () => compareWith(state.node ?? state.tree?.leaders()[1]?.i ?? null),
    f: fit,
    "+": () => zoom(1.4),
    "=": () => zoom(1.4),
    "-": () => zoom(1 / 1.4),
    o: () => change({ across: !state.across }),
    w: () => change({ fold: !state.fold, opened: new Set(), closed: new Set() }),
    t: () => byId("theme").click(),
    "?": showHelp,
    Escape: () => (state.view === "tree" ? choose(null) : change({ view: "tree" })),
  };
  if (/^[1-5]$/.test(key)) {
    const view = VIEWS[Number(key) - 1];
    if (!document.querySelector(`#views [data-view="${view}"]`).hidden) change({ view });
    return true;
  }
  if (!actions[key]) return false;
  actions[key]();
  return true;
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || help.open) return;
  const target = event.target;
  if (target.closest?.("input, select, textarea")) return;
  const pressed = target.closest?.("button, summary, a");
  if (pressed && (event.key === " " || event.key === "Enter")) return;
  if (TREE.has(event.key) && state.view !== "tree") return;
  if (act(event.key)) event.preventDefault();
});

/** Show what the keys do. */
export function showHelp() {
  help.replaceChildren(
    el("div", { class: "section-head" }, el("h2", { id: "help-title" }, "Keys"), iconButton("close", "Close", () => help.close())),
    el("dl", { class: "keys" }, EXPLAINED.flatMap(([key, what]) => [el("dt", {}, key.split(key.includes(" to ") ? "\n" : " ").map((one) => el("kbd", {}, one))), el("dd", {}, what)])),
    el("p", { class: "quiet" }, "Drag moves the tree, the wheel or two fingers zoom, a double press folds a subtree. The address names the run, the node and the view: it can be kept or shared."));
  help.showModal();
}

help.addEventListener("click", (event) => {
  if (event.target === help) help.close();
});
