// Weight versions as a line of time: what can be restored, and what was trained between.

import { api } from "./api.js";
import { $, ago, announce, button, bytes, confirmed, el, number, problem, setText } from "./dom.js";

const MAX_JOBS = 1000; // that are looked through
const MAX_NAMED = 5; // of one piece of the line

let changed = () => {};

export function start(onChange) {
  changed = onChange;
}

export async function load(status) {
  const isEmpty = !status.durable_version && !status.last_sync; // asked for, it would be an error
  let history;
  try {
    history = isEmpty ? { versions: [], history_bytes: 0 } : await api("GET", "checkpoint/history");
  } catch (error) {
    // No model is known, say: the server's sentence.
    $("line").replaceChildren();
    setText($("versions-note"), error.status === 401 ? "" : error.message);
    return;
  }
  const { data } = await api("GET", `train/jobs?limit=${MAX_JOBS}`);
  const trained = data.filter((job) => job.weight_version != null);
  const newestFirst = history.versions.toReversed();
  const pieces = newestFirst.map((version, i) => pieceOf(version, newestFirst[i + 1], trained));
  const later = trained.filter((job) => job.seq > (newestFirst[0]?.applied_seq ?? 0) && job.state === "applied");
  if (status.weight_version !== status.durable_version) {
    pieces.unshift(el("li", {}, el("h3", {}, `version ${status.weight_version}, served, not on disk yet`), list(later)));
  }
  $("line").replaceChildren(...pieces);
  setText($("versions-note"), isEmpty ? "Nothing is on disk yet that can be gone back to: the first checkpoint makes the first version." : `Older versions take ${bytes(history.history_bytes)} on disk.`);
}

function pieceOf(version, older, trained) {
  const between = trained.filter((job) => job.seq <= version.applied_seq && job.seq > (older?.applied_seq ?? 0));
  const words = [version.is_present ? "on disk now" : null, version.is_pinned ? "pinned" : null, version.restored_from == null ? null : `restored from ${version.restored_from}`];
  const title = `version ${version.weight_version}`;
  const verbs = [];
  if (!version.is_present) verbs.push(button("Restore", () => restore(version), { "aria-label": `Restore ${title}` }));
  verbs.push(
    version.is_pinned
      ? button("Unpin", () => pin(null, title), { "aria-label": `Unpin ${title}` })
      : button("Pin", () => pin(version.weight_version, title), { "aria-label": `Pin ${title}` }),
  );
  return el(
    "li",
    { class: version.is_present ? "present" : null },
    el("h3", {}, [title, ...words.filter(Boolean)].join(", ")),
    el("p", { class: "soft" }, `${version.serial ? `${version.kind} checkpoint, ` : "as it was before the first checkpoint, "}${ago(version.committed_at)}`),
    older ? list(between) : null,
    el("div", { class: "row" }, verbs),
  );
}

function list(jobs) {
  if (!jobs.length) return null;
  const named = jobs.slice(0, MAX_NAMED).map((job) => el("li", {}, `${job.job_id}: ${job.num_examples} ${job.num_examples === 1 ? "example" : "examples"}, loss ${job.steps_done < 2 ? "" : `${number(job.loss_first)} → `}${number(job.loss_last)}${job.state === "undone" ? ", undone" : ""}`));
  if (jobs.length > MAX_NAMED) named.push(el("li", {}, `${jobs.length - MAX_NAMED} more jobs`));
  return el("ul", {}, named);
}

async function restore(version) {
  const text = `The served weights become those of version ${version.weight_version} (${ago(version.committed_at)}). Jobs trained since then are undone and not trained again. The present weights are kept as a version, so this can be taken back too.`;
  if (!(await confirmed(`Restore version ${version.weight_version}?`, text, "Yes, restore it"))) return;
  await run(async () => {
    const done = await api("POST", "checkpoint/restore", { version: version.weight_version });
    announce(`Version ${done.restored_version} is served again, as version ${done.weight_version}; ${done.num_jobs_undone} jobs undone${done.num_jobs_back ? `, ${done.num_jobs_back} back` : ""}`);
  });
}

async function pin(weightVersion, title) {
  const text = weightVersion === null ? "It goes when newer versions push it out." : "It stays restorable however many checkpoints follow, in place of the version that is pinned now.";
  if (!(await confirmed(weightVersion === null ? `Unpin ${title}?` : `Pin ${title}?`, text, weightVersion === null ? "Yes, unpin it" : "Yes, pin it"))) return;
  await run(() => api("POST", "checkpoint/pin", { version: weightVersion }));
}

async function run(request) {
  try {
    await request();
    problem(null);
  } catch (error) {
    problem(error.message);
  }
  changed();
}
