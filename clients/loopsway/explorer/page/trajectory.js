// The chart of influence by step: the strongest proponents and opponents, with bands of two standard errors.

import { CONFIG, asPng, axis, baseLayout, colour, escaped, faint } from "./chart.js";
import { byId, dataTable, drawing, element } from "./elements.js";
import { isSignificant, scaled } from "./numbers.js";

export const MARGIN = { l: 76, r: 40, t: 8, b: 6 };
const DRAWN = 3;
const DASHES = ["solid", "dash", "dot"];
const SHAPES = { proponents: ["circle", "square", "diamond"], opponents: ["triangle-down", "x", "star-triangle-down"] };
const LABEL_HEIGHT = 15;

const AXES = {
  query_step: "step of the query's loop",
  train_step: "step of the training example's loop",
  same_step: "step of both loops",
};

/** The curves of an answer: the first few of both signs, and the example that is selected. */
export function curvesOf(answer, id, about) {
  const total = answer.rankings[0];
  const curves = ["proponents", "opponents"].flatMap((sign) =>
    total[sign].slice(0, DRAWN).map((example, rank) => ({
      tag: tagsOf(total).get(example.example_id),
      name: example.description || example.example_id,
      id: example.example_id,
      colour: `${sign}-${rank + 1}`,
      dash: DASHES[rank],
      shape: SHAPES[sign][rank],
      isSelected: example.example_id === id,
      ...answer.trajectories[example.example_id],
    })),
  );
  const trajectory = answer.trajectories[id] ?? (about?.example_id === id ? about.trajectory : undefined);
  if (trajectory && !curves.some((curve) => curve.isSelected)) {
    const name = (shownIn(answer, id) ?? about?.shown)?.description || id;
    const tag = tagsOf(total).get(id) ?? "sel.";
    curves.push({ tag, name, id, colour: "ink", dash: "dashdot", shape: "cross", isSelected: true, ...trajectory });
  }
  return curves;
}

/** What the examples ranked over the whole loop are called in charts and tables: P1, P2, …, O1, …, by id. */
export function tagsOf(total) {
  return new Map([
    ...total.proponents.map((each, rank) => [each.example_id, `P${rank + 1}`]),
    ...total.opponents.map((each, rank) => [each.example_id, `O${rank + 1}`]),
  ]);
}

/** What the rankings say of an example. Undefined: it is in none. */
export function shownIn(answer, id) {
  return answer.rankings
    .flatMap((ranking) => [...ranking.proponents, ...ranking.opponents])
    .find((each) => each.example_id === id);
}

export function axisTitle(resolve) {
  return AXES[resolve];
}

/** Draws the curves; `choose` is called with the step that is clicked. */
export function drawTrajectory(curves, view, names, withoutGradient, choose) {
  const chart = byId("trajectory");
  chart.setAttribute(
    "aria-label",
    `Line chart: influence of ${curves.map((curve) => curve.tag).join(", ")} at ${names.length} steps. ` +
      "The table below has its numbers.",
  );
  const layout = layoutOf(curves, view, names, withoutGradient, chart.clientHeight - MARGIN.t - MARGIN.b);
  Plotly.react(chart, traces(curves), layout, CONFIG);
  chart.removeAllListeners?.("plotly_click");
  chart.on("plotly_click", (event) => choose(event.points[0].x));
}

function traces(curves) {
  const bands = curves.map((curve) => ({
    x: [...curve.influences.keys(), ...[...curve.influences.keys()].reverse()],
    y: [
      ...curve.influences.map((value, step) => value + 2 * curve.standard_errors[step]),
      ...curve.influences.map((value, step) => value - 2 * curve.standard_errors[step]).reverse(),
    ],
    type: "scatter",
    mode: "lines",
    fill: "toself",
    line: { width: 0 },
    fillcolor: faint(colour(curve.colour), curve.isSelected ? 0.24 : 0.12),
    hoverinfo: "skip",
    showlegend: false,
  }));
  return [...bands, ...curves.map(line)];
}

function line(curve) {
  const ink = colour(curve.colour);
  const filled = curve.influences.map((value, step) => isSignificant(value, curve.standard_errors[step]));
  return {
    x: [...curve.influences.keys()],
    y: curve.influences,
    customdata: curve.standard_errors,
    type: "scatter",
    mode: "lines+markers",
    name: curve.tag,
    line: { color: ink, width: curve.isSelected ? 3.2 : 1.7, dash: curve.dash },
    marker: {
      symbol: curve.shape,
      size: curve.isSelected ? 9 : 7,
      color: filled.map((full) => (full ? ink : colour("panel"))),
      line: { color: ink, width: 1.4 },
    },
    hovertemplate: `${curve.tag}  %{y:.3g} ± %{customdata:.1g}<extra></extra>`,
  };
}

function layoutOf(curves, view, names, withoutGradient, height) {
  const shaded = (step, fill) => ({
    type: "rect", xref: "x", yref: "paper", layer: "below", line: { width: 0 },
    x0: step - 0.5, x1: step + 0.5, y0: 0, y1: 1, fillcolor: fill,
  });
  const shapes = withoutGradient.map((step) => shaded(step, faint(colour("muted"), 0.16)));
  if (view.step !== null) {
    shapes.push(shaded(view.step, colour("chosen")));
  }
  shapes.push({
    type: "line", xref: "paper", x0: 0, x1: 1, y0: 0, y1: 0, layer: "below",
    line: { color: colour("muted"), width: 1 },
  });
  const range = rangeOf(curves);
  return {
    ...baseLayout(),
    margin: MARGIN,
    hovermode: "x unified",
    hoverdistance: -1,
    showlegend: false,
    shapes,
    annotations: endLabels(curves, range, height),
    xaxis: axis("", { range: [-0.5, names.length - 0.5], showgrid: false, showticklabels: false }),
    yaxis: axis("influence", { range, nticks: 7, tickformat: ".3~g" }),
  };
}

function rangeOf(curves) {
  const ends = curves.flatMap((curve) =>
    curve.influences.flatMap((value, step) => [
      value + 2 * curve.standard_errors[step],
      value - 2 * curve.standard_errors[step],
    ]),
  );
  const [low, high] = ends.reduce(([least, most], end) => [Math.min(least, end), Math.max(most, end)], [0, 0]);
  const room = (high - low || 1) * 0.04;
  return [low - room, high + room];
}

/** Each curve's tag at its end, moved apart where they would cover one another. */
function endLabels(curves, [low, high], height) {
  const labels = curves
    .map((curve) => ({ curve, last: curve.influences.at(-1) }))
    .map((label) => ({ ...label, at: ((label.last - low) / (high - low)) * height }))
    .sort((one, other) => one.at - other.at);
  let free = 0;
  for (const label of labels) {
    label.moved = Math.max(label.at, free);
    free = label.moved + LABEL_HEIGHT;
  }
  free = height - 4;
  for (const label of [...labels].reverse()) {
    label.moved = Math.min(label.moved, free);
    free = label.moved - LABEL_HEIGHT;
  }
  return labels.map(({ curve, last, at, moved }) => ({
    x: 1, xref: "paper", xanchor: "left", xshift: 4, y: last, yshift: moved - at, showarrow: false,
    text: curve.tag,
    font: { color: colour(curve.colour), size: 12, weight: curve.isSelected ? 700 : 500 },
  }));
}

/** The legend: each curve's mark, tag and text; a click selects its example. */
export function drawLegend(curves, select) {
  const entries = curves.map((curve) => {
    const size = { viewBox: "0 0 34 10", width: 34, height: 10 };
    const key = drawing("svg", { ...size, "aria-hidden": "true", class: "line-key" });
    const dashes = { solid: null, dash: "7 4", dot: "2 4", dashdot: "7 3 2 3" }[curve.dash];
    key.append(
      drawing("line", { x1: 1, x2: 33, y1: 5, y2: 5, class: `stroke-${curve.colour}`, "stroke-dasharray": dashes }),
    );
    const button = element(
      "button",
      {
        type: "button",
        class: "legend-entry",
        "aria-pressed": String(curve.isSelected),
        on: { click: () => select(curve.id) },
      },
      key,
      element("span", { class: "tag" }, curve.tag),
      element("span", { class: "legend-text mono" }, curve.name),
    );
    return element("li", {}, button);
  });
  byId("legend").replaceChildren(...entries);
}

/** The chart's numbers, as a table. */
export function trajectoryTable(curves, names, resolve) {
  const write = scaled(curves.flatMap((curve) => curve.influences));
  const plain = scaled(curves.flatMap((curve) => curve.influences), { sign: false });
  const rows = names.map((name, step) => [
    name,
    ...curves.map((curve) => `${write(curve.influences[step])} ± ${plain(curve.standard_errors[step])}`),
  ]);
  return dataTable(`Influence by ${axisTitle(resolve)}`, ["step", ...curves.map((curve) => curve.tag)], rows);
}

/** The chart as a PNG, with what the page shows around it: a title, the steps' names and a legend. */
export function trajectoryPng(curves, view, names, withoutGradient, title) {
  const layout = layoutOf(curves, { ...view, step: null }, names, withoutGradient, 430);
  const named = traces(curves).map((trace) => {
    const curve = curves.find((each) => each.tag === trace.name);
    return curve ? { ...trace, name: `${curve.tag}  ${escaped(curve.name)}` } : trace;
  });
  return asPng(
    named,
    {
      ...layout,
      title: { text: escaped(title, 90), font: { size: 16, color: colour("ink") }, x: 0.02, xanchor: "left" },
      margin: { l: 84, r: 40, t: 52, b: 50 },
      annotations: [],
      showlegend: true,
      legend: { orientation: "h", y: -0.14, font: { color: colour("ink") } },
      xaxis: {
        ...layout.xaxis,
        title: { text: axisTitle(view.resolve) },
        showticklabels: true,
        tickvals: [...names.keys()],
        ticktext: names,
        automargin: true,
      },
    },
    1000,
    620,
  );
}

