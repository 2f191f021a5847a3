// Calls of the server's API. The key travels in a header alone; addresses are relative, so that a path before /playground is kept.

export class ApiError extends Error {
  constructor(message, { status = null, type = null, param = null, requestId = null } = {}) {
    super(message);
    Object.assign(this, { status, type, param, requestId });
  }
}

function headers(key, requestId) {
  const all = { "Content-Type": "application/json", "X-Request-Id": requestId };
  if (key) all.Authorization = `Bearer ${key}`;
  return all;
}

// crypto.randomUUID exists on https and localhost only.
function newRequestId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

async function call(path, key, options = {}) {
  const sent = newRequestId();
  let response;
  try {
    response = await fetch(path, { ...options, headers: headers(key, sent), cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(`The server does not answer (${error.message}).`, { requestId: sent });
  }
  const requestId = response.headers.get("X-Request-Id") || sent;
  if (!response.ok) {
    const text = await response.text();
    let refusal = {};
    try {
      refusal = JSON.parse(text).error || {};
    } catch {
      // not our envelope: the text says it
    }
    throw new ApiError(refusal.message || text || response.statusText, { ...refusal, status: response.status, requestId });
  }
  return { response, requestId };
}

export async function models(key) {
  return (await (await call("v1/models", key)).response.json()).data;
}

export async function metricsText() {
  return (await call("metrics", "")).response.text();
}

// Yields the JSON documents of a stream of server-sent events; bytes may be cut anywhere.
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      pending += value;
      const parts = pending.split(/\r?\n\r?\n/);
      pending = parts.pop();
      for (const part of parts) {
        const data = part.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart());
        const document = data.join("\n");
        if (document === "[DONE]") return;
        if (document) yield JSON.parse(document);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// Sends a streaming request; yields its chunks. An error may also come as an event, after the answer has begun.
export async function* ask(path, body, key, signal) {
  const { response, requestId } = await call(path, key, { method: "POST", body: JSON.stringify(body), signal });
  let ended = false;
  for await (const chunk of events(response.body)) {
    if (chunk.error) throw new ApiError(chunk.error.message, { ...chunk.error, status: chunk.error.code, requestId });
    ended = ended || chunk.choices.some((choice) => choice.finish_reason);
    yield chunk;
  }
  if (!ended) throw new ApiError("The answer broke off before its end.", { requestId });
}
