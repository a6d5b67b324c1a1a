// That the page waits, as it is seen and as it is said.

import { byId } from "./elements.js";

/** Awaits an answer while the page says so; null says nothing. */
export async function busy(what, answering) {
  const root = document.documentElement;
  root.dataset.busy = String(Number(root.dataset.busy ?? 0) + 1);
  if (what) {
    say(`${what}…`);
  }
  try {
    return await answering;
  } finally {
    const left = Number(root.dataset.busy) - 1;
    root.dataset.busy = String(left);
    if (left === 0) {
      delete root.dataset.busy;
    }
  }
}

/** Says it to those who don't see the page. */
export function say(text) {
  byId("status").textContent = text;
}
