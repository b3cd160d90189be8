// What runs now: its progress, its losses, how fast, how long still.

import { api } from "./api.js";
import { lineChart } from "./chart.js";
import { $, ago, bytes, duration, figures, number, setText } from "./dom.js";

const MAX_POINTS = 5000; // of a curve while it grows
const CHART_MS = 400;
const WINDOW_S = 60; // the rate is that of the last minute

let status = null;
let beat = null;
let job = null; // {job_id, num_steps, ...} whose curve is shown
let points = []; // [step, loss]
let history = []; // [seconds, steps done] of the job
let tokens = []; // [seconds, tokens] of the worker
let drawnAt = 0;
let timer = null;
let plan = null; // of the memory: null not asked for, undefined on its way, else {trainer_bytes} or {error}

export function onStatus(newest) {
  status = newest;
  tokens.push([performance.now() / 1000, newest.tally.num_tokens]);
  tokens = tokens.filter(([at]) => at > tokens.at(-1)[0] - WINDOW_S);
  memory();
  show();
}

export function onBeat(newest) {
  beat = newest;
  show();
}

export function onJob(newest) {
  if (job?.job_id !== newest.job_id) {
    points = [];
    history = [];
    if (newest.steps_done > 1 && !newest.loss_history) recall(newest.job_id);
  }
  job = newest;
  const at = performance.now() / 1000;
  if (!history.length || history.at(-1)[1] !== newest.steps_done) history.push([at, newest.steps_done]);
  history = history.filter(([then]) => then > at - WINDOW_S);
  if (newest.loss_history) points = curve(newest);
  else if (newest.loss_last != null && points.at(-1)?.[0] !== newest.steps_done) points.push([newest.steps_done, newest.loss_last]);
  if (points.length > MAX_POINTS) points = points.filter((_, i) => i % 2);
  show();
}

// The newest job that was trained, where none is: it may have been too short to be seen running.
export async function onNewest(newest) {
  const isTraining = beat?.progress?.activity === "training";
  if (!newest || isTraining || newest.job_id === job?.job_id) return;
  onJob(await api("GET", `train/jobs/${encodeURIComponent(newest.job_id)}`));
}

// What a page that was opened late has missed.
async function recall(jobId) {
  try {
    const whole = await api("GET", `train/jobs/${encodeURIComponent(jobId)}`);
    if (job?.job_id !== jobId) return;
    const known = points.length ? points[0][0] : Infinity;
    points = [...curve(whole).filter(([step]) => step < known), ...points];
    show();
  } catch { /* the curve begins where the page was opened */ }
}

const curve = (whole) => whole.loss_history.map((loss, i) => [i + 1, loss]).filter(([, loss]) => loss != null);

function rate(samples) {
  if (samples.length < 2) return null;
  const [[at0, n0], [at1, n1]] = [samples[0], samples.at(-1)];
  return at1 > at0 ? Math.max(0, n1 - n0) / (at1 - at0) : null;
}

function show() {
  const progress = beat?.progress ?? status?.progress;
  const isTraining = progress?.activity === "training" && progress.job_id;
  const steps = $("steps");
  if (isTraining) setText($("doing"), `Training ${progress.job_id}`);
  else setText($("doing"), beat && !beat.is_up ? "The training worker does not answer; serving goes on" : progress?.activity ?? "–");
  steps.hidden = !isTraining;
  if (isTraining) {
    steps.max = Math.max(1, progress.num_steps);
    steps.value = progress.steps_done;
  }
  const stepRate = isTraining ? rate(history) : null;
  const left = stepRate ? (progress.num_steps - progress.steps_done) / stepRate : null;
  const tokenRate = rate(tokens);
  figures($("figures"), [
    ["step", isTraining ? `${progress.steps_done} of ${progress.num_steps}` : null],
    ["loss", progress?.loss == null ? (job?.loss_last == null ? null : number(job.loss_last)) : number(progress.loss)],
    ["tokens a second", isTraining && tokenRate ? number(tokenRate, 3) : null],
    ["time left", isTraining ? duration(left) ?? "…" : null],
    ["served weights", status ? `version ${beat?.weight_version ?? status.weight_version}` : null],
    ["on disk", status ? `version ${status.durable_version}` : null],
    ["waiting", status ? String(status.num_queued) : null],
    ["oldest waits", status?.oldest_queued_at ? duration(Date.now() / 1000 - status.oldest_queued_at) : null],
  ]);
  if (timer === null) timer = setTimeout(chart, Math.max(0, drawnAt + CHART_MS - performance.now()));
}

function chart() {
  timer = null;
  drawnAt = performance.now();
  if (!job) return;
  lineChart($("loss"), {
    title: `Loss of ${job.job_id} in nats a token, by step`,
    series: [{ name: `loss of ${job.job_id}, nats a token, by step`, points }],
    xLabel: (x) => String(Math.round(x)),
  });
}

async function forecast() {
  plan = undefined;
  try {
    plan = await api("GET", "train/ui/plan");
  } catch (error) {
    plan = { error: error.message };
  }
  memory();
}

function memory() {
  const { memory_bytes: own = {}, last_sync: sync, tally } = status;
  const moments = status.optimizer_state_bytes;
  if (plan === null && status.attached) forecast();
  figures($("memory-figures"), [
    ["trainer's own memory", bytes(own.trainer)],
    ["of it the optimizer's moments", moments ? bytes(moments) : null],
    ["most reserved on the GPU", status.device_bytes ? bytes(status.device_bytes) : null],
    ["training at its peak, by plan", plan?.error ?? (plan ? bytes(plan.trainer_bytes) : "being computed")],
    ["front's own memory", bytes(own.front)],
    ["last checkpoint", sync ? `version ${sync.weight_version}, ${ago(sync.committed_at)}` : "none yet"],
    ["it took", sync ? `${duration(sync.duration_s)}, ${bytes(sync.bytes_written)}` : null],
    ["training waited for it", sync ? duration(sync.training_waited_s) : null],
    ["checkpoints that failed", String(tally.num_sync_failures)],
    ["steps cut off and mended", String(tally.num_torn_steps)],
    ["trainers that hung", String(status.num_watchdog_kills)],
  ]);
}
