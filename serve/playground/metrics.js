// Prometheus text -> latency by number of samples.

const SAMPLE = /^(\w+)\{(.*)\} (\S+)$/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;
const METRIC = "credence_request_duration_seconds";

export function parse(text) {
  const samples = [];
  for (const line of text.split("\n")) {
    const match = SAMPLE.exec(line);
    if (match === null) continue;
    const labels = Object.fromEntries(Array.from(match[2].matchAll(LABEL), ([, name, value]) => [name, value]));
    samples.push({ name: match[1], labels, value: Number(match[3].replace("Inf", "Infinity")) });
  }
  return samples;
}

// The quantile q of cumulative counts by upper bound, linear within a bucket, as Prometheus' histogram_quantile has it.
export function quantile(q, buckets) {
  const sorted = [...buckets].sort(([a], [b]) => a - b);
  const total = sorted.at(-1)?.[1] ?? 0;
  if (!total) return null;
  let [lower, below] = [0, 0];
  for (const [bound, count] of sorted) {
    if (count >= q * total) return bound === Infinity ? lower : lower + ((bound - lower) * (q * total - below)) / (count - below);
    [lower, below] = [bound, count];
  }
  return lower;
}

// Successful requests of a mode, and those of the mean (k = 0): [{k, count, mean, p95}], seconds, by k.
export function latencyByK(text, mode) {
  const byK = new Map();
  for (const { name, labels, value } of parse(text)) {
    if (!name.startsWith(METRIC) || labels.outcome !== "ok" || ![mode, "mean"].includes(labels.mode)) continue;
    const k = Number(labels.k);
    if (!byK.has(k)) byK.set(k, { k, count: 0, sum: 0, buckets: new Map() });
    const entry = byK.get(k);
    if (name === `${METRIC}_count`) entry.count += value;
    if (name === `${METRIC}_sum`) entry.sum += value;
    if (name === `${METRIC}_bucket`) {
      const bound = labels.le === "+Inf" ? Infinity : Number(labels.le);
      entry.buckets.set(bound, (entry.buckets.get(bound) ?? 0) + value);
    }
  }
  return [...byK.values()]
    .filter((entry) => entry.count > 0)
    .sort((a, b) => a.k - b.k)
    .map(({ k, count, sum, buckets }) => ({ k, count, mean: sum / count, p95: quantile(0.95, buckets) }));
}
