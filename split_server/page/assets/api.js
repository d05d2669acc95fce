// Sends requests to the server. The session's cookie goes with each by itself.

const VERSION = "2";

export class ApiError extends Error {
  constructor(status, error) {
    const parts = [error.message];
    if (error.field) parts.push(`(${error.field}${error.value == null ? "" : `: ${error.value}`})`);
    if (error.limit != null) parts.push(`Allowed: ${error.limit}.`);
    if (error.hint) parts.push(error.hint);
    super(parts.join(" "));
    this.status = status;
  }
}

// Send a request; returns the parsed answer. A header that no foreign page can send goes with it.
export async function call(method, path, body) {
  const headers = { "sfprompt-version": VERSION };
  if (method !== "GET") headers["idempotency-key"] = key();
  if (body !== undefined) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers, body: body && JSON.stringify(body) });
  } catch {
    throw new ApiError(0, { message: "The server does not answer. Is it running?" });
  }
  const text = await response.text();
  let content = null;
  try { content = text ? JSON.parse(text) : null; } catch { /* an answer of a proxy in between */ }
  if (response.ok) return content;
  throw new ApiError(response.status, content?.error ?? {
    message: `Something between this browser and the server answered ${response.status}.`,
  });
}

// crypto.randomUUID is missing where a page is served by plain HTTP from another machine.
function key() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) =>
    byte.toString(16).padStart(2, "0")).join("");
}

export const run = (id) => `v1/runs/${encodeURIComponent(id)}`;
