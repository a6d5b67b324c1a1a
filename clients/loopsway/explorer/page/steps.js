// The strip of steps under the chart, each in line with its place there: arrow keys and clicks choose one.

import { byId, drawing, element } from "./elements.js";
import { placeOf } from "./numbers.js";
import { MARGIN } from "./trajectory.js";

const HEIGHT = 26;
const LABEL_WIDTH = 24;
const UPRIGHT_WIDTH = 13;
const SHORT = 4; // digits; longer names are words

/** Draws the strip: the whole loop first; each step's bar shows its strongest proponent and opponent. */
export function drawSteps(answer, names, chosen, choose) {
  const strip = byId("steps");
  const peaks = answer.rankings.slice(1).map((ranking) => ({
    step: ranking.step,
    up: ranking.proponents[0]?.influence ?? 0,
    down: -(ranking.opponents[0]?.influence ?? 0),
  }));
  const largest = Math.max(...peaks.map(({ up, down }) => Math.max(up, down)), Number.MIN_VALUE);
  const room = (strip.clientWidth - MARGIN.l - MARGIN.r) / peaks.length;
  const tabs = [tab({ step: null, name: "all", place: placeOf(null), isChosen: chosen === null, choose })];
  for (const peak of peaks) {
    const name = names[peak.step];
    const isChosen = chosen === peak.step;
    const shown = isLabelled(peak.step, name, chosen, room) ? name : "";
    tabs.push(tab({ step: peak.step, name: shown, place: placeOf(name), isChosen, choose, room }, bar(peak, largest)));
  }
  const hadFocus = strip.contains(document.activeElement);
  strip.replaceChildren(...tabs);
  strip.onkeydown = (event) => move(event, [null, ...peaks.map((peak) => peak.step)], chosen, choose);
  if (hadFocus) {
    strip.querySelector("[aria-selected=true]").focus();
  }
}

/** Whether a step's name has room beside the others' and the chosen one's. */
function isLabelled(step, name, chosen, room) {
  const every = Math.ceil(LABEL_WIDTH / room);
  const isFree = chosen === null || Math.abs(step - chosen) >= every;
  return step === chosen || (name.length > SHORT ? room > UPRIGHT_WIDTH : step % every === 0 && isFree);
}

function tab({ step, name, place, isChosen, choose, room }, picture = null) {
  const isUpright = name.length > SHORT && room < LABEL_WIDTH * 2;
  return element(
    "button",
    {
      type: "button",
      role: "tab",
      id: step === null ? "step-all" : `step-${step}`,
      class: step === null ? "step whole" : "step",
      "aria-selected": String(isChosen),
      "aria-controls": "rankings",
      "aria-label": place,
      title: place,
      tabindex: isChosen ? "0" : "-1",
      on: { click: () => choose(step) },
    },
    picture,
    element("span", { class: isUpright ? "step-name upright" : "step-name" }, name || "\u00a0"),
  );
}

function bar({ up, down }, largest) {
  const middle = HEIGHT / 2;
  const tall = (value) => (value / largest) * (middle - 1);
  const size = { viewBox: `0 0 12 ${HEIGHT}`, preserveAspectRatio: "none", height: HEIGHT };
  const picture = drawing("svg", { ...size, class: "step-bar", "aria-hidden": "true" });
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
