/** Two nodes side by side: one picture over the other with a slider between them, and what differs in figures. */

import { thumbnail } from "./atlas.js";
import { scoreColour } from "./panel.js";
import { count, number, operation } from "./format.js";
import { change, state, watch } from "./state.js";
import { byId, el } from "./dom.js";

const section = byId("compare");
let split = 50;
let active = "node"; // which of the two the next choice replaces
let drawn = "";

function render() {
  if (state.view !== "compare" || !state.tree) return;
  const [left, right] = [state.tree.at(state.node), state.tree.at(state.other)];
  const key = JSON.stringify([state.runId, state.version, state.node, state.other, active, state.dark, state.verifier]);
  if (key === drawn) return;
  drawn = key;
  section.replaceChildren(
    el("div", { class: "section-head" }, el("h2", {}, "Compare"), el("p", { class: "quiet" }, "Choose a side, then a sample below.")),
    el("div", { class: "sides", role: "group", "aria-label": "Sides" }, side("node", "Left", left), swapButton(), side("other", "Right", right)),
    left && right ? overlay(left, right) : el("p", { class: "quiet centre" }, "Two nodes are needed."),
    left && right ? table(left, right) : null,
    el("div", { class: "picks", role: "group", "aria-label": "Samples, the best first" }, picks()),
  );
}

function side(name, label, node) {
  return el("button", { type: "button", class: "side", "aria-pressed": String(active === name), onclick: () => { active = name; drawn = ""; render(); } },
    node ? thumbnail(node, 36, scoreColour(node)) : null,
    el("span", {}, el("small", {}, label), node ? `Node ${node.i}` : "none"));
}

function swapButton() {
  return el("button", { type: "button", onclick: () => change({ node: state.other, other: state.node }) }, "Swap");
}

function picks() {
  return state.tree.leaders().slice(0, 24).map((node) =>
    el("button", { type: "button", class: "pick", "aria-label": `Node ${node.i}, score ${number(node.score)}`, "aria-current": node.i === state.node || node.i === state.other ? "true" : null, onclick: () => change({ [active]: node.i }) },
      thumbnail(node, 52, scoreColour(node)), el("span", {}, number(node.score, 3))));
}

function overlay(left, right) {
  const pair = [layer(left, "left"), layer(right, "right")];
  const line = el("span", { class: "split-line", "aria-hidden": "true" });
  const slider = el("input", { type: "range", min: 0, max: 100, step: 1, value: split, class: "split", id: "split", "aria-label": `How much of node ${left.i} is shown over node ${right.i}` });
  const cut = () => {
    split = Number(slider.value);
    pair[0].style.clipPath = `inset(0 ${100 - split}% 0 0)`;
    line.style.left = `${split}%`;
  };
  slider.addEventListener("input", cut);
  cut();
  return el("div", { class: "overlay" }, pair[1], pair[0], line, el("span", { class: "corner left" }, `Node ${left.i}`), el("span", { class: "corner right" }, `Node ${right.i}`), slider);
}

function layer(node, where) {
  const holder = el("div", { class: `layer ${where}` });
  const colour = scoreColour(node);
  const show = (address) => {
    const image = el("img", { src: address, alt: `Node ${node.i}`, draggable: "false" });
    image.addEventListener("load", () => image.classList.toggle("small", image.naturalWidth < 160));
    holder.replaceChildren(image);
  };
  if (node.th !== null && node.th !== undefined && state.source.image(state.runId, node.i)) show(state.source.image(state.runId, node.i));
  else {
    holder.append(el("span", { class: "no-picture" }, `Node ${node.i} has no picture`));
    if (colour) holder.style.background = colour;
    state.source.node(state.runId, node.i).then((facts) => facts.image && show(facts.image), (error) => console.warn(error.message));
  }
  return holder;
}

function table(left, right) {
  const names = [...new Set([...Object.keys(left.s ?? {}), ...Object.keys(right.s ?? {})])];
  const rows = [
    ...names.map((name) => figures(name, left.s?.[name], right.s?.[name])),
    figures("level", left.l, right.l, count),
    figures("evaluations of the tree", left.n, right.n, count),
    el("tr", {}, el("th", { scope: "row" }, "operation"), el("td", {}, operation(left.op)), el("td", {}, operation(right.op)), el("td")),
    shared(left, right),
  ];
  return el("table", { class: "versus" },
    el("thead", {}, el("tr", {}, el("td"), el("th", { scope: "col" }, `Node ${left.i}`), el("th", { scope: "col" }, `Node ${right.i}`), el("th", { scope: "col" }, "Difference"))),
    el("tbody", {}, rows));
}

function figures(name, one, two, show = number) {
  const known = [one, two].every((value) => value !== null && value !== undefined);
  const better = known && one !== two && show === number ? (one > two ? "left" : "right") : "";
  return el("tr", {}, el("th", { scope: "row" }, name),
    el("td", { class: better === "left" ? "figure better" : "figure" }, show(one)), el("td", { class: better === "right" ? "figure better" : "figure" }, show(two)),
    el("td", { class: "figure" }, known ? `${one > two ? "+" : ""}${number(one - two)}` : ""));
}

function shared(left, right) {
  const ways = [left, right].map((node) => state.tree.path(node.i).map((item) => item.i));
  let common = -1;
  for (let at = 0; at < Math.min(ways[0].length, ways[1].length) && ways[0][at] === ways[1][at]; at += 1) common = ways[0][at];
  return el("tr", {}, el("th", { scope: "row" }, "common ancestor"), el("td", { colspan: 3 }, common < 0 ? "none: they came of different first noises" : `node ${common}, level ${state.tree.at(common).l}`));
}

watch(["view", "node", "other", "version", "tree", "dark", "verifier"], render);
