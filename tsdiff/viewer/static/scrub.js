/** The order of creation: a slider over it, and a button that plays it. Behind it, the scores as they came. */

import { ramp, steps } from "./colour.js";
import { count, number, plural } from "./format.js";
import { change, state, watch } from "./state.js";
import { byId, el, icon } from "./dom.js";

const HIGH = 36;
const LASTS = 9000; // milliseconds of a whole replay
const place = byId("scrubber");
const play = el("button", { type: "button", class: "icon-button", onclick: toggle });
const slider = el("input", { type: "range", min: 1, step: 1, id: "time", "aria-label": "Nodes shown, in order of creation" });
const rise = el("canvas", { class: "rise", height: HIGH, "aria-hidden": "true" });
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

/** Every score, by the order in which its node was made; what is still to come is faint. */
function draw() {
  const nodes = state.tree?.nodes ?? [];
  const wide = rise.clientWidth;
  if (!nodes.length || !wide) return;
  const scale = devicePixelRatio || 1;
  rise.width = wide * scale;
  rise.height = HIGH * scale;
  const pen = rise.getContext("2d");
  pen.scale(scale, scale);
  const levels = steps(state.tree, state.verifier, "rank");
  const colours = ramp(state.dark);
  const many = Math.max(1, nodes.length - 1);
  const dot = nodes.length > 3000 ? 1.6 : nodes.length > 300 ? 2.4 : 3.4;
  const time = state.time ?? nodes.length;
  for (let index = 0; index < nodes.length; index += 1) {
    const level = levels[index];
    if (level < 0) continue;
    pen.globalAlpha = index < time ? 1 : 0.22;
    pen.fillStyle = colours[level];
    const x = 6 + (index / many) * (wide - 12); // the slider's thumb keeps to this too
    pen.fillRect(x - dot / 2, HIGH - 5 - (level / colours.length) * (HIGH - 10) - dot / 2, dot, dot);
  }
}

watch(["time", "version", "playing", "runId", "tree"], render);
watch(["version", "tree", "dark", "view", "verifier", "time"], draw);
new ResizeObserver(draw).observe(rise);
