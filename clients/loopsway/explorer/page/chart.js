// What all charts share: the page's colours, Plotly's settings, and nothing of training text unless it is escaped.

export const CONFIG = { displayModeBar: false, responsive: true, doubleClick: false, showTips: false };

const PROBE = document.createElement("span");

/** The colour that the theme gives a name, as rgb(red, green, blue). */
export function colour(name) {
  if (!PROBE.isConnected) {
    PROBE.hidden = true;
    document.body.append(PROBE);
  }
  PROBE.style.color = `var(--${name})`;
  return getComputedStyle(PROBE).color;
}

/** The colour, see-through. */
export function faint(rgb, opacity) {
  const [red, green, blue] = rgb.match(/[\d.]+/g);
  return `rgba(${red}, ${green}, ${blue}, ${opacity})`;
}

/** Text that Plotly shows as it is: it would take <b>, <a> and &amp; for markup. */
export function escaped(text, length = 48) {
  const line = text.replace(/\s+/g, " ").trim();
  const short = line.length > length ? `${line.slice(0, length - 1)}…` : line;
  return short.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

export function baseLayout() {
  return {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("muted") },
    dragmode: false,
    hoverlabel: {
      bgcolor: colour("panel"),
      bordercolor: colour("line"),
      font: { color: colour("ink"), family: getComputedStyle(document.body).fontFamily, size: 12 },
    },
  };
}

export function axis(title, more = {}) {
  return {
    title: { text: title, font: { size: 12 }, standoff: 8 },
    fixedrange: true,
    gridcolor: colour("grid"),
    linecolor: colour("line"),
    zeroline: false,
    automargin: false,
    ...more,
  };
}

/** The chart as a PNG that can be shown on any page, in the theme's colours. */
export async function asPng(data, layout, width, height) {
  const holder = document.createElement("div");
  try {
    const whole = { ...layout, width, height, paper_bgcolor: colour("panel") };
    await Plotly.newPlot(holder, data, whole, { staticPlot: true });
    return await Plotly.toImage(holder, { format: "png", width, height, scale: 2 });
  } finally {
    Plotly.purge(holder);
  }
}
