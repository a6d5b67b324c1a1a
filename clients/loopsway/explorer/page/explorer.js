// The page: it keeps what is asked and looked at in the address, asks the server, and draws the answer.

import { Problem, ask } from "./ask.js";
import { byId, element } from "./elements.js";
import { drawExample, drawExampleNote } from "./example.js";
import { busy, say } from "./loading.js";
import { count, stepName } from "./numbers.js";
import { drawArtefact, drawCoverage } from "./notices.js";
import { pick, pickOthers } from "./pick.js";
import { clearProblems, fill, showColumns, showKind, showProblem, typed } from "./question.js";
import { drawRankings } from "./rankings.js";
import { rankingRows, saveCsv, savePng } from "./save.js";
import { drawSteps } from "./steps.js";
import { axisTitle, curvesOf, drawLegend, drawTrajectory, shownIn, tagsOf } from "./trajectory.js";
import { trajectoryPng, trajectoryTable } from "./trajectory.js";
import { questionOf, readView, writeView } from "./view.js";

let indices = [];
let view = readView(location.search);
let answer = null; // to the view's question
let about = null; // of the view's selected example
let asking = new AbortController();
let looking = new AbortController();

const actions = { select, query: (id) => askAnew({ ...typed(), kind: "id", query: id }) };

async function start() {
  clearProblems();
  try {
    ({ indices } = await busy("Looking at the server's indices", ask("indices")));
  } catch (error) {
    failed(error, start);
    return;
  }
  const label = ({ name, num_examples: size }) => `${name} · ${count(size)} examples`;
  byId("index").replaceChildren(...indices.map((each) => element("option", { value: each.name }, label(each))));
  go(readView(location.search));
}

/** Goes to a view that came from the address. */
function go(next) {
  view = { ...next, index: next.index || indices[0]?.name || "" };
  fill(view);
  if (view.kind) {
    run();
  } else {
    answer = null;
    byId("answer").hidden = true;
    document.title = "Loopsway explorer";
    byId("drawn").replaceChildren();
    if (byId("pick").open) {
      draw();
    } else {
      byId("pick").open = true; // which draws
    }
  }
}

function askAnew(next) {
  view = next;
  fill(view);
  history.pushState(null, "", writeView(view));
  run();
}

/** Asks the view's question and draws the answer. */
async function run() {
  clearProblems();
  asking.abort();
  looking.abort();
  asking = new AbortController();
  const own = asking;
  byId("answer").setAttribute("aria-busy", "true");
  try {
    answer = await busy("Asking the server", ask("influences", questionOf(view), own.signal));
    show(answer);
  } catch (error) {
    if (own === asking) {
      byId("answer").hidden = true;
      failed(error, run);
    }
  } finally {
    if (own === asking) {
      byId("answer").removeAttribute("aria-busy");
    }
  }
}

/** Shows the answer, and looks closer at the example that is selected: the strongest, where none is. */
function show({ rankings }) {
  about = null;
  byId("pick").open = false;
  byId("answer").hidden = false;
  if (view.step !== null && view.step >= rankings.length - 1) {
    view.step = null;
  }
  const { proponents, opponents } = rankings[0];
  showColumns([...proponents, ...opponents]);
  view.selected ??= (proponents[0] ?? opponents[0])?.example_id ?? null;
  remember();
  drawAnswer();
  const part = answer.coverage < 1 ? " A part of the index did not answer." : "";
  say(
    proponents.length + opponents.length
      ? `Answered: ${proponents.length} proponents and ${opponents.length} opponents.${part}`
      : `Answered: no training example was found.${part}`,
  );
  look();
}

/** Asks for all about the selected example. */
async function look() {
  looking.abort();
  looking = new AbortController();
  const own = looking;
  const id = view.selected;
  if (id === null) {
    byId("example").hidden = true;
    return;
  }
  byId("example").hidden = false;
  drawExampleNote(id, "Looking closer…", { isBusy: true });
  const { index, query, resolve } = questionOf(view);
  try {
    about = await busy(null, ask("example", { index, query, resolve, example_id: id }, own.signal));
  } catch (error) {
    if (own === looking && error.name !== "AbortError") {
      drawExampleNote(id, error.message);
    }
    return;
  }
  drawCurves();
  drawSelected();
}

function select(id) {
  view.selected = id;
  about = null;
  remember();
  drawCurves();
  drawStep();
  look();
  const panel = byId("example").getBoundingClientRect();
  if (panel.top > innerHeight * 0.8) {
    byId("example").scrollIntoView({ block: "start" });
  }
}

function chooseStep(step) {
  view.step = step;
  remember();
  drawCurves();
  drawStep();
  if (about) {
    drawSelected();
  }
}

/** Writes the view into the address, over the one that is there: looking closer is not a step of the way back. */
function remember() {
  history.replaceState(null, "", writeView(view));
}

// What is drawn of the answer.

function info() {
  return indices.find(({ name }) => name === view.index) ?? { loop_outside: false, num_steps: 0, num_examples: 0 };
}

/** The names of the steps that the view resolves. */
function names() {
  return answer.rankings.slice(1).map((ranking, _, all) => stepName(ranking.step, all.length, info().loop_outside));
}

function withoutGradient() {
  return view.resolve === "train_step" ? [] : answer.query.steps_without_gradient;
}

function questionText() {
  return view.kind === "id" ? `training example ${view.query}` : view.query;
}

function drawAnswer() {
  document.title = `${questionText()} · Loopsway explorer`;
  byId("asked").replaceChildren(
    "What shaped the answer to ", element("span", { class: "mono" }, questionText()),
  );
  const { num_examples: size, bits, width } = info();
  const losses = answer.query.losses.map((loss) => loss.toPrecision(3));
  byId("facts").textContent = [
    `${answer.query.num_steps} steps`,
    losses.length ? `loss ${losses.length > 1 ? `${losses[0]} → ${losses.at(-1)}` : losses[0]}` : null,
    `${answer.index}, generation ${answer.generation}: ${count(size)} examples`,
    `${bits} bit${bits > 1 ? "s" : ""} × ${count(width)}`,
    view.where ? `where ${view.where}` : null,
  ].filter(Boolean).join("  ·  ");
  drawCoverage(answer.coverage, run);
  drawArtefact(withoutGradient());
  byId("axis").textContent = axisTitle(view.resolve);
  drawCurves();
  drawStep();
}

function drawCurves() {
  const curves = curvesOf(answer, view.selected, about);
  drawLegend(curves, select);
  drawTrajectory(curves, view, names(), withoutGradient(), chooseStep);
  const data = byId("trajectory-data");
  data.querySelector(".scroll")?.remove();
  if (data.open) {
    data.append(trajectoryTable(curves, names(), view.resolve));
  }
}

function drawStep() {
  drawSteps(answer, names(), view.step, chooseStep);
  const ranking = answer.rankings.find(({ step }) => step === view.step);
  const tags = tagsOf(answer.rankings[0]);
  drawRankings(ranking, { stepName: names()[view.step], selected: view.selected, tags, actions });
}

function drawSelected() {
  const known = shownIn(answer, about.example_id);
  const called = (size) => [...Array(size).keys()].map((step) => stepName(step, size, info().loop_outside));
  const matrix = about.matrix.influences;
  const matrixNames = { train: called(matrix.length), query: called(matrix[0].length) };
  drawExample(about, known, { names: matrixNames, view, actions });
}

// What can be asked about, where nothing is yet.

async function draw(picking = pick) {
  if (!indices.length) {
    return;
  }
  clearProblems();
  try {
    await picking(actions.query);
  } catch (error) {
    failed(error, () => draw(picking));
  }
}

// Failing.

function failed(error, again) {
  if (error.name === "AbortError") {
    return;
  }
  say("");
  showProblem(error instanceof Problem ? error : new Problem({ detail: `The page failed: ${error.message}` }), again);
}

// What people do.

byId("question").addEventListener("submit", (event) => {
  event.preventDefault();
  askAnew(typed());
});
byId("query").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    byId("question").requestSubmit();
  }
});
document.querySelectorAll("[name=kind]").forEach((radio) => radio.addEventListener("change", showKind));
byId("index").addEventListener("change", () => {
  view = { ...typed(), kind: null, query: null };
  history.pushState(null, "", writeView(view));
  go(view);
});
byId("draw").addEventListener("click", () => {
  draw(pickOthers);
});
byId("pick").addEventListener("toggle", () => {
  if (byId("pick").open && byId("drawn").childElementCount === 0) {
    draw();
  }
});
byId("trajectory-data").addEventListener("toggle", drawCurves);
byId("share").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(location.href);
    say("Link copied.");
    byId("share").textContent = "Copied";
  } catch {
    byId("share").textContent = "Copy it from the address bar";
  }
  setTimeout(() => (byId("share").textContent = "Copy link"), 2500);
});
byId("save-rankings").addEventListener("click", () => {
  const { heads, rows } = rankingRows(answer);
  saveCsv("rankings.csv", heads, rows);
});
byId("save-trajectory-csv").addEventListener("click", () => {
  const rows = curvesOf(answer, view.selected, about).flatMap((curve) =>
    curve.influences.map((value, step) => [curve.id, names()[step], value, curve.standard_errors[step]]),
  );
  saveCsv("trajectories.csv", ["example_id", "step", "influence", "standard_error"], rows);
});
byId("save-trajectory-png").addEventListener("click", async () => {
  const title = `Influence on ${questionText()}`;
  const curves = curvesOf(answer, view.selected, about);
  savePng("trajectories.png", await trajectoryPng(curves, view, names(), withoutGradient(), title));
});
document.documentElement.addEventListener("themechange", () => {
  if (answer) {
    drawCurves();
    if (about) {
      drawSelected();
    }
  }
});
addEventListener("resize", () => {
  if (answer) {
    drawStep(); // as many names as have room
  }
});
addEventListener("popstate", () => go(readView(location.search)));
if (document.readyState === "complete") {
  start();
} else {
  addEventListener("load", start); // Plotly's script is there by then
}
