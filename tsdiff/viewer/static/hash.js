/** Deep links: the address names the run, the node and the view, and is followed when it is changed by hand. */

import { open } from "./runs.js";
import { change, choose, state, watch } from "./state.js";

const VIEWS = new Set(["tree", "gallery", "compare", "curve", "runs", "rate"]);

/** What the address names; null for what it does not. */
export function named() {
  const facts = new URLSearchParams(location.hash.slice(1));
  const index = (name) => (/^\d{1,9}$/.test(facts.get(name) ?? "") ? Number(facts.get(name)) : null);
  return { run: facts.get("run"), node: index("node"), other: index("other"), view: VIEWS.has(facts.get("view")) ? facts.get("view") : null };
}

/** Choose what the address names within the open run. */
export function follow({ node, other, view }) {
  if (node !== null) choose(node);
  change({ other, ...(view ? { view } : {}) });
}

function write() {
  if (state.runId === null || !state.tree) return;
  const facts = new URLSearchParams();
  if (state.runs.length > 1 || state.runId !== ".") facts.set("run", state.runId);
  if (state.node !== null) facts.set("node", String(state.node));
  if (state.other !== null && state.view === "compare") facts.set("other", String(state.other));
  if (state.view !== "tree") facts.set("view", state.view);
  const wanted = facts.toString();
  if (wanted !== location.hash.slice(1)) history.replaceState(null, "", `${location.pathname}${location.search}${wanted ? `#${wanted}` : ""}`);
}

addEventListener("hashchange", async () => {
  const wish = named();
  if (wish.run !== null && wish.run !== state.runId) await open(wish.run, wish.view ?? "tree");
  follow(wish);
});

watch(["runId", "node", "other", "view", "tree"], write);
