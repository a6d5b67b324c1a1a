// What is on the page, as the address says it: who has the address sees the same.

const DEFAULTS = { resolve: "query_step", k: 10, where: "" };

/** The view of an address: kind and query are null where nothing is asked, step is null for the whole loop. */
export function readView(search) {
  const parameters = new URLSearchParams(search);
  const kind = ["example", "id"].find((name) => parameters.has(name)) ?? null;
  const step = parameters.get("step");
  const k = Number(parameters.get("k"));
  return {
    index: parameters.get("index") ?? "",
    kind,
    query: kind && parameters.get(kind),
    resolve: parameters.get("resolve") ?? DEFAULTS.resolve,
    k: Number.isInteger(k) && k !== 0 ? k : DEFAULTS.k,
    where: parameters.get("where") ?? "",
    step: step !== null && /^\d+$/.test(step) ? Number(step) : null,
    selected: parameters.get("selected"),
  };
}

/** The address of a view; what is as usual is left out. */
export function writeView(view) {
  const parameters = new URLSearchParams({ index: view.index });
  if (view.kind) {
    parameters.set(view.kind, view.query);
  }
  for (const [name, usual] of Object.entries(DEFAULTS)) {
    if (view[name] !== usual) {
      parameters.set(name, view[name]);
    }
  }
  if (view.step !== null) {
    parameters.set("step", view.step);
  }
  if (view.selected !== null) {
    parameters.set("selected", view.selected);
  }
  return `?${parameters}`;
}

/** What the server is asked for a view, without the step and the example that are looked at. */
export function questionOf(view) {
  return {
    index: view.index,
    query: { [view.kind]: view.query },
    resolve: view.resolve,
    k: view.k,
    where: view.where,
  };
}
