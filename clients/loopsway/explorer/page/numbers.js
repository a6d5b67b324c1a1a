// Numbers as people read them: aligned, with as many decimals as the largest of them deserves.

const MINUS = "\u2212";

/** A function that writes numbers of the magnitude of `values`, all with the same decimals. */
export function scaled(values, { sign = true } = {}) {
  const largest = values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
  const magnitude = largest > 0 ? Math.floor(Math.log10(largest)) : 0;
  const prefix = (value) => (value < 0 ? MINUS : sign && value > 0 ? "+" : "");
  if (magnitude < -4 || magnitude > 6) {
    return (value) => prefix(value) + Math.abs(value).toExponential(2).replace("-", MINUS);
  }
  const decimals = Math.max(0, 2 - magnitude);
  return (value) =>
    prefix(value) +
    Math.abs(value).toLocaleString("en", { minimumFractionDigits: decimals, maximumFractionDigits: decimals });
}

/** A count with thousands apart. */
export function count(value) {
  return value.toLocaleString("en");
}

/** Whether an influence lies beyond two standard errors of zero. */
export function isSignificant(influence, error) {
  return Math.abs(influence) > 2 * error;
}

/** What people call a step: its number, or the slots before and after the loop, which come last. */
export function stepName(step, numSteps, outside) {
  if (outside && step >= numSteps - 2) {
    return step === numSteps - 2 ? "before" : "after";
  }
  return String(step);
}

/** Where a ranking is, as the end of a sentence; `name` is its step's, null for the whole loop. */
export function placeOf(name) {
  if (name === null) {
    return "over the whole loop";
  }
  return /^\d/.test(name) ? `at step ${name}` : `${name} the loop`;
}
