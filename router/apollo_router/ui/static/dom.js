// Elements and text. Whatever comes from outside becomes a text node, never markup.

export const $ = (id) => document.getElementById(id);

// el("p", {class: "soft"}, "text", node): strings are text; attributes are names and values of our own.
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== false && value != null) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child != null));
  return node;
}

export function button(label, onClick, attributes = {}) {
  const node = el("button", { type: "button", class: "small", ...attributes }, label);
  node.addEventListener("click", onClick);
  return node;
}

const MAX_CHARACTERS = 20000;
// Marks that turn or hide text, and control characters: shown by their number.
const INVISIBLE = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;

// Text of a user or a model as it may be read: cut, and with nothing hidden in it.
export function shown(text, limit = MAX_CHARACTERS) {
  const whole = String(text ?? "");
  const cut = whole.slice(0, limit).replace(INVISIBLE, (c) => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"));
  return whole.length > limit ? `${cut} … (${whole.length - limit} more characters)` : cut;
}

// Sets text only where it differs: a live region is not read out again, and nothing is laid out anew.
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// Pairs of a definition list; an absent value is left out.
export function figures(node, pairs) {
  const kept = pairs.filter(([, value]) => value != null);
  const dds = node.querySelectorAll("dd");
  if (dds.length === kept.length && [...node.querySelectorAll("dt")].every((dt, i) => dt.textContent === kept[i][0])) {
    kept.forEach(([, value], i) => setText(dds[i], value));
    return;
  }
  node.replaceChildren(...kept.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
}

export const number = (value, digits = 4) => (value == null || !Number.isFinite(value) ? "–" : Number(value.toPrecision(digits)).toString());

export function bytes(size) {
  if (size == null) return null;
  let value = size;
  for (const unit of ["B", "KB", "MB", "GB"]) {
    if (value < 1000) return `${Number(value.toPrecision(3))} ${unit}`;
    value /= 1000;
  }
  return `${Number(value.toPrecision(3))} TB`;
}

export function duration(seconds) {
  if (seconds == null || !Number.isFinite(seconds)) return null;
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 90) return `${Number(seconds.toPrecision(2))} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} d`;
}

export const ago = (at) => `${duration(Math.max(1, Date.now() / 1000 - at))} ago`;

// A question before something that cannot simply be taken back. Resolves to true for yes.
export function confirmed(title, text, yes) {
  const dialog = $("dialog");
  $("dialog-title").textContent = title;
  $("dialog-text").textContent = text;
  $("dialog-yes").textContent = yes;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

export function announce(text) {
  setText($("live"), text);
}

export function problem(text) {
  $("problem").hidden = !text;
  setText($("problem"), text ? shown(text, 600) : "");
}
