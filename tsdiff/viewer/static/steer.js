/** Steering: grow a node, stop what is running, and see what became of it. */

import { number, plural } from "./format.js";
import { state } from "./state.js";
import { lookNow } from "./live.js";
import { el, toast } from "./dom.js";

let wish = { renoise: 0.5, children: 4 };

/** The form that asks for children of a node; null where the page cannot steer. */
export function growForm(node) {
  if (!state.source.live) return null;
  if (!state.source.steers) {
    return el("p", { class: "quiet boxed" }, "This page may look but not steer. Open the address with its token, as tsdiff view prints it, to grow nodes from here.");
  }
  if (node.l === 0 || node.f) return null; // pure noise has nothing to go back from, and what failed nothing to grow
  const told = el("output", { class: "quiet", for: "renoise" });
  const far = el("input", { id: "renoise", type: "range", min: 0, max: 1, step: 0.05, value: wish.renoise });
  const many = el("input", { id: "children", type: "number", min: 1, max: 64, step: 1, value: wish.children, inputmode: "numeric" });
  const send = el("button", { type: "submit", class: "primary" });
  const tell = () => {
    wish = { renoise: Number(far.value), children: Math.min(64, Math.max(1, Math.round(Number(many.value)) || 1)) };
    told.textContent = landing(node, wish.renoise);
    send.textContent = `Grow ${plural(wish.children, "child", "children")}`;
  };
  far.addEventListener("input", tell);
  many.addEventListener("input", tell);
  tell();
  return el("form", { class: "grow boxed", "data-node": node.i, onsubmit: (event) => grow(event, node, send) },
    el("h3", {}, "Grow from here"),
    el("label", { for: "renoise" }, "How far to re-noise"), el("div", { class: "slider" }, far, told),
    el("label", { for: "children" }, "Children"), el("div", { class: "row" }, many, send));
}

function landing(node, share) {
  if (share === 0) return "kept as it is";
  if (share === 1) return "to pure noise";
  const scales = state.run.schedule?.noise_scale;
  const word = share < 0.35 ? "details change" : share < 0.7 ? "the middle way" : "layout changes";
  return scales?.length ? `${number(share, 2)}, ${word}` : number(share, 2);
}

async function grow(event, node, button) {
  event.preventDefault();
  button.disabled = true;
  try {
    await state.source.expand(state.runId, { node: node.i, children: wish.children, renoise: wish.renoise });
    toast(`Asked for ${plural(wish.children, "child", "children")} of node ${node.i}.`);
    lookNow();
  } catch (error) {
    toast(error.message);
  } finally {
    button.disabled = false;
    button.blur();
  }
}

/** Stop the search of this run; null where it does not run, or the page cannot steer. */
export function stopButton() {
  if (state.status !== "running" || !state.source.steers) return null;
  const button = el("button", { type: "button", class: "danger" }, "Stop after this batch");
  button.addEventListener("click", async () => {
    button.disabled = true;
    try {
      await state.source.stop(state.runId);
      toast("Asked to stop.");
      lookNow();
    } catch (error) {
      toast(error.message);
      button.disabled = false;
    }
  });
  return button;
}

const WORDS = { expand: "Grow", stop: "Stop" };

/** What was asked of the run, the latest first. */
export function commandList() {
  if (!state.commands.length) return [];
  return [
    el("h3", {}, "Asked from here"),
    el("ul", { class: "asked" }, [...state.commands].reverse().slice(0, 8).map((command) =>
      el("li", {}, el("span", { class: `pill state-${command.state}` }, command.state), " ", WORDS[command.do] ?? command.do,
        command.message ? el("span", { class: "quiet" }, ` ${command.message}`) : null))),
  ];
}
