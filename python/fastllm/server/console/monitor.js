// Asks the server how it is, once a second while somebody looks, and turns totals into rates.

import { difference, parseHistogram, quantile } from "./histogram.js";

const EVERY = 1000; // milliseconds between looks at /stats; /metrics is asked every second time
const WINDOW = 60_000; // milliseconds that percentiles cover
const LATENCIES = {
  firstToken: "vllm:time_to_first_token_seconds",
  nextToken: "vllm:inter_token_latency_seconds",
};

/**
 * phase: "connecting", "loading", "ready", "draining", "unhealthy", "unreachable" or "locked" (it wants a key).
 * onPhase(phase, /stats or null) is called at every look, onReading(reading) whenever there are figures.
 */
export class Monitor {
  #api;
  #onPhase;
  #onReading;
  #timer = null;
  #looking = false;
  #looks = 0;
  #last = null; // { uptime, tokens } of the look before
  #snapshots = []; // { at, histograms } of the window, oldest first
  #percentiles = {};

  constructor(api, { onPhase, onReading }) {
    this.#api = api;
    this.#onPhase = onPhase;
    this.#onReading = onReading;
    document.addEventListener("visibilitychange", () => this.wake());
  }

  /** Looks now and goes on looking: at the start, after a new key, when the page is shown again. */
  async wake() {
    clearTimeout(this.#timer);
    if (this.#looking || document.hidden) return;
    this.#looking = true;
    const phase = await this.#look();
    this.#looking = false;
    // Without the right key every further look would be one more failed login.
    if (phase !== "locked") this.#timer = setTimeout(() => this.wake(), EVERY);
  }

  async #look() {
    const key = this.#api.key;
    let phase;
    let stats = null;
    try {
      stats = await this.#api.json("stats");
      phase = stats.engine && !stats.engine.healthy ? "unhealthy" : stats.phase;
      if (stats.engine) {
        if (this.#looks++ % 2 === 0) await this.#readLatencies().catch(() => (this.#percentiles = {}));
        this.#onReading({ ...this.#figures(stats), ...this.#percentiles });
      }
    } catch (error) {
      if (error.status === 401) phase = key === this.#api.key ? "locked" : "connecting";
      else phase = error.status ? await this.#api.phase().catch(() => "unreachable") : "unreachable";
    }
    this.#onPhase(phase, stats);
    return phase;
  }

  #figures({ uptime_s: uptime, engine, queued_sequences: queued, waiting_reason: reason }) {
    const last = this.#last;
    this.#last = { uptime, tokens: engine.generated_tokens };
    const elapsed = last ? uptime - last.uptime : 0; // negative after a restart
    return {
      running: engine.num_running,
      // Before the engine, where the server queues; in it; and put aside by it.
      waiting: (queued ?? 0) + engine.num_waiting + engine.num_swapped,
      waitingReason: reason ?? null,
      usedBlocks: engine.used_blocks,
      cachedBlocks: engine.cached_blocks,
      totalBlocks: engine.total_blocks,
      tokensPerSecond: elapsed > 0 ? (engine.generated_tokens - last.tokens) / elapsed : null,
      totalTokens: engine.generated_tokens,
    };
  }

  async #readLatencies() {
    const text = await this.#api.text("metrics");
    const now = performance.now();
    const histograms = {};
    for (const [key, name] of Object.entries(LATENCIES)) histograms[key] = parseHistogram(text, name);
    this.#snapshots.push({ at: now, histograms });
    while (this.#snapshots.length > 2 && now - this.#snapshots[1].at >= WINDOW) this.#snapshots.shift();
    for (const key of Object.keys(LATENCIES)) {
      const buckets = difference(histograms[key], this.#snapshots[0].histograms[key]);
      this.#percentiles[key] = [quantile(0.5, buckets), quantile(0.99, buckets)]; // seconds
    }
  }
}
