// The tables of proponents and opponents at one step.

import { byId, drawing, element } from "./elements.js";
import { placeOf, scaled } from "./numbers.js";

const KINDS = {
  proponents: { title: "Proponents", says: "pushed the answer up", arrow: "▲" },
  opponents: { title: "Opponents", says: "pushed it down", arrow: "▼" },
};

/** Draws both tables; `actions.select` and `actions.query` are called with an example's id. */
export function drawRankings(ranking, { stepName, selected, tags, actions }) {
  const all = [...ranking.proponents, ...ranking.opponents];
  const largest = Math.max(...all.map((each) => Math.abs(each.influence) + 2 * each.standard_error), Number.MIN_VALUE);
  const where = placeOf(ranking.step === null ? null : stepName);
  const context = { largest, selected, tags, actions };
  const tables = Object.keys(KINDS).map((kind) => table(kind, ranking[kind], where, context));
  const panel = byId("rankings");
  panel.setAttribute("aria-labelledby", ranking.step === null ? "step-all" : `step-${ranking.step}`);
  const focused = panel.contains(document.activeElement) ? document.activeElement.id : "";
  panel.replaceChildren(...tables);
  byId(focused)?.focus();
}

function table(kind, examples, where, context) {
  const { title, says, arrow } = KINDS[kind];
  const heading = element(
    "caption",
    {},
    element("span", { class: `arrow ink-${kind}`, "aria-hidden": "true" }, arrow),
    element("span", { class: "caption-title" }, `${title} ${where}`),
    element("span", { class: "caption-note" }, says),
  );
  if (examples.length === 0) {
    const nothing = element("td", { class: "nothing hint" }, `No training example that was searched ${says}.`);
    const body = element("tbody", {}, element("tr", {}, nothing));
    return element("div", { class: "panel ranking" }, element("table", {}, heading, body));
  }
  const write = scaled(examples.map((each) => each.influence));
  const plain = scaled(examples.map((each) => each.influence), { sign: false });
  const heads = ["", "Influence", "Training example", ""];
  const spoken = ["rank", null, null, "ask"];
  const head = element(
    "tr",
    {},
    ...heads.map((text, column) =>
      element(
        "th",
        { scope: "col", class: `c${column}` },
        text || element("span", { class: "visually-hidden" }, spoken[column]),
      ),
    ),
  );
  const rows = examples.map((each, rank) => row(kind, each, rank, { ...context, write, plain }));
  return element(
    "div",
    { class: "panel ranking" },
    element("table", {}, heading, element("thead", {}, head), element("tbody", {}, ...rows)),
  );
}

function row(kind, each, rank, { largest, selected, tags, actions, write, plain }) {
  const isSelected = each.example_id === selected;
  const text = each.description || each.example_id;
  const tag = tags.get(each.example_id);
  const select = element(
    "button",
    {
      type: "button",
      class: "example-link mono",
      id: `${kind}-${rank}`,
      "aria-pressed": String(isSelected),
      on: { click: (event) => { event.stopPropagation(); actions.select(each.example_id); } },
    },
    text,
  );
  const query = element(
    "button",
    {
      type: "button",
      class: "row-ask",
      "aria-label": `Ask about ${each.example_id}`,
      title: "Ask about this example",
      on: { click: (event) => { event.stopPropagation(); actions.query(each.example_id); } },
    },
    "Ask",
  );
  const meaning = each.significant ? "significant" : "within two standard errors of zero";
  const mark = each.significant ? "mark on" : "mark";
  return element(
    "tr",
    {
      class: `${isSelected ? "selected" : ""} ${each.significant ? "" : "noise"}`,
      on: { click: () => actions.select(each.example_id) },
    },
    element("td", { class: "rank" }, String(rank + 1)),
    element(
      "td",
      { class: "influence" },
      element("span", { class: mark, role: "img", "aria-label": meaning, title: meaning }),
      element("span", {}, write(each.influence)),
      element("span", { class: "error" }, ` ± ${plain(each.standard_error)}`),
      bar(kind, each, largest),
    ),
    element(
      "td",
      { class: "what" },
      tag ? element("span", { class: `tag chip-${tag[0]}` }, tag) : null,
      select,
      text.includes(each.example_id) ? null : element("span", { class: "id mono" }, each.example_id),
    ),
    element("td", { class: "do" }, query),
  );
}

/** A bar as long as the influence, and a whisker of two standard errors; opponents' are striped. */
function bar(kind, { influence, standard_error: error }, largest) {
  const at = (value) => `${((Math.max(0, value) / largest) * 100).toFixed(2)}%`;
  const size = Math.abs(influence);
  return drawing(
    "svg",
    { class: "influence-bar", "aria-hidden": "true" },
    drawing("rect", { x: 0, y: 1, width: at(size), height: 8, class: `fill-${kind}` }),
    drawing("line", { x1: at(size - 2 * error), x2: at(size + 2 * error), y1: 5, y2: 5, class: "whisker" }),
  );
}
