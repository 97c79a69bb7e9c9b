// Requests to the server that the page came from. The key is in this module's memory and nowhere else.

let key = null;
let asking = null;

/** A refusal or a broken connection, in words for people. */
export class ServerError extends Error {
  constructor(message, status = 0, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** The key as clients send it; null if none was given. */
export function currentKey() {
  return key;
}

/** Ask for the key in a dialog; many who ask at once share one. Rejects if the reader declines. */
export function askForKey(reason = "This server asks for a key.") {
  asking ??= new Promise((resolve, reject) => {
    const dialog = document.getElementById("key-dialog");
    const input = document.getElementById("key-input");
    document.getElementById("key-reason").textContent = reason;
    input.value = "";
    let isGiven = false;
    const onSubmit = (event) => {
      event.preventDefault();
      if (!input.value.trim()) return;
      isGiven = true;
      key = input.value.trim();
      dialog.close();
    };
    dialog.querySelector("form").addEventListener("submit", onSubmit);
    dialog.addEventListener(
      "close",
      () => {
        dialog.querySelector("form").removeEventListener("submit", onSubmit);
        input.value = "";
        asking = null;
        if (isGiven) resolve();
        else reject(new ServerError("No key was given. Press “Key” at the top to give it.", 401));
      },
      { once: true },
    );
    dialog.showModal();
  });
  return asking;
}

async function refusal(response) {
  let message = `the server answered with status ${response.status}`;
  let code = null;
  try {
    const { error } = await response.json();
    message = error.message ?? message;
    code = error.code ?? null;
  } catch {
    // no JSON: the status is all there is
  }
  if (response.status === 429) message += ". Wait a little and try again";
  if (response.status === 503) message += ". Try again when it runs";
  return new ServerError(message, response.status, code);
}

/** A response whose status is good; asks for the key as often as it is wrong. */
export async function request(path, options = {}) {
  for (;;) {
    const headers = { ...options.headers };
    if (key !== null) headers.authorization = `Bearer ${key}`;
    const used = key;
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError("The server does not answer. See whether it still runs, and try again.");
    }
    if (response.ok) return response;
    if (response.status !== 401) throw await refusal(response);
    if (key === used) await askForKey(used === null ? undefined : "That key is wrong. Give the key that the server was started with.");
  }
}

/** JSON of a path; `body` makes it a POST. */
export async function json(path, body = undefined, method = body === undefined ? "GET" : "POST") {
  const options = { method };
  if (body !== undefined) {
    options.headers = { "content-type": "application/json" };
    options.body = JSON.stringify(body);
  }
  return (await request(path, options)).json();
}

/** The data of server-sent events, one string each. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const data = block.split("\n").filter((line) => line.startsWith("data: "));
        if (data.length) yield data.map((line) => line.slice(6)).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Chunks of a streamed answer. Throws if it ends before it is complete. */
export async function* stream(path, body, signal) {
  const response = await request(path, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  try {
    for await (const data of events(response)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(chunk.error.message, 0, chunk.error.code);
      yield chunk;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ServerError) throw error;
  }
  throw new ServerError("The connection broke off before the answer was complete. Press Retry when the server runs.");
}
