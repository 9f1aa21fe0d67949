/** The server as the page sees it: JSON, and answers as server-sent events. */

export const BASE = new URL("v1", document.baseURI).href;

export class ApiError extends Error {
  constructor(status, detail) {
    super(detail?.message ?? `the server answered ${status}`);
    this.status = status;
    this.param = detail?.param ?? null;
  }
}

export async function describe(key) {
  return (await ask("steering", key, {})).json();
}

/** Stream one answer; yields each chunk's data. Throws an ApiError, also for one that comes in mid-stream. */
export async function* stream(body, key, signal) {
  const sent = JSON.stringify({ ...body, stream: true, steering_trace: true });
  const response = await ask("chat/completions", key, { method: "POST", body: sent, signal });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(200, chunk.error);
    yield chunk;
  }
  throw new ApiError(200, { message: "the connection ended before the answer did" });
}

async function ask(path, key, options) {
  const headers = { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(`${BASE}/${path}`, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { message: "the server cannot be reached; is it still running?" });
  }
  if (response.ok) return response;
  const detail = await response.json().catch(() => null);
  throw new ApiError(response.status, detail?.error);
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
