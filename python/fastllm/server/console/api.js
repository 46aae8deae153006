// The server's HTTP interface as this page uses it. Paths are relative, so the page works under any prefix.

const KEY = "fastllm.key";

const TITLES = {
  0: "No connection",
  400: "The request was refused",
  401: "The API key is missing or wrong",
  403: "This key may not do that",
  404: "Not found",
  408: "The request took too long",
  413: "The request is too large",
  422: "The request was refused",
  429: "The server is busy",
  503: "The server takes no requests now",
  504: "The request took too long",
};

/** What went wrong, in words. status: the HTTP status; 0 without an answer. */
export class ApiError extends Error {
  constructor(status, message, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }

  get title() {
    return TITLES[this.status] ?? (this.status >= 500 ? "The server failed" : "The request was refused");
  }
}

export class Api {
  /** The key lives as long as the tab, and nowhere else. */
  get key() {
    return sessionStorage.getItem(KEY) ?? "";
  }

  set key(value) {
    if (value) sessionStorage.setItem(KEY, value);
    else sessionStorage.removeItem(KEY);
  }

  async json(path) {
    const response = await this.#fetch(path, { signal: AbortSignal.timeout(5000) });
    return response.json();
  }

  async text(path) {
    const response = await this.#fetch(path, { signal: AbortSignal.timeout(5000) });
    return response.text();
  }

  /** "loading", "ready", "draining" or "unhealthy"; needs no key. */
  async phase() {
    const response = await this.#send("ready", { signal: AbortSignal.timeout(5000) });
    const body = await response.json().catch(() => null);
    return body?.status ?? "unhealthy";
  }

  /** Chunks of a streamed chat completion. An ApiError is thrown for everything but an abort of `signal`. */
  async *chat(body, signal) {
    const response = await this.#fetch("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal,
    });
    try {
      for await (const data of eventData(response.body)) {
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ApiError(500, chunk.error.message ?? "The answer failed.");
        yield chunk;
      }
    } catch (error) {
      if (error instanceof ApiError || signal.aborted) throw error;
      throw new ApiError(0, "The connection broke while the answer came.");
    }
    throw new ApiError(0, "The connection ended before the answer did.");
  }

  async #fetch(path, options) {
    const response = await this.#send(path, options);
    if (response.ok) return response;
    const body = await response.json().catch(() => null);
    const message = body?.error?.message ?? `The server answered ${response.status} without a reason.`;
    throw new ApiError(response.status, message, Number(response.headers.get("Retry-After")) || null);
  }

  async #send(path, options) {
    const headers = { ...options.headers };
    if (this.key) {
      if (!/^[\x21-\x7e]+$/.test(this.key)) {
        throw new ApiError(401, "The API key has spaces or letters that an HTTP header cannot carry.");
      }
      headers.Authorization = `Bearer ${this.key}`;
    }
    try {
      return await fetch(new URL(path, document.baseURI), { ...options, headers, cache: "no-store" });
    } catch (error) {
      if (options.signal?.aborted && error.name === "AbortError") throw error;
      throw new ApiError(0, "The server cannot be reached.");
    }
  }
}

async function* eventData(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) yield line.slice(5).trim();
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
