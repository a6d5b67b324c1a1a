// Elements of the page. Text is always set as text: what is shown comes from training data, and may hold markup.

const SVG = "http://www.w3.org/2000/svg";

/** Makes an element: attributes by name, `on` for listeners; children are elements or text. */
export function element(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** Makes an SVG element. */
export function drawing(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

export function byId(id) {
  return document.getElementById(id);
}

function filled(made, { on = {}, ...attributes }, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) {
      made.setAttribute(name, value === true ? "" : value);
    }
  }
  for (const [event, listener] of Object.entries(on)) {
    made.addEventListener(event, listener);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

/** A table of numbers that stands for a chart: the first cell of each row heads it. */
export function dataTable(caption, heads, rows) {
  const head = element("tr", {}, ...heads.map((text) => element("th", { scope: "col" }, text)));
  const body = rows.map(([first, ...others]) =>
    element("tr", {}, element("th", { scope: "row" }, first), ...others.map((text) => element("td", {}, text))),
  );
  const table = element(
    "table",
    { class: "numbers" },
    element("caption", {}, caption),
    element("thead", {}, head),
    element("tbody", {}, ...body),
  );
  return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption }, table);
}
