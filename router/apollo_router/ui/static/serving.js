// What serving feels of training, from vLLM's own histograms: what happened while a job was trained, and while none
// was, each since this page was opened.

import { metricsText } from "./api.js";
import { $, duration, el, setText } from "./dom.js";

const SHOWN = [
  ["time to the first token", "vllm:time_to_first_token_seconds"],
  ["time between tokens", "vllm:inter_token_latency_seconds"],
];
const LINE = /^([\w:]+)(?:\{(.*)\})? (\S+)$/gm;

let isTraining = null;
let wasMixed = true; // training began or ended since the last look
let before = null;
const sums = { true: {}, false: {} }; // name -> bound -> requests in the bucket, or `count`

export function onBeat(beat) {
  const isNow = beat.progress?.activity === "training";
  if (isNow !== isTraining) wasMixed = true;
  isTraining = isNow;
}

export async function look() {
  const text = await metricsText().catch(() => null);
  if (text === null) {
    setText($("drops"), "vLLM's metrics cannot be read here.");
    return;
  }
  const found = read(text);
  // A piece of time in which training began or ended belongs to neither column.
  if (before && !wasMixed && isTraining !== null) add(sums[isTraining], before, found);
  wasMixed = false;
  before = found;
  show(found);
}

function read(text) {
  const wanted = new Set([...SHOWN.map(([, name]) => `${name}_bucket`), "apollo_cache_drop_seconds_count", "apollo_cache_drop_seconds_sum"]);
  const found = {};
  for (const [, name, labels = "", value] of text.matchAll(LINE)) {
    if (!wanted.has(name)) continue;
    const bound = /le="([^"]+)"/.exec(labels)?.[1] ?? "value";
    const of = (found[name] ??= {});
    of[bound] = (of[bound] ?? 0) + Number(value); // several engines are added up
  }
  return found;
}

function add(into, old, fresh) {
  for (const [, metric] of SHOWN) {
    const name = `${metric}_bucket`;
    for (const [bound, count] of Object.entries(fresh[name] ?? {})) {
      const of = (into[name] ??= {});
      of[bound] = (of[bound] ?? 0) + Math.max(0, count - (old[name]?.[bound] ?? 0));
    }
  }
}

// As Prometheus' histogram_quantile: linear inside a bucket.
export function quantile(buckets, share) {
  const bounds = Object.entries(buckets ?? {})
    .map(([bound, count]) => [bound === "+Inf" ? Infinity : Number(bound), count])
    .sort(([a], [b]) => a - b);
  const total = bounds.at(-1)?.[1] ?? 0;
  if (!total) return null;
  const rank = share * total;
  let [low, below] = [0, 0];
  for (const [bound, count] of bounds) {
    if (count >= rank) return bound === Infinity ? low : low + ((bound - low) * (rank - below)) / (count - below || 1);
    [low, below] = [bound, count];
  }
  return low;
}

function show(found) {
  const rows = SHOWN.flatMap(([title, metric]) =>
    [0.5, 0.99].map((share) => {
      const cells = [true, false].map((side) => el("td", { class: "num" }, duration(quantile(sums[side][`${metric}_bucket`], share)) ?? "–"));
      return el("tr", {}, el("th", { scope: "row" }, `${title}, p${share * 100}`), cells);
    }),
  );
  const counts = [true, false].map((side) => el("td", { class: "num" }, String(sums[side][`${SHOWN[0][1]}_bucket`]?.["+Inf"] ?? 0)));
  $("latency").replaceChildren(...rows, el("tr", {}, el("th", { scope: "row" }, "requests, since this page was opened"), counts));
  const drops = found.apollo_cache_drop_seconds_count?.value ?? 0;
  const mean = drops ? found.apollo_cache_drop_seconds_sum.value / drops : null;
  setText($("drops"), `The prefix cache was dropped ${drops} times${mean === null ? "" : `, ${duration(mean)} each`}: once for each new weight version.`);
}
