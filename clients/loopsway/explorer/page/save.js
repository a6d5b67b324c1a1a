// Files that the page gives away: tables as CSV (RFC 4180), charts as PNG.

/** Saves rows as a CSV file; numbers with all their digits. */
export function saveCsv(name, heads, rows) {
  const lines = [heads, ...rows].map((row) => row.map(cell).join(","));
  const blob = new Blob([`${lines.join("\r\n")}\r\n`], { type: "text/csv" });
  const url = URL.createObjectURL(blob);
  save(name, url);
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** Saves an image that is given as a data URL. */
export function savePng(name, url) {
  save(name, url);
}

/** The rankings of an answer, a row for each step and example. */
export function rankingRows(answer) {
  const columns = new Set();
  const rows = answer.rankings.flatMap((ranking) =>
    ["proponents", "opponents"].flatMap((kind) =>
      ranking[kind].map((each, rank) => {
        Object.keys(each.metadata).forEach((name) => columns.add(name));
        return { step: ranking.step, kind, rank: rank + 1, ...each };
      }),
    ),
  );
  const heads = ["step", "sign", "rank", "example_id", "influence", "standard_error", "significant", "description"];
  const metadata = [...columns].sort();
  return {
    heads: [...heads, ...metadata.map((name) => `metadata.${name}`)],
    rows: rows.map((row) => [
      row.step, row.kind.slice(0, -1), row.rank, row.example_id, row.influence, row.standard_error, row.significant,
      row.description, ...metadata.map((name) => row.metadata[name]),
    ]),
  };
}

function cell(value) {
  const text = value === null || value === undefined ? "" : String(value);
  return typeof value === "string" && /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function save(name, url) {
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
}
