/** What waits for a person: the images that a human verifier asks about, to rate one by one or to choose among. */

import { number, plural } from "./format.js";
import { lookNow } from "./live.js";
import { change, state, watch } from "./state.js";
import { byId, el, toast } from "./dom.js";

const section = byId("rate");
const tab = document.querySelector('#views [data-view="rate"]');
const answered = new Set();
const typed = new Map(); // a score that was set and not sent yet, by question
let drawn = "";

function open() {
  return state.questions.filter((question) => !answered.has(question.id));
}

function render() {
  const questions = open();
  const key = JSON.stringify([questions, state.view, state.source?.steers]);
  if (key === drawn) return;
  drawn = key;
  tab.hidden = !questions.length && state.view !== "rate";
  byId("waiting").textContent = String(questions.length);
  if (state.view !== "rate") return;
  const groups = new Map();
  for (const question of questions) {
    const same = JSON.stringify([question.run, question.verifier, question.prompt]);
    if (!groups.has(same)) groups.set(same, []);
    groups.get(same).push(question);
  }
  section.replaceChildren(
    el("div", { class: "section-head" }, el("h2", {}, "Rate"), el("p", { class: "quiet" }, questions.length ? `${plural(questions.length, "image")} to judge. The search takes up your answers as they come.` : "Nothing waits for you.")),
    ...(state.source.steers ? [] : [el("p", { class: "quiet boxed" }, "This page may look but not answer. Open the address with its token, as tsdiff view prints it.")]),
    ...[...groups.values()].map(group));
}

function group(questions) {
  const { prompt, verifier, run } = questions[0];
  return el("section", { class: "ask", "aria-label": prompt },
    el("h3", {}, prompt || "no prompt"),
    el("p", { class: "quiet" }, `asked by ${verifier}${run === "." ? "" : ` in ${run}`}, from ${number(questions[0].low)} (worst) to ${number(questions[0].high)} (best)`),
    questions.length > 1 ? el("p", { class: "quiet" }, "Rate each of them; or choose the best, which gets the highest score and the others here the lowest.") : null,
    el("ul", { class: "cards" }, questions.map((question) => el("li", {}, card(question, questions)))));
}

function card(question, all) {
  const { low, high, id } = question;
  const start = typed.get(id) ?? (low + high) / 2;
  const told = el("output", { class: "figure" }, number(start, 3));
  const slider = el("input", { type: "range", min: low, max: high, step: (high - low) / 100 || 1, value: start, "aria-label": `Score of node ${question.node ?? "unknown"}` });
  slider.addEventListener("input", () => {
    typed.set(id, Number(slider.value));
    told.textContent = number(Number(slider.value), 3);
  });
  const can = state.source.steers;
  return el("article", { class: "card" },
    question.image ? el("img", { src: question.image, alt: question.node === null ? "The image to judge" : `Node ${question.node}`, draggable: "false" }) : null,
    el("div", { class: "slider" }, slider, told),
    el("div", { class: "row" },
      el("button", { type: "button", class: "primary", disabled: !can, onclick: () => answer([[question, Number(slider.value)]]) }, "Rate"),
      all.length > 1 ? el("button", { type: "button", disabled: !can, onclick: () => answer(all.map((one) => [one, one.id === id ? one.high : one.low])) }, "This is the best") : null,
      el("button", { type: "button", class: "link", disabled: !can, onclick: () => answer([[question, null]]) }, "No score")),
    question.node === null ? null : el("small", { class: "quiet" }, `node ${question.node}`));
}

async function answer(pairs) {
  for (const [question, score] of pairs) {
    try {
      await state.source.answer(question.id, score);
      answered.add(question.id);
      typed.delete(question.id);
    } catch (error) {
      toast(error.message);
      break;
    }
  }
  render();
  lookNow();
  if (!open().length) toast("Thank you. The search goes on.");
}

watch(["questions", "view", "source"], render);
tab.addEventListener("click", () => change({ view: "rate" }));
