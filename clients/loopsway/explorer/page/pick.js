// Training examples to pick a query from.

import { ask } from "./ask.js";
import { byId, element } from "./elements.js";
import { busy } from "./loading.js";
import { showColumns, typed } from "./question.js";

let seed = 0;

/** Draws some from the index that is chosen, within the filter that is typed; `query` is called with the picked id. */
export async function pick(query) {
  const list = byId("drawn");
  list.replaceChildren();
  const { index, where } = typed();
  const { examples } = await busy("Drawing training examples", ask("examples", { index, where, seed }));
  showColumns(examples);
  list.replaceChildren(...examples.map((each) => item(each, query)));
  if (examples.length === 0) {
    list.append(element("li", { class: "hint" }, "No training example is within the filter."));
  }
}

/** Draws others. */
export function pickOthers(query) {
  seed += 1;
  return pick(query);
}

function item({ example_id: id, description }, query) {
  const text = element("span", { class: "mono drawn-text" }, description || id);
  const shown = element("span", { class: "id mono" }, id);
  return element(
    "li",
    {},
    element("button", { type: "button", class: "drawn-example", on: { click: () => query(id) } }, text, shown),
  );
}
