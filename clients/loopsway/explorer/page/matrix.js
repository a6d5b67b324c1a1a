// The heatmap of one example's influence: each of its own steps on each step of the query.

import { CONFIG, asPng, axis, baseLayout, colour, escaped } from "./chart.js";
import { byId, dataTable } from "./elements.js";
import { isSignificant, scaled } from "./numbers.js";

const MOST_MARKED = 900; // cells, beyond which a mark in each is a blur

/** Draws the heatmap into the element with the id `matrix`. */
export function drawMatrix(matrix, names, view) {
  const chart = byId("matrix");
  chart.setAttribute(
    "aria-label",
    `Heatmap: influence of ${names.train.length} steps of the example on ${names.query.length} steps of the query. ` +
      "The table below has its numbers.",
  );
  Plotly.react(chart, traces(matrix, names), layoutOf(names, view), CONFIG);
}

function traces({ influences, standard_errors: errors }, names) {
  const largest = spanOf(influences, names);
  const isMarked = names.train.length * names.query.length <= MOST_MARKED;
  return [
    {
      type: "heatmap",
      z: influences,
      customdata: errors,
      zmin: -largest,
      zmax: largest,
      xgap: 1,
      ygap: 1,
      colorscale: ["low-2", "low-1", "zero", "high-1", "high-2"].map((name, at) => [at / 4, colour(`map-${name}`)]),
      text: influences.map((row, step) =>
        row.map((value, at) => (isMarked && !isSignificant(value, errors[step][at]) ? "·" : "")),
      ),
      texttemplate: "%{text}",
      textfont: { color: colour("muted"), size: 12 },
      hovertemplate: "example's step %{y}<br>query's step %{x}<br>%{z:.3g} ± %{customdata:.1g}<extra></extra>",
      colorbar: {
        orientation: "h", thickness: 8, outlinewidth: 0, len: 1, y: 1.01, yanchor: "bottom", nticks: 5,
        tickformat: ".3~g", tickfont: { size: 11 }, ticklabelposition: "outside top", ticks: "",
      },
    },
  ];
}

/** The largest influence of the loop's own steps: what is outside of it may be far beyond. */
function spanOf(influences, names) {
  const isOwn = (name) => /^\d/.test(name);
  const own = influences
    .filter((_, step) => isOwn(names.train[step]))
    .flatMap((row) => row.filter((_, at) => isOwn(names.query[at])));
  return own.reduce((most, value) => Math.max(most, Math.abs(value)), 0) || 1;
}

function layoutOf(names, view) {
  const ticks = (those) => {
    const every = Math.ceil(those.length / 16);
    const shown = [...those.keys()].filter((step) => step % every === 0);
    return { tickvals: shown, ticktext: shown.map((step) => those[step]), showgrid: false, ticks: "" };
  };
  const shapes = [];
  if (view.step !== null && view.resolve !== "same_step") {
    const whole = { xref: "paper", x0: 0, x1: 1, yref: "paper", y0: 0, y1: 1 };
    const along = view.resolve === "train_step" ? { yref: "y", y0: view.step - 0.5, y1: view.step + 0.5 }
      : { xref: "x", x0: view.step - 0.5, x1: view.step + 0.5 };
    shapes.push({ type: "rect", ...whole, ...along, line: { color: colour("ink"), width: 1.6 } });
  }
  return {
    ...baseLayout(),
    margin: { l: 48, r: 6, t: 34, b: 42 },
    shapes,
    xaxis: axis("step of the query", { ...ticks(names.query), range: [-0.5, names.query.length - 0.5] }),
    yaxis: axis("step of the example", { ...ticks(names.train), range: [names.train.length - 0.5, -0.5] }),
  };
}

export function matrixTable({ influences, standard_errors: errors }, names) {
  const write = scaled(influences.flat());
  const plain = scaled(influences.flat(), { sign: false });
  const rows = names.train.map((name, step) => [
    name,
    ...influences[step].map((value, at) => `${write(value)} ± ${plain(errors[step][at])}`),
  ]);
  const caption = "Influence by step of the example (rows) and of the query (columns)";
  return dataTable(caption, ["step", ...names.query], rows);
}

export function matrixPng(matrix, names, view, title) {
  const layout = layoutOf(names, { ...view, step: null });
  return asPng(
    traces(matrix, names),
    {
      ...layout,
      margin: { l: 72, r: 24, t: 96, b: 60 },
      title: {
        text: escaped(title, 70), font: { size: 15, color: colour("ink") },
        x: 0.03, xanchor: "left",
      },
    },
    680,
    680,
  );
}
