/** Where nodes stand: d3's tidy tree over all that is not folded. Breadth runs over siblings, depth over generations. */

import { hierarchy, tree } from "./vendor/d3-hierarchy.js";

export const STEP = 58; // between siblings
export const ROW = 78; // between generations

/** Whether a node is drawn large: one with a picture or a score. */
export function isLarge(node) {
  return (node.th !== null && node.th !== undefined) || (node.score !== null && node.score !== undefined);
}

/** Places for a tree: `breadth` and `depth` by node index (NaN where folded away), the `shown` nodes and the `folded` ones. */
export function place(model, folded) {
  const top = hierarchy({ children: model.roots }, (node) => (folded.has(node.i) ? null : node.children));
  const width = ({ data }) => (isLarge(data) ? 1 : 0.5);
  tree().nodeSize([1, 1]).separation((one, two) => ((width(one) + width(two)) / 2) * (one.parent === two.parent ? 1 : 1.25))(top);
  const breadth = new Float64Array(model.nodes.length).fill(NaN);
  const depth = new Float64Array(model.nodes.length).fill(NaN);
  const shown = [];
  const rows = [];
  let low = Infinity;
  let high = -Infinity;
  top.each((item) => {
    if (!item.depth) return; // stands above all roots and is no node
    const { i } = item.data;
    breadth[i] = item.x * STEP;
    depth[i] = (item.depth - 1) * ROW;
    shown.push(item.data);
    (rows[item.depth - 1] ??= []).push(item.data);
    low = Math.min(low, breadth[i]);
    high = Math.max(high, breadth[i]);
  });
  for (const row of rows) row.sort((one, two) => breadth[one.i] - breadth[two.i]);
  if (!shown.length) [low, high] = [0, 0];
  return { breadth, depth, shown, rows, folded, low, high, deep: Math.max(0, rows.length - 1) * ROW };
}

/** The nodes that are folded: the weak ones if wanted, unless opened by hand, and those closed by hand. */
export function foldedNodes(model, { fold, opened, closed, node }) {
  const found = new Set(closed);
  if (fold) for (const index of model.weak()) if (!opened.has(index)) found.add(index);
  for (let at = model.at(model.at(node)?.p); at; at = model.at(at.p)) found.delete(at.i); // what is chosen can be seen
  return found;
}

/** The next node in a direction of the tree: "up", "down", "before" or "after". */
export function neighbour(model, places, index, direction) {
  const node = model.at(index);
  if (!node) return model.best ?? model.roots[0]?.i ?? null;
  if (direction === "up") return node.p ?? index;
  if (direction === "down") {
    if (!node.children.length) return index;
    return node.children.reduce((best, child) => (child.reach > best.reach ? child : best)).i;
  }
  const row = places.rows[Math.round(places.depth[index] / ROW)] ?? [];
  const next = row[row.indexOf(node) + (direction === "after" ? 1 : -1)];
  return next ? next.i : index;
}
