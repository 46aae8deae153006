// Prometheus histograms, as far as two percentiles need them.

/** [upper bound, observations at or below it] by bound, summed over the series of `name` in an exposition. */
export function parseHistogram(text, name) {
  const totals = new Map();
  for (const line of text.split("\n")) {
    if (!line.startsWith(`${name}_bucket{`)) continue;
    const bound = /[{,]le="([^"]+)"/.exec(line)?.[1];
    const value = Number(line.slice(line.lastIndexOf(" ") + 1));
    if (bound === undefined || Number.isNaN(value)) continue;
    const number = bound === "+Inf" ? Infinity : Number(bound);
    totals.set(number, (totals.get(number) ?? 0) + value);
  }
  return [...totals].sort((a, b) => a[0] - b[0]);
}

/** What came between two readings; everything in `now` if the server restarted in between. */
export function difference(now, before) {
  const old = new Map(before);
  const deltas = now.map(([bound, total]) => [bound, total - (old.get(bound) ?? 0)]);
  return deltas.some(([, total]) => total < 0) ? now : deltas;
}

/** The q-quantile, linear inside its bucket; null without observations. */
export function quantile(q, buckets) {
  const total = buckets.length ? buckets[buckets.length - 1][1] : 0;
  if (total <= 0) return null;
  const rank = q * total;
  let lower = 0;
  let below = 0;
  for (const [bound, cumulative] of buckets) {
    if (cumulative >= rank && cumulative > below) {
      return bound === Infinity ? lower : lower + ((bound - lower) * (rank - below)) / (cumulative - below);
    }
    [lower, below] = [bound, cumulative];
  }
  return lower;
}
