// What is drawn as SVG: bars with error bars, a strip of dots, the K-curve. Text goes in as text, never as markup.

export function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function svg(name, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

const percent = (value) => `${(100 * value).toFixed(1)} %`;
const within = (value) => Math.min(Math.max(value, 0), 1);

// rows: [{name, value, std?, dots?, note?}], values in [0, 1].
export function bars(title, rows) {
  const width = 400;
  const list = element("ul", { class: "bars", "aria-label": title });
  for (const { name, value, std, dots = [], note } of rows) {
    const x = (share) => (4 + within(share) * (width - 8)).toFixed(1);
    const drawing = svg("svg", { viewBox: `0 0 ${width} 24`, preserveAspectRatio: "none", "aria-hidden": "true" });
    drawing.append(svg("rect", { x: 4, y: 3, width: width - 8, height: 18, class: "track" }));
    drawing.append(svg("rect", { x: 4, y: 3, width: (x(value) - 4).toFixed(1), height: 18, class: "bar" }));
    for (const dot of dots) drawing.append(svg("path", { d: `M${x(dot)} 9v6`, class: "tick" }));
    if (std !== undefined) {
      const [low, high] = [x(value - std), x(value + std)];
      drawing.append(svg("path", { d: `M${low} 7v10M${low} 12H${high}M${high} 7v10`, class: "whisker" }));
    }
    const text = std === undefined ? percent(value) : `${percent(value)} ± ${percent(std)}`;
    list.append(element("li", {}, element("span", { class: "name" }, name), drawing, element("span", { class: "value" }, note ?? text)));
  }
  return element("figure", {}, element("figcaption", {}, title), list);
}

// A small bar for a probability that stands beside it as text.
export function share(value) {
  const [track, bar] = [100, 100 * within(value)].map((width) => svg("rect", { x: 0, y: 0, width, height: 10 }));
  track.setAttribute("class", "track");
  bar.setAttribute("class", "bar");
  return svg("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", class: "share", "aria-hidden": "true" }, track, bar);
}

// One dot for each sample, from the least to the most likely; null is a sample that gives the token probability 0.
export function dots(logprobs, average) {
  const [width, height] = [232, 30];
  const finite = logprobs.filter((value) => value !== null);
  const low = Math.min(average, ...finite, -0.1);
  const x = (value) => (6 + (1 - value / low) * (width - 12)).toFixed(1);
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "strip", role: "img" });
  const rounded = logprobs.map((value) => (value === null ? "−∞" : value.toFixed(2)));
  drawing.setAttribute("aria-label", `log-probability under each sample: ${rounded.join(", ")}`);
  drawing.append(svg("path", { d: `M6 15H${width - 6}`, class: "axis" }), svg("path", { d: `M${x(average)} 3v24`, class: "average" }));
  logprobs.forEach((value, index) => {
    if (value !== null) drawing.append(svg("circle", { cx: x(value), cy: 10 + 10 * (index % 2), r: 3.5, class: "dot" }));
  });
  const caption = `${logprobs.length} samples, ${low.toFixed(1).replace("-", "−")} to 0 nats; line: average`;
  const impossible = logprobs.length - finite.length;
  return element("figure", {}, drawing, element("figcaption", {}, impossible ? `${caption}; impossible for ${impossible}` : caption));
}

const inMs = (seconds) => (seconds < 0.9995 ? `${Math.round(1000 * seconds)} ms` : `${seconds.toFixed(2)} s`);

// The smallest of 1, 2, 2.5, 5 x 10^n of which four steps reach the value.
function niceStep(value) {
  const power = 10 ** Math.floor(Math.log10(value / 4));
  return [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((step) => 4 * step >= value);
}

// points: [{k, count, mean, p95}]; the places on the x axis are the values of k in order. Drawn to the width it has, in CSS pixels.
export function curve(points, space) {
  const width = Math.min(Math.max(space, 280), 640);
  const [height, left, bottom, top] = [220, 58, 40, 14];
  const most = 4 * niceStep(Math.max(...points.flatMap(({ mean, p95 }) => [mean, p95])));
  const gap = (width - left - 24) / Math.max(points.length - 1, 1);
  const x = (index) => left + 12 + (points.length > 1 ? index * gap : gap / 2);
  const y = (seconds) => top + (1 - seconds / most) * (height - top - bottom);
  const label = points.map(({ k, mean, p95 }) => `K ${k}: mean ${inMs(mean)}, p95 ${inMs(p95)}`).join("; ");
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "curve", role: "img", "aria-label": label });
  for (let step = 0; step <= 4; step += 1) {
    const seconds = (most * step) / 4;
    drawing.append(svg("path", { d: `M${left} ${y(seconds)}H${width}`, class: "axis" }));
    drawing.append(svg("text", { x: left - 8, y: y(seconds) + 4, "text-anchor": "end" }, inMs(seconds)));
  }
  for (const measure of ["p95", "mean"]) {
    const line = points.map((point, index) => `${index ? "L" : "M"}${x(index).toFixed(1)} ${y(point[measure]).toFixed(1)}`);
    drawing.append(svg("path", { d: line.join(""), class: `line ${measure}` }));
    points.forEach((point, index) => {
      const title = svg("title", {}, `K ${point.k}, ${measure} ${inMs(point[measure])}, ${point.count} requests`);
      const [cx, cy] = [x(index), y(point[measure])];
      const shape = measure === "mean" ? svg("circle", { cx, cy, r: 4 }, title) : svg("rect", { x: cx - 4, y: cy - 4, width: 8, height: 8 }, title);
      shape.setAttribute("class", `mark ${measure}`);
      drawing.append(shape);
    });
  }
  points.forEach(({ k }, index) => drawing.append(svg("text", { x: x(index), y: height - 22, "text-anchor": "middle" }, String(k))));
  drawing.append(svg("text", { x: (left + width) / 2, y: height - 4, "text-anchor": "middle" }, "K (0 = the mean)"));
  const key = element("figcaption", {}, element("span", { class: "mean" }, "● mean"), element("span", { class: "p95" }, "■ 95th percentile"));
  return element("figure", {}, drawing, key);
}
