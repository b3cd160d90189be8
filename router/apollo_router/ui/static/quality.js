// What the quality monitor measured: held-out losses over time, and canaries.

import { api } from "./api.js";
import { lineChart } from "./chart.js";
import { $, ago, el, setText, shown } from "./dom.js";

export async function load() {
  let measured;
  try {
    measured = (await api("GET", "train/ui/quality")).measurements;
  } catch (error) {
    if (error.status !== 401) setText($("quality-note"), error.message);
    return;
  }
  if (!measured.length) {
    setText($("quality-note"), "Nothing was measured yet. The command apollo-ipc quality check does it, and so does every night.");
    return;
  }
  const last = measured.at(-1);
  const verdict = last.breaches.length ? last.breaches.join("; ") : "within the limits";
  setText($("quality-note"), `Measured ${ago(last.at)}: ${shown(verdict, 600)}`);
  const names = [...new Set(measured.flatMap((one) => Object.keys(one.losses)))];
  lineChart($("heldout"), {
    title: "Held-out loss by category, in nats a token",
    series: names.map((name) => ({
      name: shown(name, 80),
      points: measured.map((one, i) => [i, one.losses[name]]).filter(([, loss]) => loss != null),
    })),
    marks: measured.flatMap((one, i) => (one.breaches.length ? [{ x: i, text: one.action ?? "breach" }] : [])),
    xLabel: (i) => (measured[i].weight_version == null ? measured[i].label : `v${measured[i].weight_version}`),
  });
  const cells = last.canaries.map((one) => el("li", {}, `${one.passed === null ? "?" : one.passed ? "✓" : "✗"} `, el("span", { class: one.passed === false ? "bad" : null }, shown(one.name, 120))));
  $("canaries").replaceChildren(...(cells.length ? [el("h3", {}, "Canaries"), el("ul", { class: "cells" }, cells)] : []));
}
