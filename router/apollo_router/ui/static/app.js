// The page: logs in, listens, and hands what it hears to the sections, once a frame.

import { api, listen } from "./api.js";
import { $, announce, problem, setText, shown } from "./dom.js";
import * as jobs from "./jobs.js";
import * as now from "./now.js";
import * as quality from "./quality.js";
import * as serving from "./serving.js";
import * as teach from "./teach.js";
import * as versions from "./versions.js";

const STATUS_MS = 3000;
const SERVING_MS = 5000;
const QUALITY_MS = 30000;
const KNOWN = "apollo-ipc session until"; // in ms; the cookie itself is not for scripts to see

let stop = null; // ends what a session has started
let pending = {}; // event -> its newest data; of `job` and `end` the newest of each job
let isDue = false;
let isAsking = false;
let isAskedAgain = false;
let seen = {}; // of the last status: what tells that lists have changed

// However many events arrive: the newest of each kind is drawn, once a frame.
function onEvent(name, data) {
  if (name === "beat") pending.beat = data;
  else (pending[name] ??= new Map()).set(data.job_id, data);
  if (!isDue) {
    isDue = true;
    requestAnimationFrame(draw);
  }
}

function draw() {
  isDue = false;
  const { beat, job, end } = pending;
  pending = {};
  for (const one of job?.values() ?? []) {
    now.onJob(one);
    jobs.onJob(one);
  }
  if (beat) onBeat(beat);
  for (const one of end?.values() ?? []) {
    now.onJob(one);
    jobs.onJob(one);
    teach.onEnd(one);
    announce(`Job ${one.job_id} ${one.state}`);
    refresh();
  }
}

function onBeat(beat) {
  now.onBeat(beat);
  serving.onBeat(beat);
  link(beat.attached ? "live" : beat.is_up ? "not attached" : "no worker", beat.attached ? "is-good" : "is-bad");
  if (beat.progress?.job_id && beat.progress.job_id !== seen.job_id) {
    seen.job_id = beat.progress.job_id;
    announce(`Job ${seen.job_id} is being trained`);
    refresh();
  }
  if (beat.weight_version !== seen.weight_version) {
    seen.weight_version = beat.weight_version;
    refresh();
  }
}

// The status and the lists, one request at a time; what is asked for meanwhile is asked once more.
async function refresh() {
  if (isAsking) {
    isAskedAgain = true;
    return;
  }
  isAsking = true;
  try {
    const status = await api("GET", "train/status");
    now.onStatus(status);
    const lists = JSON.stringify([status.num_jobs, status.weight_version, status.durable_version, status.last_sync?.committed_at]);
    if (lists !== seen.lists) {
      seen.lists = lists;
      const [page] = await Promise.all([jobs.load(status), versions.load(status)]);
      await now.onNewest(page.find((job) => job.loss_last != null));
    }
    problem(status.attach_error ?? status.sync_error);
  } catch (error) {
    if (error.status !== 401) problem(error.message);
  } finally {
    isAsking = false;
    if (isAskedAgain) {
      isAskedAgain = false;
      setTimeout(refresh, 300);
    }
  }
}

export function changed() {
  seen.lists = null;
  refresh();
}

function link(text, kind) {
  const chip = $("link");
  setText(chip, text);
  chip.className = `chip ${kind}`;
}

function start(session) {
  seen = {};
  $("login").hidden = true;
  $("page").hidden = $("logout").hidden = false;
  setText($("model"), shown(session.model ?? "", 200));
  teach.start(session, changed);
  jobs.start(changed);
  versions.start(changed);
  const close = listen(onEvent, (isOpen) => isOpen || link("connection lost", "is-bad"));
  const timers = [
    [refresh, STATUS_MS],
    [serving.look, SERVING_MS],
    [quality.load, QUALITY_MS],
  ].map(([ask, every]) => {
    ask();
    return setInterval(() => document.hidden || ask(), every);
  });
  stop = () => {
    close();
    timers.forEach(clearInterval);
  };
}

function showLogin(text = "") {
  stop?.();
  stop = null;
  // What was typed below stays where it is: the page is there again after the login.
  $("page").hidden = $("logout").hidden = true;
  $("login").hidden = false;
  setText($("login-error"), text);
  link("not connected", "");
  $("key").focus();
}

// Whether it is worth asking: the browser reports each refusal as an error.
function mayBeIn() {
  try {
    return Number(localStorage.getItem(KNOWN)) > Date.now();
  } catch {
    return true; // it keeps nothing for us
  }
}

function remember(until) {
  try {
    localStorage.setItem(KNOWN, String(1000 * until));
  } catch { /* see above */ }
}

async function enter(session) {
  try {
    start(session ?? (await api("GET", "train/ui/session")));
  } catch (error) {
    showLogin(error.status === 401 || error.status === 403 ? "" : error.message);
  }
}

$("login").addEventListener("submit", async (event) => {
  event.preventDefault();
  const key = $("key").value;
  $("key").value = "";
  try {
    remember((await api("POST", "train/ui/login", { key })).expires_at);
    await enter();
  } catch (error) {
    showLogin(error.message);
  }
});

$("logout").addEventListener("click", async () => {
  try {
    await api("POST", "train/ui/logout");
    remember(0);
    showLogin("");
  } catch (error) {
    problem(`still logged in: ${error.message}`);
  }
});

addEventListener("apollo-logged-out", () => stop && showLogin("This session is over: log in again."));
if (mayBeIn()) enter();
else showLogin();
