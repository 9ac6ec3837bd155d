/** The side panel: the chosen node, the best samples, or the run. */

import { thumbnail } from "./atlas.js";
import { ramp, steps } from "./colour.js";
import { count, number, operation, plain, plural, statusWord } from "./format.js";
import { change, choose, state, watch } from "./state.js";
import { commandList, growForm, stopButton } from "./steer.js";
import { byId, copyText, el, icon } from "./dom.js";

const body = byId("panel-body");
const SHOWN = 60;
let details = null; // of the chosen node, as the server tells them
let asked = "";

for (const tab of document.querySelectorAll("[data-tab]")) {
  tab.addEventListener("click", () => change({ tab: tab.dataset.tab }));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const tabs = [...document.querySelectorAll("[data-tab]")];
    const next = tabs[(tabs.indexOf(tab) + step + tabs.length) % tabs.length];
    next.focus();
    next.click();
    event.stopPropagation();
  });
}

/** The colour of a node's score under the verifier that is shown; null where it has none. */
export function scoreColour(node) {
  const level = levels()[node.i];
  return level === undefined || level < 0 ? null : ramp(state.dark)[level];
}

let kept = { key: "", levels: [] };

function levels() {
  const key = [state.runId, state.version, state.verifier, state.colouring].join(" ");
  if (kept.key !== key) kept = { key, levels: steps(state.tree, state.verifier, state.colouring) };
  return kept.levels;
}

function render() {
  for (const tab of document.querySelectorAll("[data-tab]")) {
    const chosen = tab.dataset.tab === state.tab;
    tab.setAttribute("aria-selected", String(chosen));
    tab.tabIndex = chosen ? 0 : -1;
    if (chosen) body.setAttribute("aria-labelledby", tab.id);
  }
  if (!state.tree || !state.run) return;
  if (state.tab === "leaders") body.replaceChildren(...leaders());
  else if (state.tab === "run") body.replaceChildren(...runFacts());
  else showNode();
}

// Leaders ---------------------------------------------------------------------------------------------------------

function leaders() {
  const best = state.tree.leaders(state.time);
  if (!best.length) return [note("No sample is finished and scored yet.")];
  const first = state.run.baseline?.scores?.[state.tree.verifier];
  return [
    el("p", { class: "quiet" }, `${plural(best.length, "finished sample")}, by ${state.tree.verifier}`),
    el("ol", { class: "leaders" }, best.slice(0, SHOWN).map((node, place) => leader(node, place + 1))),
    best.length > SHOWN ? note(`and ${count(best.length - SHOWN)} more; the gallery has them all`) : null,
    first === undefined || first === null ? null : el("p", { class: "quiet" }, `One plain sample: ${number(first)}`),
  ].filter(Boolean);
}

function leader(node, place) {
  const chosen = node.i === state.node;
  return el("li", {},
    el("button", { type: "button", class: "leader", "aria-current": chosen ? "true" : null, onclick: () => choose(node.i) },
      el("span", { class: "place" }, String(place)),
      thumbnail(node, 40, scoreColour(node)),
      el("span", { class: "leader-name" }, `Node ${node.i}`, el("small", {}, `${operation(node.op)}, level ${node.l}`)),
      el("span", { class: "figure" }, number(node.score))));
}

function note(text) {
  return el("p", { class: "quiet" }, text);
}

// The chosen node -------------------------------------------------------------------------------------------------

function showNode() {
  const node = state.tree.at(state.node);
  if (!node) {
    body.replaceChildren(note("Choose a node of the tree."), note("Arrow keys move from node to node; ? lists all keys."));
    return;
  }
  const key = [state.runId, node.i, JSON.stringify(node.s), node.children.length, node.f].join(" ");
  if (asked !== key) fetchDetails(key, node.i);
  if (details && details.i === node.i) fill(node, details);
  else fill(node, null);
}

async function fetchDetails(key, index) {
  asked = key;
  if (details?.i !== index) details = null;
  try {
    const found = await state.source.node(state.runId, index);
    if (asked !== key) return;
    details = found;
  } catch (error) {
    if (asked !== key) return;
    details = { i: index, trouble: error.message };
  }
  if (state.tab === "node") showNode();
}

function fill(node, facts) {
  const typed = document.activeElement?.closest?.(".grow");
  if (typed && typed.dataset.node === String(node.i) && body.contains(typed)) return; // nothing is taken from under the hand
  const best = state.tree.best === node.i;
  body.replaceChildren(...[
    el("div", { class: "node-head" },
      el("h2", {}, `Node ${node.i}`),
      best ? el("span", { class: "pill pill-best" }, "best") : null,
      node.d ? el("span", { class: "pill" }, "draft") : null,
      node.f !== null && node.f !== undefined ? el("span", { class: "pill pill-bad" }, "failed") : null,
      node.fin ? el("span", { class: "pill" }, "finished") : null),
    facts?.label ? el("p", { class: "quiet" }, plain(facts.label)) : null,
    picture(node, facts),
    node.f ? el("p", { class: "bad" }, node.f) : null,
    scores(node, facts),
    facts?.trouble ? el("p", { class: "bad" }, facts.trouble) : null,
    el("div", { class: "row" },
      el("button", { type: "button", onclick: () => compareWith(node.i) }, "Compare"),
      best || state.tree.best === null ? null : el("button", { type: "button", onclick: () => choose(state.tree.best) }, "Go to the best")),
    facts && !facts.trouble ? definitions(node, facts) : null,
    growForm(node),
    ...commandList(),
    facts?.commands ? commands(facts.commands) : null,
  ].filter(Boolean));
}

/** Put a node beside the best, or beside the one that is compared already. */
export function compareWith(index) {
  const other = state.other !== null && state.other !== index ? state.other : state.tree.best !== index ? state.tree.best : (state.tree.leaders()[1]?.i ?? null);
  change({ node: index, other, view: "compare" });
}

function picture(node, facts) {
  const address = facts?.image ?? (node.th !== null && node.th !== undefined ? state.source.image(state.runId, node.i) : null);
  if (!address) return null;
  const image = el("img", { class: "node-image", src: address, alt: `What node ${node.i} looks like`, draggable: "false" });
  image.addEventListener("load", () => image.classList.toggle("small", image.naturalWidth < 160));
  image.addEventListener("error", () => image.remove());
  return image;
}

function scores(node, facts) {
  const named = facts?.scores ?? Object.fromEntries(Object.entries(node.s ?? {}).map(([name, score]) => [name, { score }]));
  const names = Object.keys(named);
  if (!names.length) return note("Not scored.");
  return el("table", { class: "scores" },
    el("caption", { class: "off-screen" }, "Scores"),
    el("tbody", {}, names.flatMap((name) => {
      const value = named[name] ?? {};
      const steering = name === state.tree.verifier;
      return [
        el("tr", {}, el("th", { scope: "row" }, name, steering ? el("small", {}, " steers") : null), el("td", { class: "meter-cell" }, meter(name, value.score)), el("td", { class: "figure" }, number(value.score))),
        ...Object.entries(value.parts ?? {}).map(([part, score]) => el("tr", { class: "part" }, el("th", { scope: "row" }, part), el("td"), el("td", { class: "figure" }, number(score)))),
        value.reason ? el("tr", { class: "part" }, el("td", { colspan: 3 }, value.reason)) : null,
      ];
    }).filter(Boolean)));
}

/** Where a score stands among all of its verifier in this tree. */
function meter(name, score) {
  if (score === null || score === undefined) return null;
  const scale = state.tree.scale(name);
  let below = 0;
  for (const other of scale) if (other < score) below += 1;
  const share = scale.length > 1 ? below / (scale.length - 1) : 1;
  const bar = el("span", { class: "meter", title: `higher than ${Math.round(100 * Math.min(1, share))} % of the scored nodes` }, el("span"));
  bar.firstChild.style.width = `${Math.max(2, 100 * Math.min(1, share))}%`;
  bar.firstChild.style.background = ramp(state.dark)[Math.round(Math.min(1, share) * (ramp(state.dark).length - 1))];
  return bar;
}

function definitions(node, facts) {
  const rows = [
    ["Level", `${facts.level} of ${state.run.schedule?.levels ?? "?"}${facts.level === 0 ? ", pure noise" : node.fin ? ", clean" : ""}`],
    ["Noise scale", number(facts.noise_scale)],
    ["Operation", operation(facts.op)],
    ["Parent", node.p === null ? "none" : el("button", { type: "button", class: "link", onclick: () => choose(node.p) }, `node ${node.p}`)],
    ["Children", `${count(node.children.length)}${node.below > node.children.length ? `, ${count(node.below)} nodes below` : ""}`],
    ["Evaluations", [count(facts.nfe), node.n === null || node.n === undefined ? "" : ` (the tree: ${count(node.n)} so far)`].join("")],
    facts.rows === null || facts.rows === undefined ? null : ["Network rows", count(facts.rows)],
    facts.seconds === null || facts.seconds === undefined ? null : ["Seconds", number(facts.seconds, 3)],
    ["Seed", plain(facts.seed)],
    ["Made by", node.g ? `expansion ${node.g}` : "the search"],
    ["Id", el("code", {}, String(facts.id))],
    ["Prompt", facts.prompt],
  ].filter(Boolean);
  const recipe = Object.entries(facts.recipe ?? {}).filter(([, value]) => value !== null && value !== undefined);
  return el("div", {},
    pairs(rows),
    recipe.length ? el("details", { class: "more" }, el("summary", {}, "Recipe"), pairs(recipe.map(([name, value]) => [name, plain(value)]))) : null);
}

function pairs(rows) {
  return el("dl", { class: "facts" }, rows.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
}

function commands(named) {
  const told = { show: "Show it", expand: "Grow it in the terminal", search: "Search again", resume: "Go on", reproduce: "Make it again" };
  const rows = Object.entries(named).filter(([, text]) => text);
  if (!rows.length) return null;
  return el("div", { class: "commands" }, rows.map(([name, text]) => command(told[name] ?? name, text)));
}

function command(label, text) {
  return el("div", { class: "command" },
    el("div", { class: "command-head" }, el("span", {}, label),
      el("button", { type: "button", class: "icon-button", "aria-label": `Copy: ${label}`, title: "Copy", onclick: () => copyText(text) }, icon("copy"))),
    el("code", {}, text));
}

// The run ---------------------------------------------------------------------------------------------------------

function runFacts() {
  const { run, tree } = state;
  const { name, ...parameters } = run.policy ?? {};
  const spent = tree.nodes.reduce((most, node) => Math.max(most, node?.n ?? 0), 0);
  const best = tree.at(tree.best);
  const rows = [
    ["Status", statusWord(state.status)],
    ["Prompt", run.prompt],
    ["Seed", plain(run.seed)],
    ["Model", plain(run.model)],
    ["Policy", plain(name)],
    ["Solver", `${plain(run.solver)}${run.steps ? `, ${run.steps} steps` : ""}`],
    ["Verifiers", (run.verifiers ?? []).join(", ")],
    ["Nodes", count(tree.size)],
    ["Evaluations", run.budget === null || run.budget === undefined ? count(spent) : `${count(spent)} (budget ${plain(run.budget)})`],
    ["Best", best ? `${number(best.score)} (node ${best.i})` : "\u2013"],
    ["One plain sample", number(run.baseline?.scores?.[tree.verifier])],
  ];
  const drivers = Array.isArray(run.drivers) && run.drivers.length > 1 ? run.drivers : [];
  return [
    el("h2", {}, state.runId === "." ? "This run" : state.runId),
    ...(run.damage ?? []).map((text) => el("p", { class: "bad" }, text)),
    stopButton(),
    pairs(rows),
    Object.keys(parameters).length ? el("details", { class: "more" }, el("summary", {}, "Parameters of the policy"), pairs(Object.entries(parameters).map(([key, value]) => [key, plain(value)]))) : null,
    drivers.length ? el("details", { class: "more" }, el("summary", {}, plural(drivers.length, "driver")), el("ol", { class: "drivers" }, drivers.map((driver) => el("li", {}, plain(driver))))) : null,
    run.versions ? el("details", { class: "more" }, el("summary", {}, "Versions"), pairs(Object.entries(run.versions).map(([key, value]) => [key, plain(value)]))) : null,
    ...commandList(),
    run.commands ? commands(run.commands) : null,
    state.source.leftOut?.length ? el("div", {}, el("h3", {}, "Left out of this file"), el("ul", { class: "quiet" }, state.source.leftOut.map((text) => el("li", {}, text)))) : null,
  ].filter(Boolean);
}

watch(["tab", "node", "version", "run", "status", "verifier", "colouring", "time", "dark", "commands", "source"], render);
