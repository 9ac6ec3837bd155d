/** The search box: which nodes it names, and the way from one to the next. */

import { operation } from "./format.js";
import { reveal } from "./canvas.js";
import { change, choose, state, watch } from "./state.js";
import { byId } from "./dom.js";

const box = byId("search");
let at = -1;

/** Whether a node is meant: by its number, a mark, its operation, its level, or a bound of its score. */
function meaning(text) {
  const wanted = text.trim().toLowerCase();
  if (!wanted) return null;
  const bound = /^([<>]=?)\s*(-?[\d.]+(?:e-?\d+)?)$/.exec(wanted.replace("\u2212", "-"));
  if (bound) {
    const limit = Number(bound[2]);
    const above = bound[1][0] === ">";
    return (node) => {
      const score = node.s?.[state.verifier];
      return score !== null && score !== undefined && (above ? score > limit : score < limit);
    };
  }
  const level = /^level[:\s=]\s*(\d+)$/.exec(wanted);
  if (level) return (node) => node.l === Number(level[1]);
  const index = /^(?:#|node\s*)?(\d+)$/.exec(wanted);
  if (index) return (node) => node.i === Number(index[1]);
  if (wanted === "best") return (node) => node.i === state.tree.best;
  if (wanted === "failed") return (node) => node.f !== null && node.f !== undefined;
  if (wanted === "draft") return (node) => node.d;
  if (wanted === "finished") return (node) => node.fin;
  return (node) => node.op.includes(wanted) || operation(node.op).includes(wanted) || (node.f ?? "").toLowerCase().includes(wanted);
}

function look() {
  const means = meaning(box.value);
  at = -1;
  change({ search: box.value, found: means && state.tree ? new Set(state.tree.nodes.filter((node) => node && means(node)).map((node) => node.i)) : null });
}

box.addEventListener("input", look);
box.addEventListener("keydown", (event) => {
  if (event.key === "Enter") {
    const found = [...(state.found ?? [])];
    if (!found.length) return;
    at = (at + (event.shiftKey ? -1 : 1) + found.length) % found.length;
    choose(found[at]);
    queueMicrotask(() => reveal(found[at], true));
  } else if (event.key === "Escape") {
    box.value = "";
    look();
    byId("tree").focus();
  }
  event.stopPropagation();
});

watch(["version"], () => {
  if (box.value) look();
});
