// POST /teach: a fact in many forms, its phases, and what the examination found.

import { api } from "./api.js";
import { $, el, number, shown } from "./dom.js";

const LOOK_MS = 1000;
const WAY = ["preparing", "training", "checking"];
const ENDED = ["applied", "rolled back", "failed", "cancelled"];

let running = null; // the lesson that may be cancelled
let isStarted = false;

export function clear() {
  for (const id of ["phases", "report", "teach-cancel"]) $(id).hidden = true;
}

// Resolves to a sentence on how it ended, where there is something to compare; else it throws why not.
export async function teach(question, answer, key, say, changed) {
  if (!isStarted) {
    isStarted = true;
    $("teach-cancel").addEventListener("click", () => cancel(say));
  }
  const fact = key ? { question, answer, key } : { question, answer };
  let job = await api("POST", "teach", { facts: [fact] });
  running = job.teach_id;
  $("teach-cancel").hidden = false;
  changed();
  try {
    for (;;) {
      phases(job);
      if (ENDED.includes(job.status)) break;
      say(`${job.teach_id}: ${job.is_cancelled ? "to be cancelled, after " : ""}${job.status}${job.round ? `, round ${job.round}` : ""}`);
      await new Promise((done) => setTimeout(done, LOOK_MS));
      job = await look(job);
    }
  } finally {
    running = null;
    $("teach-cancel").hidden = true;
  }
  changed();
  report(job);
  const reason = job.error ?? job.report?.reason;
  if (job.status === "failed") throw new Error(`The lesson failed: ${reason ?? "no reason given"}`);
  return `The lesson is ${job.status}${reason ? `: ${reason}` : ""}.`;
}

// A connection that is lost for a moment ends nothing: the lesson goes on without this page.
async function look(job) {
  try {
    return await api("GET", `teach/jobs/${encodeURIComponent(job.teach_id)}`);
  } catch (error) {
    if (error.status) throw error;
    return job;
  }
}

async function cancel(say) {
  try {
    if (running) await api("DELETE", `teach/jobs/${encodeURIComponent(running)}`);
  } catch (error) {
    say(error.message);
  }
}

function phases(job) {
  const last = ENDED.includes(job.status) ? job.status : job.status === "going back" ? "going back" : "applied or rolled back";
  const names = [...WAY, last];
  const items = names.map((name) => el("li", { "aria-current": name === job.status ? "step" : null }, name));
  $("phases").replaceChildren(...items);
  $("phases").hidden = false;
}

const count = (answers) => `${answers.filter((one) => one.is_right).length} of ${answers.length}`;

function report(job) {
  const told = job.report;
  $("report").hidden = !told;
  if (!told) return;
  const rows = told.facts.map((one) =>
    el(
      "tr",
      {},
      el("th", { scope: "row" }, shown(one.fact.question, 200)),
      el("td", {}, el("span", { class: `state ${one.taught.is_right ? "is-good" : "is-bad"}` }, one.taught.is_right ? "known" : "not known")),
      ...[one.paraphrased, one.reversed, one.not_it].map((answers) => el("td", { class: "num" }, count(answers))),
    ),
  );
  const heads = ["Fact", "Its own question", "Paraphrased", "Reversed", "Near misses that name it"];
  const table = el("table", {}, el("thead", {}, el("tr", {}, heads.map((name, i) => el("th", { scope: "col", class: i > 1 ? "num" : null }, name)))), el("tbody", {}, rows));
  $("report").replaceChildren(
    el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "What the examination found" }, table),
    el("p", { class: "soft" }, `General answers lose ${number(told.rise, 2)} nats a token; of what was asked ${number(100 * told.known, 3)} % is right.`),
    ...(told.writing?.reason ? [el("p", { class: "soft" }, `Its forms: ${shown(told.writing.reason, 300)}.`)] : []),
    ...told.facts.map(examination),
  );
}

function examination(one) {
  const asked = [one.taught, ...one.paraphrased, ...one.reversed, ...one.not_it];
  const rows = asked.map((answer) =>
    el("tr", {}, el("th", { scope: "row" }, shown(answer.question, 200)), el("td", {}, shown(answer.before, 200)), el("td", {}, shown(answer.after, 200))),
  );
  const table = el("table", { class: "wrapping" }, el("thead", {}, el("tr", {}, ["Asked", "Before", "Afterwards"].map((name) => el("th", { scope: "col" }, name)))), el("tbody", {}, rows));
  const label = `What was asked about: ${shown(one.fact.question, 120)}`;
  return el("details", {}, el("summary", {}, label), el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, table));
}
