// Questions to the explorer's own server, and what it says when it has no answer.

/** A failure: the server's text, and the field and character of the question that it blames. */
export class Problem extends Error {
  constructor({ detail, field = null, position = null, status = 0 }) {
    super(detail);
    this.field = field;
    this.position = position;
    this.status = status;
  }
}

/** Asks; a question that is aborted by its signal rejects with an AbortError. */
export async function ask(what, question = {}, signal = undefined) {
  let response;
  try {
    response = await fetch(`api/${what}`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(question),
      signal,
    });
  } catch (error) {
    if (error.name === "AbortError") {
      throw error;
    }
    throw new Problem({ detail: "The explorer's own server does not answer; start it again: loopsway explore" });
  }
  const text = await response.text();
  if (response.ok) {
    return JSON.parse(text);
  }
  let document;
  try {
    document = JSON.parse(text);
  } catch {
    document = { detail: `The explorer failed (${response.status}); the terminal that it runs in says why` };
  }
  throw new Problem(document);
}
