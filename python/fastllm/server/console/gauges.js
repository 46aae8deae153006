// The row of gauges: a figure, a word on it and a chart of the last minute each.

import { Sparkline } from "./chart.js";
import { byId, count, el, formatNumber, formatRate, formatSeconds } from "./dom.js";

const NOTHING = "–";

class Gauge {
  constructor(id, chart) {
    const root = byId(id);
    this.figure = root.querySelector(".figure");
    this.note = root.querySelector(".note");
    this.chart = new Sparkline(root.querySelector("svg"), chart);
  }

  show(figure, note, ...readings) {
    this.figure.textContent = figure;
    this.note.replaceChildren(...[note].flat());
    this.chart.push(...readings);
  }

  clear() {
    this.figure.textContent = NOTHING;
    this.note.textContent = "";
  }
}

export class Gauges {
  constructor() {
    this.running = new Gauge("gauge-running");
    this.waiting = new Gauge("gauge-waiting");
    this.kv = new Gauge("gauge-kv", { ceiling: 1 });
    this.rate = new Gauge("gauge-rate");
    this.firstToken = new Gauge("gauge-first", { series: 2 });
    this.nextToken = new Gauge("gauge-next", { series: 2 });
  }

  show(reading) {
    const { running, waiting, usedBlocks, totalBlocks, cachedBlocks, tokensPerSecond, totalTokens } = reading;
    this.running.show(formatNumber(running), running === 1 ? "sequence" : "sequences", running);
    this.waiting.show(formatNumber(waiting), waiting === 1 ? "sequence" : "sequences", waiting);
    this.waiting.note.title = reading.waitingReason ?? "";
    const share = totalBlocks ? usedBlocks / totalBlocks : 0;
    const percent = share > 0 && share < 0.1 ? (share * 100).toFixed(1) : String(Math.round(share * 100));
    this.kv.show(`${percent} %`, `${formatNumber(usedBlocks)} of ${count(totalBlocks, "block")}`, share);
    this.kv.note.title = `${count(cachedBlocks, "unused block")} can be matched by the prefix cache`;
    const rate = tokensPerSecond === null ? NOTHING : `${formatRate(tokensPerSecond)} /s`;
    this.rate.show(rate, `${count(totalTokens, "token")} so far`, tokensPerSecond);
    this.#showLatency(this.firstToken, reading.firstToken);
    this.#showLatency(this.nextToken, reading.nextToken);
  }

  /** Figures of a server that does not answer are no figures. */
  clear() {
    for (const gauge of Object.values(this)) gauge.clear();
  }

  #showLatency(gauge, [median, high] = [null, null]) {
    if (median === null) gauge.show(NOTHING, "none in the last minute", null, null);
    else {
      const tail = el("span", { class: "second" }, `99 %: ${formatSeconds(high)}`);
      gauge.show(formatSeconds(median), ["median, ", tail], median, high);
    }
  }
}
