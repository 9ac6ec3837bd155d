/** Following: what is new is asked for each second while a run goes on or something asked of it is not done. */

import { Tree } from "./model.js";
import { change, state } from "./state.js";

const FAST = 1000;
const SLOW = 10000;
let timer = 0;
let busy = false;
let again = false;
let failures = 0;

/** Open a run: its facts and its tree. */
export async function openRun(id) {
  change({ runId: id, run: null, tree: null, time: null, playing: false, commands: [], opened: new Set(), closed: new Set(), found: null });
  const [run, update] = await Promise.all([state.source.run(id), state.source.tree(id, null)]);
  if (state.runId !== id) return;
  const tree = new Tree(run.verifiers?.[0] ?? "");
  tree.merge({ ...update, restarted: true });
  const verifier = run.verifiers?.includes(state.verifier) ? state.verifier : tree.verifier;
  change({ run, tree, verifier, status: update.status ?? run.status, fold: tree.size > 400, version: state.version + 1 });
  schedule();
}

function unfinished() {
  return state.commands.some((command) => command.state === "waiting" || command.state === "running");
}

function pause() {
  if (failures) return Math.min(SLOW, FAST * 2 ** failures);
  if (document.hidden) return SLOW;
  return state.status === "running" || unfinished() || state.questions.length ? FAST : SLOW;
}

function schedule() {
  clearTimeout(timer);
  if (state.source.live) timer = setTimeout(look, pause());
}

/** Look at once; if it is being looked already, once more after that. */
export function lookNow() {
  clearTimeout(timer);
  if (busy) again = true;
  else look();
}

async function look() {
  busy = true;
  try {
    await Promise.all([lookAtRun(), lookAround()]);
    failures = 0;
    change({ trouble: "" });
  } catch (error) {
    failures += 1;
    const what = error instanceof TypeError ? "tsdiff view does not answer; this is what it told last." : error.message;
    change({ trouble: what });
  } finally {
    busy = false;
    if (again) {
      again = false;
      look();
    } else schedule();
  }
}

async function lookAtRun() {
  const { runId, tree } = state;
  if (!tree) return;
  const before = state.status;
  const [update, commands] = await Promise.all([state.source.tree(runId, tree.token), state.source.commands(runId)]);
  if (state.runId !== runId) return;
  if (tree.merge(update)) change({ version: state.version + 1 });
  change({ status: update.status, ...(same(commands, state.commands) ? {} : { commands }) });
  if (before !== update.status) change({ run: await state.source.run(runId) });
}

async function lookAround() {
  const [questions, runs] = await Promise.all([state.source.questions(), state.runs.length > 1 ? state.source.runs() : state.runs]);
  change({ ...(same(questions, state.questions) ? {} : { questions }), ...(same(runs, state.runs) ? {} : { runs }) });
}

function same(one, two) {
  return JSON.stringify(one) === JSON.stringify(two);
}

document.addEventListener("visibilitychange", () => {
  if (!document.hidden && state.source?.live && state.tree) lookNow();
});
