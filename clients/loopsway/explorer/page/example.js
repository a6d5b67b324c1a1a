// The panel about one training example: its text, its metadata, the heatmap, and the examples most like it.

import { byId, element } from "./elements.js";
import { drawMatrix, matrixPng, matrixTable } from "./matrix.js";
import { scaled } from "./numbers.js";
import { saveCsv, savePng } from "./save.js";

const MARKED = "A dot marks what lies within two standard errors of zero.";
const SPANNED = "Colours span the loop's own steps: what is before and after may lie beyond.";
const MATRIX_HEADS = ["example_id", "train_step", "query_step", "influence", "standard_error"];

/** Draws the panel; `known` is what the rankings say of the example, where they have it. */
export function drawExample(about, known, { names, view, actions }) {
  const shown = known ?? about.shown;
  const text = shown?.description || about.example_id;
  const panel = byId("example");
  panel.removeAttribute("aria-busy");
  panel.replaceChildren(
    heading(about.example_id),
    element("p", { class: "example-text mono", tabindex: "0", role: "region", "aria-label": "The text" }, text),
    metadata(shown?.metadata),
    button("Ask about this example", "ask-selected", "primary small", () => actions.query(about.example_id)),
  );
  panel.append(...matrixFigure(about, names, view), ...neighbors(about, actions));
  drawMatrix(about.matrix, names, view);
}

/** The panel while its example is on its way, or when it can't be had. */
export function drawExampleNote(id, text, { isBusy = false } = {}) {
  const panel = byId("example");
  panel.setAttribute("aria-busy", String(isBusy));
  panel.replaceChildren(
    heading(id),
    element("p", { class: isBusy ? "hint loading" : "notice" }, text),
  );
}

function heading(id) {
  return element("h3", { id: "example-title" }, "Training example ", element("span", { class: "mono id" }, id));
}

function button(label, id, kind, action) {
  return element("button", { type: "button", id, class: kind, on: { click: action } }, label);
}

function metadata(columns) {
  if (!columns) {
    return element("p", { class: "hint" }, "The server's rankings hold no text or metadata of it.");
  }
  const entries = Object.entries(columns);
  if (entries.length === 0) {
    return element("p", { class: "hint" }, "This index has no metadata.");
  }
  return element(
    "dl",
    { class: "metadata" },
    ...entries.map(([name, value]) =>
      element("div", {}, element("dt", {}, name), element("dd", { class: "mono" }, String(value ?? "none"))),
    ),
  );
}

function matrixFigure(about, names, view) {
  const { matrix, example_id: id } = about;
  const title = `Influence of ${id} on the query`;
  const savePicture = async () => savePng("matrix.png", await matrixPng(matrix, names, view, title));
  const saveTable = () => saveCsv("matrix.csv", MATRIX_HEADS, rows(about));
  const summary = element("summary", {}, "The numbers as a table");
  const table = element("details", { class: "data", id: "matrix-data" }, summary);
  table.addEventListener("toggle", () => {
    if (table.open && table.childElementCount === 1) {
      table.append(matrixTable(matrix, names));
    }
  });
  return [
    element(
      "div",
      { class: "panel-head matrix-head" },
      element("h4", {}, "Its steps × the query's"),
      element(
        "div",
        { class: "tools" },
        button("PNG", "save-matrix-png", "quiet", savePicture),
        button("CSV", "save-matrix-csv", "quiet", saveTable),
      ),
    ),
    element("div", { id: "matrix", class: "chart matrix", role: "img" }),
    element("p", { class: "hint" }, names.query.includes("after") ? `${MARKED} ${SPANNED}` : MARKED),
    table,
  ];
}

function rows({ example_id: id, matrix }) {
  return matrix.influences.flatMap((row, train) =>
    row.map((value, query) => [id, train, query, value, matrix.standard_errors[train][query]]),
  );
}

function neighbors({ neighbors: those, neighbors_coverage: coverage }, actions) {
  if (those.length === 0) {
    return [];
  }
  const write = scaled([1]);
  const items = those.map((each) =>
    element(
      "li",
      {},
      element(
        "span",
        { class: "similarity", title: `± ${write(each.standard_error).replace("+", "")}` },
        write(each.similarity).replace("+", ""),
      ),
      element(
        "button",
        { type: "button", class: "example-link mono", on: { click: () => actions.select(each.example_id) } },
        each.description || each.example_id,
      ),
    ),
  );
  return [
    element("h4", {}, "Examples with gradients most like its own"),
    coverage < 1 ? element("p", { class: "hint" }, "Of the shards that answered; others may hold closer ones.") : "",
    element("ol", { class: "neighbors", "aria-label": "Neighbours, by cosine" }, ...items),
  ];
}
