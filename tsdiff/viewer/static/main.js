/** The page: opens its source and its first run, and joins the views. */

import { openSource } from "./api.js";
import { legend, marks } from "./colour.js";
import { fit, locate, zoom } from "./canvas.js";
import { number, operation, plural, statusWord } from "./format.js";
import { follow, named } from "./hash.js";
import { showHelp } from "./keys.js";
import { openRun } from "./live.js";
import { change, state, watch } from "./state.js";
import { byId, el, iconButton } from "./dom.js";
import "./compare.js";
import "./curve.js";
import "./gallery.js";
import "./panel.js";
import "./path.js";
import "./pointer.js";
import "./questions.js";
import "./runs.js";
import "./scrub.js";
import "./search.js";

// Light and dark ----------------------------------------------------------------------------------------------------

const prefers = matchMedia("(prefers-color-scheme: dark)");
const THEME = "tsdiff-theme";

function stored(key) {
  try {
    return localStorage.getItem(key);
  } catch {
    return null; // a page from a file may have no storage
  }
}

function useTheme(choice) {
  const dark = choice ? choice === "dark" : prefers.matches;
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  change({ dark });
}

function switchTheme() {
  const choice = state.dark ? "light" : "dark";
  try {
    localStorage.setItem(THEME, choice);
  } catch {
    // then the choice lasts as long as the page
  }
  useTheme(choice);
}

prefers.addEventListener("change", () => useTheme(stored(THEME)));
byId("tools").append(
  iconButton("theme", "Light or dark", switchTheme, { id: "theme" }),
  el("button", { type: "button", class: "icon-button", "aria-label": "Keys", title: "Keys", onclick: showHelp }, "?"),
);

// The tree's own buttons ---------------------------------------------------------------------------------------------

const foldButton = iconButton("fold", "Fold weak subtrees", () => change({ fold: !state.fold, opened: new Set(), closed: new Set() }), { id: "fold" });
const turnButton = iconButton("turn", "Let the tree grow down, or to the right", () => change({ across: !state.across }), { id: "turn" });
byId("zoom").append(
  iconButton("plus", "Zoom in", () => zoom(1.4), { class: "icon-button zoom-button" }),
  iconButton("minus", "Zoom out", () => zoom(1 / 1.4), { class: "icon-button zoom-button" }),
  iconButton("fit", "Fit the tree into the window", fit, { id: "fit" }),
  foldButton,
  turnButton,
);

byId("verifier").addEventListener("change", (event) => change({ verifier: event.target.value }));
byId("colouring").addEventListener("change", (event) => change({ colouring: event.target.value }));

watch(["version", "verifier", "colouring", "dark", "tree"], () => {
  if (!state.tree || !state.run) return;
  const names = state.run.verifiers ?? [];
  const menu = byId("verifier");
  if ([...menu.options].map((option) => option.value).join("\n") !== names.join("\n")) menu.replaceChildren(...names.map((name) => el("option", { value: name }, name)));
  menu.value = state.verifier;
  byId("legend").hidden = !state.tree.size;
  if (!state.tree.size) return;
  byId("legend-scale").replaceChildren(...legend(state));
  byId("legend-marks").replaceChildren(...marks(state));
});

watch(["fold"], () => foldButton.setAttribute("aria-pressed", String(state.fold)));

// Views, headings, what is spoken --------------------------------------------------------------------------------------

for (const button of document.querySelectorAll("#views [data-view]")) button.addEventListener("click", () => change({ view: button.dataset.view }));

watch(["view", "tree"], () => {
  for (const section of document.querySelectorAll("main > section")) section.hidden = section.dataset.view !== state.view;
  for (const button of document.querySelectorAll("#views [data-view]")) {
    if (button.dataset.view === state.view) button.setAttribute("aria-current", "page");
    else button.removeAttribute("aria-current");
  }
  document.body.dataset.view = state.view;
});

watch(["run", "status", "version", "runId"], () => {
  const prompt = state.run?.prompt ?? "";
  byId("prompt").textContent = prompt;
  byId("prompt").title = prompt;
  document.title = prompt ? `${prompt} \u2013 tsdiff` : "tsdiff";
  const pill = byId("status");
  pill.textContent = state.status ? statusWord(state.status) : "";
  pill.className = `pill state-${state.status}`;
  const empty = byId("empty");
  empty.hidden = !state.tree || state.tree.size > 0;
  empty.textContent = state.status === "running" ? "The search has begun; its first nodes will appear here." : "This run has no nodes.";
});

watch(["trouble"], () => {
  byId("trouble").textContent = state.trouble;
  byId("trouble").hidden = !state.trouble;
});

watch(["node"], () => {
  const node = state.tree?.at(state.node);
  byId("spoken").textContent = node ? `Node ${node.i}, ${operation(node.op)}, level ${node.l}, ${node.score === null ? "not scored" : `score ${number(node.score)}`}, ${plural(node.children.length, "child", "children")}` : "";
});

// Begin ---------------------------------------------------------------------------------------------------------------

async function begin() {
  useTheme(stored(THEME));
  change({ source: openSource(), across: innerWidth < 560 });
  const wish = named();
  change({ runs: await state.source.runs() });
  const first = state.runs.find((run) => run.id === wish.run) ?? (wish.run === null ? state.runs[0] : null);
  if (!state.runs.length) {
    change({ trouble: "There is no run here yet." });
    return;
  }
  if (!first) {
    change({ trouble: `There is no run ${wish.run} here.`, view: "runs" });
    return;
  }
  const many = wish.run === null && state.runs.length > 1;
  await openRun(first.id);
  follow({ ...wish, view: wish.view ?? (many ? "runs" : null) });
}

begin().catch((error) => change({ trouble: error instanceof TypeError && state.source?.live ? "tsdiff view does not answer." : error.message }));

/** For scripts in the console, and for tests: what is shown, and where a node is drawn. */
window.tsdiffPage = { state, locate, choose: (index) => follow({ node: index, other: state.other, view: null }) };
