/** The strip of nodes from the first noise to the chosen one. */

import { thumbnail } from "./atlas.js";
import { scoreColour } from "./panel.js";
import { number, operation } from "./format.js";
import { isLarge } from "./layout.js";
import { choose, state, watch } from "./state.js";
import { byId, el } from "./dom.js";

const strip = byId("path");

function render() {
  const path = state.tree && state.node !== null ? state.tree.path(state.node) : [];
  strip.hidden = !path.length;
  strip.replaceChildren(...path.flatMap((node, at) => [
    at ? el("span", { class: "hop" }, operation(node.op)) : null,
    el("button", { type: "button", class: "stop", "aria-current": node.i === state.node ? "true" : null, "aria-label": `Node ${node.i}, ${operation(node.op)}, level ${node.l}${node.score === null ? "" : `, score ${number(node.score)}`}`, onclick: () => choose(node.i) },
      isLarge(node) ? thumbnail(node, 36, scoreColour(node)) : el("span", { class: "thumb-dot", "aria-hidden": "true" }),
      el("span", {}, node.score === null ? `level ${node.l}` : number(node.score, 3))),
  ]).filter(Boolean));
  strip.lastElementChild?.scrollIntoView({ block: "nearest", inline: "nearest" });
}

watch(["node", "version", "tree", "dark", "verifier", "colouring"], render);
