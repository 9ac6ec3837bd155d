/** Numbers and words as people read them. */

const MINUS = "\u2212";

/** A score or scale in at most four significant digits; a dash where there is none. */
export function number(value, digits = 4) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "\u2013";
  if (value === 0) return "0";
  const size = Math.abs(value);
  let text;
  if (size >= 1e6 || size < 1e-4) text = size.toExponential(Math.max(0, digits - 2)).replace("e+", "e").replace("e-", `e${MINUS}`);
  else if (size >= 10 ** (digits - 1)) text = Math.round(size).toLocaleString("en");
  else text = String(Number(size.toPrecision(digits)));
  return value < 0 ? MINUS + text : text;
}

/** A whole number with thousands set apart. */
export function count(value) {
  return value === null || value === undefined ? "\u2013" : value.toLocaleString("en");
}

/** "1 node", "2 nodes". */
export function plural(value, one, many = `${one}s`) {
  return `${count(value)} ${value === 1 ? one : many}`;
}

const OPERATIONS = {
  draw: "first noise",
  noise: "first noise",
  denoise: "denoised",
  renoise: "re-noised",
  mix: "mixed",
  neighbour: "neighbour of a noise",
};

/** What an operation did, in a word or two. */
export function operation(op) {
  return OPERATIONS[op] ?? op;
}

/** What a status means, in a word. */
export function statusWord(status) {
  return { done: "finished", running: "running", interrupted: "interrupted", killed: "killed", failed: "failed" }[status] ?? status;
}

/** A plain value of JSON in one line. */
export function plain(value) {
  if (value === null || value === undefined) return "\u2013";
  if (typeof value === "number") return number(value, 6);
  if (typeof value === "string") return value;
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (Array.isArray(value) && value.every((item) => typeof item === "number")) {
    return value.length > 8 ? `${value[0]} \u2026 ${value[value.length - 1]} (${value.length})` : value.map((item) => number(item)).join(", ");
  }
  if (Array.isArray(value)) return value.map(plain).join(", ");
  return Object.entries(value).map(([key, item]) => `${key} ${plain(item)}`).join(", ");
}
