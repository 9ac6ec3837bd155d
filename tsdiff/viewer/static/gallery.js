/** All finished samples as pictures, the best first. Pictures are fetched as they come into view. */

import { thumbnail } from "./atlas.js";
import { compareWith, scoreColour } from "./panel.js";
import { number, plural } from "./format.js";
import { choose, state, watch } from "./state.js";
import { byId, el } from "./dom.js";

const PAGE = 120;
const section = byId("gallery");
let shown = PAGE;

function render() {
  if (state.view !== "gallery" || !state.tree) return;
  const all = state.tree.leaders(state.time).filter((node) => !state.found || state.found.has(node.i));
  const some = all.slice(0, shown);
  section.replaceChildren(
    el("div", { class: "section-head" }, el("h2", {}, "Gallery"),
      el("p", { class: "quiet" }, all.length ? `${plural(all.length, "finished sample")}, the best by ${state.tree.verifier} first` : "No sample is finished and scored yet.")),
    el("ul", { class: "tiles" }, some.map((node, place) => el("li", {}, tile(node, place + 1)))),
    ...(all.length > some.length ? [el("p", { class: "centre" }, el("button", { type: "button", onclick: more }, `Show ${Math.min(PAGE, all.length - some.length)} more`))] : []),
  );
}

function more() {
  shown += PAGE;
  render();
}

function tile(node, place) {
  const address = node.th === null || node.th === undefined ? null : state.source.image(state.runId, node.i);
  const colour = scoreColour(node);
  const picture = address ? el("img", { src: address, alt: "", loading: "lazy", decoding: "async", draggable: "false" }) : thumbnail(node, 64, colour);
  const bar = el("span", { class: "tile-bar" });
  if (colour) bar.style.background = colour;
  return el("button", { type: "button", class: "tile", "aria-current": node.i === state.node ? "true" : null, "aria-label": `Number ${place}: node ${node.i}, score ${number(node.score)}`, onclick: () => choose(node.i), ondblclick: () => compareWith(node.i) },
    el("span", { class: address ? "tile-picture" : "tile-picture tile-empty" }, picture), bar,
    el("span", { class: "tile-foot" }, el("span", {}, `${place}`), el("span", { class: "quiet" }, `node ${node.i}`), el("span", { class: "figure" }, number(node.score))));
}

watch(["runId"], () => {
  shown = PAGE;
});
watch(["view", "version", "tree", "time", "found", "node", "verifier", "colouring", "dark"], render);
