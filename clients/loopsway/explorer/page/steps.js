// The strip of steps under the chart, each in line with its place there: arrow keys and clicks choose one.

import { byId, drawing, element } from "./elements.js";

const HEIGHT = 26;

/** Draws the strip: the whole loop first; each step's bar shows its strongest proponent and opponent. */
export function drawSteps(answer, names, chosen, choose) {
  const peaks = answer.rankings.slice(1).map((ranking) => ({
    step: ranking.step,
    up: ranking.proponents[0]?.influence ?? 0,
    down: -(ranking.opponents[0]?.influence ?? 0),
  }));
  const largest = Math.max(...peaks.map(({ up, down }) => Math.max(up, down)), Number.MIN_VALUE);
  const tabs = [tab(null, "all", "the whole loop", null, chosen === null, choose)];
  for (const peak of peaks) {
    const name = names[peak.step];
    tabs.push(tab(peak.step, name, `step ${name}`, bar(peak, largest), chosen === peak.step, choose));
  }
  const strip = byId("steps");
  const hadFocus = strip.contains(document.activeElement);
  strip.replaceChildren(...tabs);
  strip.onkeydown = (event) => move(event, [null, ...peaks.map((peak) => peak.step)], chosen, choose);
  const current = strip.querySelector("[aria-selected=true]");
  if (hadFocus) {
    current?.focus();
  }
  current?.scrollIntoView({ block: "nearest", inline: "nearest" });
}

function tab(step, name, label, picture, isChosen, choose) {
  return element(
    "button",
    {
      type: "button",
      role: "tab",
      id: step === null ? "step-all" : `step-${step}`,
      class: step === null ? "step whole" : "step",
      "aria-selected": String(isChosen),
      "aria-controls": "rankings",
      "aria-label": label,
      tabindex: isChosen ? "0" : "-1",
      on: { click: () => choose(step) },
    },
    picture,
    element("span", { class: "step-name" }, name),
  );
}

function bar({ up, down }, largest) {
  const middle = HEIGHT / 2;
  const tall = (value) => (value / largest) * (middle - 1);
  const picture = drawing("svg", { viewBox: `0 0 12 ${HEIGHT}`, width: 12, height: HEIGHT, "aria-hidden": "true" });
  picture.append(
    drawing("rect", { x: 2, y: middle - tall(up), width: 8, height: tall(up), class: "fill-proponents" }),
    drawing("rect", { x: 2, y: middle, width: 8, height: tall(down), class: "plain-opponents" }),
    drawing("line", { x1: 0, x2: 12, y1: middle, y2: middle, class: "stroke-muted" }),
  );
  return picture;
}

function move(event, steps, chosen, choose) {
  const at = steps.indexOf(chosen);
  const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: steps.length - 1 }[event.key];
  if (next === undefined) {
    return;
  }
  event.preventDefault();
  choose(steps[Math.min(steps.length - 1, Math.max(0, next))]);
}
