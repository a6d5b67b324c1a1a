// The form: what is typed there as a view, a view as what is typed there, and failures beside their fields.

import { byId, element } from "./elements.js";

const HINTS = {
  example: "JSON, as the index's task reads it. Ctrl+Enter asks.",
  id: "The id of an indexed example, as in the rankings.",
};
const FIELDS = ["query", "where", "k", "resolve"];

export function kind() {
  return document.querySelector("[name=kind]:checked").value;
}

/** Says what may be typed, for the kind that is chosen. */
export function showKind() {
  const query = byId("query");
  byId("query-hint").textContent = HINTS[kind()];
  query.placeholder = kind() === "example" ? '{"…": "…"}' : "";
  query.rows = kind() === "example" ? 3 : 1;
}

export function fill(view) {
  byId("index").value = view.index;
  byId("resolve").value = view.resolve;
  byId("k").value = view.k;
  byId("where").value = view.where;
  if (view.kind) {
    document.querySelector(`[name=kind][value=${view.kind}]`).checked = true;
  }
  byId("query").value = view.query ?? "";
  showKind();
}

/** The view that the form asks for, of the whole loop. */
export function typed() {
  const k = byId("k").value.trim();
  return {
    index: byId("index").value,
    kind: kind(),
    query: byId("query").value.trim(),
    resolve: byId("resolve").value,
    k: k === "" || Number.isNaN(Number(k)) ? k : Number(k),
    where: byId("where").value.trim(),
    step: null,
    selected: null,
  };
}

/** Says what a filter may name, as the examples that came show it. */
export function showColumns(examples) {
  if (examples.length > 0) {
    const columns = ["id", "description", ...Object.keys(examples[0].metadata)];
    byId("where-hint").textContent = `Columns: ${columns.join(", ")}`;
  }
}

export function clearProblems() {
  byId("alert").replaceChildren();
  for (const name of FIELDS) {
    byId(name).removeAttribute("aria-invalid");
    byId(`${name}-error`).replaceChildren();
  }
}

/** Shows a failure beside the field that it blames, else above the answer; `again` tries once more. */
export function showProblem(problem, again) {
  const name = FIELDS.find((field) => problem.field?.replace(/^queries.*/, "query") === field);
  if (!name) {
    const retry = element("button", { type: "button", class: "quiet", on: { click: again } }, "Try again");
    byId("alert").replaceChildren(element("div", { class: "problem" }, element("p", {}, problem.message), retry));
    return;
  }
  const input = byId(name);
  input.setAttribute("aria-invalid", "true");
  const said = element("p", {}, problem.message);
  byId(`${name}-error`).replaceChildren(...place(input.value.trim(), problem.position), said);
  input.focus();
  if (problem.position && input.setSelectionRange) {
    const skipped = input.value.length - input.value.trimStart().length;
    const at = Math.min(problem.position - 1 + skipped, input.value.length);
    input.setSelectionRange(at, Math.min(at + 1, input.value.length));
  }
}

/** The line that can't be read, with a caret under the character. */
function place(text, position) {
  if (!position) {
    return [];
  }
  const before = text.slice(0, position - 1);
  const start = before.lastIndexOf("\n") + 1;
  const column = position - 1 - start;
  const from = Math.max(0, column - 30);
  const line = text.slice(start).split("\n", 1)[0].slice(from, column + 30);
  return [
    element("pre", { class: "place mono", "aria-hidden": "true" }, `${line}\n${" ".repeat(column - from)}▲`),
    element("p", { class: "visually-hidden" }, `At character ${position}.`),
  ];
}
