// Teach and compare: a question, a correction, a job, and the same question again.

import { api } from "./api.js";
import { $, el, number, setText, shown } from "./dom.js";
import * as lesson from "./lesson.js";

const MAX_TOKENS = 160;
const LOOK_MS = 1000;
const STEPS = [0.02, 0.1, 0.3]; // from which a change of probability is slight, clear, large
const ENDED = ["applied", "durable", "failed", "cancelled", "quarantined", "undone"];

let changed = () => {};
let model = null;
let asked = null; // {question, answer, promptTokens}
let waiting = null; // {jobId, done}: the lesson that is being trained
let isStarted = false;

export function start(session, onChange) {
  model = session.model;
  changed = onChange;
  $("how").hidden = !session.has_teacher;
  if (!session.has_teacher) $("how-answer").checked = true;
  choose();
  if (isStarted) return;
  isStarted = true;
  $("lr").value = String(Math.max(session.train.lr, 1e-4));
  $("epochs").value = "8";
  $("how").addEventListener("change", choose);
  $("ask").addEventListener("submit", guarded(ask));
  $("correct").addEventListener("submit", guarded(teach));
}

export function onEnd(job) {
  if (waiting?.jobId === job.job_id) waiting.done(job);
}

const isFact = () => $("how-fact").checked;

function choose() {
  $("for-fact").hidden = !isFact();
  $("for-answer").hidden = isFact();
}

function guarded(action) {
  return async (event) => {
    event.preventDefault();
    const buttons = [...$("teach").querySelectorAll("form button")];
    buttons.forEach((one) => (one.disabled = true));
    try {
      await action();
    } catch (error) {
      say(error.message);
    } finally {
      buttons.forEach((one) => (one.disabled = false));
    }
  };
}

const say = (text) => setText($("teach-state"), shown(text, 600));

async function ask() {
  say("Asking …");
  $("compared").hidden = true;
  lesson.clear();
  const question = $("question").value.trim();
  const said = await answerTo(question);
  asked = { question, ...said };
  setText($("answer"), shown(said.answer) || "(nothing)");
  $("correct").hidden = false;
  say("");
  $("correction").focus();
}

async function teach() {
  const { question, answer } = asked;
  if ($("question").value.trim() !== question) throw new Error("The question is another one now: ask it first, then correct what the model says.");
  const correction = $("correction").value.trim();
  lesson.clear();
  say("Measuring what the model thinks of both answers …");
  const texts = [answer, correction];
  const before = await scores(question, texts);
  const ended = isFact() ? await lesson.teach(question, correction, $("fact-key").value.trim(), say, changed) : await train(question, correction);
  say(`${ended} Asking again …`);
  const [again, after] = [await answerTo(question), await scores(question, texts)];
  compare(answer, correction, again.answer, before, after);
  say(`${ended} ${again.answer === answer ? "The answer is the same as before." : "The answer has changed."}`);
}

async function train(question, correction) {
  const lr = Number($("lr").value.replace(",", "."));
  if (!(lr > 0)) throw new Error(`Learning rate: ${$("lr").value || "nothing"} is no number above 0, such as 0.0001`);
  const options = { lr, epochs: Number($("epochs").value), schedule: "constant", on_duplicate: "train" };
  const messages = [{ role: "user", content: question }, { role: "assistant", content: correction }];
  const job = await api("POST", "train", { examples: [{ messages }], options });
  say(`Training ${job.job_id} …`);
  changed();
  const ended = await endOf(job.job_id);
  if (ended.state !== "applied" && ended.state !== "durable") throw new Error(`${ended.job_id} ${ended.state}: ${ended.error ?? "no reason given"}`);
  return `Applied in weight version ${ended.weight_version}; loss ${ended.loss_first?.toPrecision(3)} → ${ended.loss_last?.toPrecision(3)}.`;
}

// By the page's events, and by asking, where an event was lost with a connection.
async function endOf(jobId) {
  let timer;
  const heard = new Promise((done) => (waiting = { jobId, done }));
  const seen = new Promise((done, fail) => {
    const look = async () => {
      try {
        const job = await api("GET", `train/jobs/${encodeURIComponent(jobId)}`);
        if (ENDED.includes(job.state)) return done(job);
        say(`Training ${jobId}: step ${job.steps_done} of ${job.num_steps}${job.state === "queued" ? ", waiting for its turn" : ""}`);
      } catch (error) {
        if (error.status === 404 || error.status === 401) return fail(error);
      }
      timer = setTimeout(look, LOOK_MS);
    };
    look();
  });
  try {
    return await Promise.race([heard, seen]);
  } finally {
    clearTimeout(timer);
    waiting = null;
  }
}

// vLLM's own chat, below /train/v1 where the session is good; greedy, so that both times only the weights differ.
const chat = (messages, more) => api("POST", "train/v1/chat/completions", { model, messages, temperature: 0, ...more });

async function answerTo(question) {
  const reply = await chat([{ role: "user", content: question }], { max_tokens: MAX_TOKENS });
  return { answer: (reply.choices[0].message.content ?? "").trim(), promptTokens: reply.usage.prompt_tokens };
}

// Of each text, as an answer to the question: its tokens, each with its log-probability; null where it cannot be had.
function scores(question, texts) {
  return Promise.all(texts.map((text) => (text ? score(question, text).catch(() => null) : null)));
}

async function score(question, text) {
  const messages = [{ role: "user", content: question }, { role: "assistant", content: text }];
  const reply = await chat(messages, { max_tokens: 1, prompt_logprobs: 0, add_generation_prompt: false, continue_final_message: true });
  const tokens = (reply.prompt_logprobs ?? []).slice(asked.promptTokens).map((one) => Object.values(one ?? {})[0]);
  return tokens.every(Boolean) ? tokens.map((one) => ({ text: one.decoded_token, logprob: one.logprob })) : null;
}

function compare(answer, correction, again, before, after) {
  const column = (title, text, i) =>
    el("div", {}, el("h3", {}, title), i === null ? el("div", { class: "said" }, shown(text) || "(nothing)") : coloured(text, before[i], after[i]));
  $("compared").replaceChildren(
    column("Before", answer, 0),
    column("Your correction", correction, 1),
    column("Now", again, null),
    el("p", { class: "key" }, "Tokens whose probability moved: ", el("span", { class: "up2" }, "likelier now"), " (solid line), ", el("span", { class: "down2" }, "less likely"), " (dotted); bold: by 30 points and more."),
  );
  $("compared").hidden = false;
}

const percent = (logprob) => `${number(100 * Math.exp(logprob), 2)} %`;

function coloured(text, before, after) {
  const box = el("div", { class: "said", tabindex: "0" });
  if (!before || !after || before.length !== after.length) {
    box.append(shown(text) || "(nothing)");
    return box;
  }
  before.forEach((token, i) => {
    const moved = Math.exp(after[i].logprob) - Math.exp(token.logprob);
    const size = STEPS.filter((step) => Math.abs(moved) >= step).length;
    const title = `${percent(token.logprob)} → ${percent(after[i].logprob)}`;
    box.append(el("span", { title, class: size ? `${moved > 0 ? "up" : "down"}${size}` : null }, shown(token.text)));
  });
  const mean = (tokens) => tokens.reduce((sum, one) => sum + one.logprob, 0) / tokens.length;
  const line = `${percent(mean(before))} → ${percent(mean(after))} a token`;
  return el("div", {}, box, el("p", { class: "soft" }, line));
}
