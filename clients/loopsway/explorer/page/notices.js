// What a reader of an answer must know of it: steps that have no gradient, shards that did not answer.

import { byId, element } from "./elements.js";

/** Says that zeros at the steps are no finding; hidden where there are none. */
export function drawArtefact(steps) {
  const notice = byId("artefact");
  notice.hidden = steps.length === 0;
  notice.textContent =
    `Training ran without a gradient at step ${steps.join(", ")}: zeros there are an artefact, no finding.`;
}

/** Says that a part of the index is missing; `again` asks once more. Hidden where all of it answered. */
export function drawCoverage(coverage, again) {
  const notice = byId("partial");
  notice.hidden = coverage === 1;
  notice.replaceChildren(
    element("p", {}, `Only ${Math.round(100 * coverage)} % of the index's shards answered: the training examples of ` +
      "the others are missing here, in tables, charts and files."),
    element("button", { type: "button", class: "quiet", id: "ask-again", on: { click: again } }, "Ask again"),
  );
}
