/** The tree of one run: nodes as the server sends them, linked to their parents and children. */

const HIGHEST = -Infinity;

export class Tree {
  constructor(verifier) {
    this.verifier = verifier; // whose scores rank the samples
    this.nodes = [];
    this.best = null;
    this.token = "";
  }

  /** Take in what is new; whether anything was. */
  merge(update) {
    if (update.restarted) this.nodes = [];
    this.token = update.token;
    const moved = this.best !== update.best;
    this.best = update.best;
    for (const facts of update.nodes) {
      const known = this.nodes[facts.i];
      if (known) Object.assign(known, facts);
      else this.nodes[facts.i] = { ...facts, children: [] };
    }
    if (!update.nodes.length && !update.restarted) return moved;
    this.link();
    return true;
  }

  /** Find each node's children, how many come after it, and the best score among them and itself. */
  link() {
    const { nodes } = this;
    this.roots = [];
    this.size = 0;
    this.scored = [];
    for (const node of nodes) {
      if (!node) continue; // a gap that a later answer fills
      node.children = [];
      node.below = 0;
      node.score = node.s?.[this.verifier] ?? null;
      node.reach = node.score ?? HIGHEST;
      if (node.score !== null && node.fin && !node.d && node.f === null) this.scored.push(node);
      this.size += 1;
      const parent = node.p === null ? undefined : nodes[node.p];
      node.depth = parent ? parent.depth + 1 : 0;
      if (parent) parent.children.push(node);
      else this.roots.push(node);
    }
    for (let index = nodes.length - 1; index >= 0; index -= 1) {
      const node = nodes[index];
      const parent = node && node.p !== null ? nodes[node.p] : undefined;
      if (!parent) continue;
      parent.below += node.below + 1;
      if (node.reach > parent.reach) parent.reach = node.reach;
    }
    this.scored.sort((one, two) => two.score - one.score || one.i - two.i);
    this.scales = new Map();
    this.operations = [...new Set(nodes.filter(Boolean).map((node) => node.op))];
  }

  at(index) {
    return index === null || index === undefined ? undefined : this.nodes[index];
  }

  /** Nodes from the root to a node. */
  path(index) {
    const found = [];
    for (let node = this.at(index); node; node = this.at(node.p)) found.push(node);
    return found.reverse();
  }

  /** The finished samples, best first: of those that were there at a time, where one is given. */
  leaders(time = null) {
    return time === null ? this.scored : this.scored.filter((node) => node.i < time);
  }

  /** The best finished sample among the first nodes. */
  bestAt(time) {
    return time === null ? this.at(this.best) : this.leaders(time)[0];
  }

  /** All scores of a verifier in rising order. */
  scale(verifier) {
    let scores = this.scales.get(verifier);
    if (!scores) {
      const found = [];
      for (const node of this.nodes) {
        const score = node?.s?.[verifier];
        if (score !== null && score !== undefined) found.push(score);
      }
      scores = Float64Array.from(found).sort();
      this.scales.set(verifier, scores);
    }
    return scores;
  }

  /** Nodes whose subtrees are weak: large enough to be in the way, and no sample that came of them is among the best. */
  weak() {
    const found = new Set();
    const scores = this.scored;
    if (scores.length < 4) return found;
    const bar = scores[Math.min(scores.length - 1, Math.max(3, Math.ceil(scores.length * 0.1)))].score;
    const visit = [...this.roots];
    while (visit.length) {
      const node = visit.pop();
      if (!node.below) continue;
      if (node.below >= 3 && node.reach < bar) found.add(node.i);
      else visit.push(...node.children);
    }
    return found;
  }
}
