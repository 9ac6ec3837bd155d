/** The order of creation: a slider over it, and a button that plays it. Behind it, how the best score rose. */

import { count, number, plural } from "./format.js";
import { change, state, watch } from "./state.js";
import { byId, el, icon } from "./dom.js";

const LASTS = 9000; // milliseconds of a whole replay
const place = byId("scrubber");
const play = el("button", { type: "button", class: "icon-button", onclick: toggle });
const slider = el("input", { type: "range", min: 1, step: 1, id: "time", "aria-label": "Nodes shown, in order of creation" });
const rise = el("canvas", { class: "rise", height: 28, "aria-hidden": "true" });
const told = el("output", { for: "time", class: "figure" });
place.append(play, el("div", { class: "track" }, rise, slider), told);

let started = 0;
let from = 0;

slider.addEventListener("input", () => {
  const time = Number(slider.value);
  change({ playing: false, time: time >= state.tree.nodes.length ? null : time });
});

/** Play from where the slider is, or from the beginning if it is at the end; or stop. */
export function toggle() {
  if (!state.tree?.nodes.length) return;
  if (state.playing) {
    change({ playing: false });
    return;
  }
  from = state.time === null ? 0 : state.time;
  started = performance.now();
  change({ playing: true, time: Math.max(1, from) });
  requestAnimationFrame(step);
}

function step(now) {
  if (!state.playing || !state.tree) return;
  const many = state.tree.nodes.length;
  const pace = many / Math.min(LASTS, Math.max(2500, many * 60));
  const time = Math.max(1, Math.floor(from + (now - started) * pace));
  if (time >= many) change({ playing: false, time: null });
  else {
    change({ time });
    requestAnimationFrame(step);
  }
}

function render() {
  const many = state.tree?.nodes.length ?? 0;
  place.hidden = !many;
  if (!many) return;
  const time = state.time ?? many;
  slider.max = String(many);
  slider.value = String(time);
  const name = state.playing ? "Pause" : "Play the search in order of creation";
  if (play.getAttribute("aria-label") !== name) {
    play.replaceChildren(icon(state.playing ? "pause" : "play"));
    play.setAttribute("aria-label", name);
    play.title = name;
  }
  const last = state.tree.nodes[time - 1];
  const best = state.tree.bestAt(state.time);
  const parts = [state.time === null ? plural(many, "node") : `${count(time)} of ${plural(many, "node")}`];
  if (last?.n !== null && last?.n !== undefined) parts.push(`${count(last.n)} NFE`);
  if (best) parts.push(`best ${number(best.score)}`);
  told.textContent = parts.join("  \u00b7  ");
  slider.setAttribute("aria-valuetext", parts.join(", "));
}

/** The best score so far, by order of creation. */
function draw() {
  const nodes = state.tree?.nodes ?? [];
  const wide = rise.clientWidth;
  if (!nodes.length || !wide) return;
  const scale = devicePixelRatio || 1;
  rise.width = wide * scale;
  rise.height = 28 * scale;
  const pen = rise.getContext("2d");
  pen.scale(scale, scale);
  const scored = [...state.tree.scored].sort((one, two) => one.i - two.i);
  if (scored.length < 2) return;
  const style = getComputedStyle(document.documentElement);
  const high = scored.reduce((most, node) => Math.max(most, node.score), -Infinity);
  const low = scored[0].score;
  const y = (score) => 25 - (high > low ? (score - low) / (high - low) : 1) * 20;
  const x = (index) => 8 + (index / Math.max(1, nodes.length - 1)) * (wide - 16); // the slider's thumb keeps to this too
  pen.beginPath();
  pen.moveTo(x(scored[0].i), 28);
  let best = -Infinity;
  for (const node of scored) {
    if (node.score <= best) continue;
    if (best > -Infinity) pen.lineTo(x(node.i), y(best));
    best = node.score;
    pen.lineTo(x(node.i), y(best));
  }
  pen.lineTo(x(nodes.length - 1), y(best));
  pen.lineTo(x(nodes.length - 1), 28);
  pen.closePath();
  pen.globalAlpha = 0.22;
  pen.fillStyle = style.getPropertyValue("--accent").trim();
  pen.fill();
}

watch(["time", "version", "playing", "runId", "tree"], render);
watch(["version", "tree", "dark", "view"], draw);
new ResizeObserver(draw).observe(rise);
