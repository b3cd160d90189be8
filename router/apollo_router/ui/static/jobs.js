// The queue, a page of it at a time.

import { api } from "./api.js";
import { $, ago, button, confirmed, el, number, problem, setText, shown } from "./dom.js";

const PAGE = 25;
const STATES = ["queued", "running", "applied", "durable", "failed", "cancelled", "quarantined", "undone"];
const GOOD = ["applied", "durable"];
const BAD = ["failed", "quarantined"];

let changed = () => {};
let before = [null]; // `before` of each page up to the one that is shown
let rows = new Map(); // job id -> {steps, loss, state, age, nodes, words: what else is shown}
let isStarted = false;

export function start(onChange) {
  changed = onChange;
  if (isStarted) return;
  isStarted = true;
  for (const state of STATES) $("state").append(el("option", { value: state }, state));
  $("state").addEventListener("change", () => {
    before = [null];
    changed();
  });
  $("older").addEventListener("click", () => {
    before.push($("older").dataset.before);
    changed();
  });
  $("newer").addEventListener("click", () => {
    before.pop();
    changed();
  });
}

export async function load(status) {
  const state = $("state").value;
  const query = new URLSearchParams({ limit: PAGE + 1 });
  if (state) query.set("state", state);
  if (before.at(-1)) query.set("before", before.at(-1));
  const { data } = await api("GET", `train/jobs?${query}`);
  const page = data.slice(0, PAGE);
  draw(page);
  $("newer").disabled = before.length === 1;
  $("older").disabled = data.length <= PAGE;
  $("older").dataset.before = page.at(-1)?.seq ?? "";
  const counts = STATES.filter((name) => status.num_jobs[name]).map((name) => `${status.num_jobs[name]} ${name}`);
  setText($("counts"), counts.join(", ") || "none yet");
  return page;
}

// Rows that say the same stay where they are: a button must not go from under a pointer, nor the focus.
function draw(page) {
  const old = rows;
  rows = new Map();
  for (const job of page) {
    const words = JSON.stringify([job.state, job.paused_at, job.undone_by, job.error]);
    const row = old.get(job.job_id)?.words === words ? old.get(job.job_id) : rowOf(job, words);
    fill(row, job);
    setText(row.age, ago(job.created_at));
    rows.set(job.job_id, row);
  }
  let nodes = [...rows.values()].flatMap((row) => row.nodes);
  if (!nodes.length) nodes = [el("tr", {}, el("td", { colspan: 7, class: "soft" }, "no jobs"))];
  const now = [...$("jobs").children];
  if (nodes.length !== now.length || nodes.some((node, i) => node !== now[i])) $("jobs").replaceChildren(...nodes);
}

// Only what moves while a job is trained; everything else waits for the next load.
export function onJob(job) {
  const row = rows.get(job.job_id);
  if (row) fill(row, job);
}

function rowOf(job, words) {
  const row = { steps: el("td", { class: "num" }), loss: el("td"), state: el("span", { class: "state" }), age: el("td"), words };
  const isOpen = job.state === "queued" || job.state === "running";
  const verbs = !isOpen
    ? []
    : [
        button("Cancel", () => cancel(job), { "aria-label": `Cancel ${job.job_id}` }),
        job.paused_at == null
          ? button("Pause", () => tell(job, "pause"), { "aria-label": `Pause ${job.job_id}` })
          : button("Resume", () => tell(job, "resume"), { "aria-label": `Resume ${job.job_id}` }),
      ];
  const cells = [
    el("th", { scope: "row", class: "mono" }, job.job_id),
    el("td", {}, row.state),
    row.steps,
    row.loss,
    el("td", { class: "num" }, String(job.num_examples)),
    row.age,
    el("td", {}, el("div", { class: "row" }, verbs)),
  ];
  row.nodes = [el("tr", {}, cells)];
  if (job.error) row.nodes.push(el("tr", {}, el("td", { colspan: 7, class: "error" }, shown(job.error, 400))));
  return row;
}

function fill(row, job) {
  const state = job.paused_at == null ? job.state : "paused";
  setText(row.state, job.undone_by == null ? state : `${state} by restoring version ${job.undone_by}`);
  row.state.className = `state ${GOOD.includes(state) ? "is-good" : BAD.includes(state) ? "is-bad" : state === "running" ? "" : "is-plain"}`;
  setText(row.steps, `${job.steps_done}/${job.num_steps}`);
  const losses = job.loss_last == null ? "" : job.steps_done < 2 ? number(job.loss_last) : `${number(job.loss_first)} → ${number(job.loss_last)}`;
  setText(row.loss, losses);
}

async function cancel(job) {
  const text = `${job.job_id} has ${job.steps_done} of ${job.num_steps} steps done; those stay in the weights.`;
  if (!(await confirmed("Cancel this job?", text, "Yes, cancel it"))) return;
  await run(() => api("DELETE", `train/jobs/${encodeURIComponent(job.job_id)}`));
}

const tell = (job, verb) => run(() => api("POST", `train/jobs/${encodeURIComponent(job.job_id)}/${verb}`));

async function run(request) {
  try {
    await request();
  } catch (error) {
    problem(error.message);
  }
  changed();
}
