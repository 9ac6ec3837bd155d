/** What the page shows, and who wants to know when it changes. Views read `state` and call `change`; they never call each other. */

export const state = {
  source: null, // where data comes from (api.js)
  runs: [], // all runs of the folder
  run: null, // facts of the open run
  runId: null,
  tree: null, // its nodes (model.js)
  version: 0, // grows whenever the tree has changed
  status: "",
  node: null, // index of the chosen node
  other: null, // index of the node that it is compared with
  view: "tree", // tree, gallery, compare, curve, runs
  tab: "leaders", // what the side panel shows: node, leaders, run
  time: null, // how many nodes are shown, in order of creation; null for all, also those that are still to come
  playing: false,
  verifier: null, // whose scores give the colours
  colouring: "rank", // or "value"
  fold: true, // weak subtrees are folded
  opened: new Set(), // nodes that were unfolded by hand
  closed: new Set(), // and folded by hand
  across: false, // the tree grows to the right, not down
  search: "",
  found: null, // Set of the nodes that the search box names; null where it is empty
  commands: [],
  questions: [],
  trouble: "",
  dark: false,
};

const listeners = [];
let changed = null;

/** Call `listener(changed keys)` after any of `keys` has changed. */
export function watch(keys, listener) {
  listeners.push([new Set(keys), listener]);
}

/** Change the state; listeners hear of it together, once. */
export function change(values) {
  const keys = Object.keys(values).filter((key) => state[key] !== values[key]);
  if (!keys.length) return;
  Object.assign(state, values);
  if (changed === null) {
    changed = new Set();
    queueMicrotask(tell);
  }
  for (const key of keys) changed.add(key);
}

function tell() {
  const now = changed;
  changed = null;
  for (const [keys, listener] of listeners) {
    if ([...keys].some((key) => now.has(key))) listener(now);
  }
}

/** Choose a node, and show it in the panel. */
export function choose(index) {
  if (index === null || !state.tree?.at(index)) {
    change({ node: null });
    return;
  }
  const later = state.time !== null && index >= state.time;
  change({ node: index, tab: "node", ...(later ? { time: index + 1 } : {}) });
}
