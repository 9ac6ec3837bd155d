/** The runs of a folder, prompt by prompt and policy by policy; and the choice of the one that is open. */

import { count, number, plural, statusWord } from "./format.js";
import { openRun } from "./live.js";
import { change, state, watch } from "./state.js";
import { byId, el, toast } from "./dom.js";

const section = byId("runs");
const menu = byId("run-choice");
const MOST = 400;

menu.addEventListener("change", () => open(menu.value, state.view === "runs" ? "tree" : state.view));

/** Open a run in a view; its best sample is chosen anew. */
export async function open(id, view = "tree") {
  change({ view, node: null, other: null, tab: "leaders" });
  try {
    await openRun(id);
  } catch (error) {
    toast(error.message);
    change({ trouble: error.message });
  }
}

function choice() {
  menu.hidden = state.runs.length < 2;
  const known = [...menu.options].map((option) => option.value);
  const wanted = state.runs.map((run) => run.id);
  if (known.join("\n") !== wanted.join("\n")) menu.replaceChildren(...state.runs.map((run) => el("option", { value: run.id }, run.id === "." ? "this run" : run.id)));
  if (state.runId !== null) menu.value = state.runId;
}

function render() {
  choice();
  document.querySelector('#views [data-view="runs"]').hidden = state.runs.length < 2;
  if (state.view !== "runs") return;
  const runs = state.runs.slice(0, MOST);
  const policies = [...new Set(runs.map((run) => run.policy ?? ""))].sort();
  const groups = new Map();
  for (const run of runs) {
    const key = JSON.stringify([run.prompt, run.seed]);
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(run);
  }
  section.replaceChildren(
    el("div", { class: "section-head" }, el("h2", {}, "Runs"), el("p", { class: "quiet" }, `${plural(state.runs.length, "run")}: a row for each prompt and seed, a column for each policy. The best of a row is marked.`)),
    el("div", { class: "wide" }, el("table", { class: "matrix" },
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Prompt"), policies.map((policy) => el("th", { scope: "col" }, policy || "unknown policy")))),
      el("tbody", {}, [...groups.values()].map((group) => row(group, policies))))),
    ...(state.runs.length > MOST ? [el("p", { class: "quiet" }, `and ${count(state.runs.length - MOST)} more, which the list above has`)] : []),
  );
}

function row(group, policies) {
  const top = Math.max(...group.map((run) => run.best ?? -Infinity));
  const low = Math.min(...group.map((run) => run.best ?? Infinity));
  return el("tr", {},
    el("th", { scope: "row" }, el("span", { class: "prompt" }, group[0].prompt || "no prompt"), el("small", {}, `seed ${group[0].seed ?? "unknown"}`)),
    policies.map((policy) => el("td", {}, group.filter((run) => (run.policy ?? "") === policy).map((run) => entry(run, low, top, group.length > 1)))));
}

function entry(run, low, top, several) {
  const best = several && run.best !== null && run.best === top;
  const bar = el("span", { class: "meter" }, el("span"));
  bar.firstChild.style.width = `${run.best === null ? 0 : top > low ? 6 + 94 * ((run.best - low) / (top - low)) : 100}%`;
  return el("button", { type: "button", class: best ? "entry entry-best" : "entry", "aria-current": run.id === state.runId ? "true" : null, onclick: () => open(run.id) },
    el("span", { class: "entry-score" }, number(run.best), best ? el("span", { class: "pill pill-best" }, "best") : null),
    bar,
    el("small", {}, `${count(run.nfe)} NFE, ${plural(run.nodes ?? 0, "node")}${run.status === "done" ? "" : `, ${statusWord(run.status)}`}`),
    run.damage?.length ? el("small", { class: "bad" }, "damaged") : null);
}

watch(["runs", "runId", "view"], render);
