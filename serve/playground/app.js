// The page: reads the form, sends it, shows what comes back while it comes.

import { ApiError, ask, metricsText, models } from "./api.js";
import { bars, curve, element } from "./charts.js";
import { latencyByK } from "./metrics.js";
import { asCurl, asPython, buildRequest, labelsOf } from "./request.js";
import { Tokens, drawLegend } from "./tokens.js";

const KEY = "credence-key";
const MODES = {
  ensemble: "every token is drawn from the average of the K samples",
  score: "the mean writes, then K samples read its text",
  choices: "how likely each of your labels is",
  generate: "K answers, and how far they agree",
};
// Where a refusal's `param` is entered.
const FIELD_OF = {
  model: "model", prompt: "prompt", messages: "prompt", max_tokens: "max-tokens", temperature: "temperature", seed: "token-seed",
  "uncertainty.n_samples": "k", "uncertainty.tau": "tau", "uncertainty.seed": "posterior-seed", "uncertainty.threshold": "threshold",
  "uncertainty.choices": "labels", "uncertainty.return_samples": "return-samples", "uncertainty.mode": "mode",
};

const at = (id) => document.getElementById(id);
const checked = (name) => document.querySelector(`input[name=${name}]:checked`).value;
const number = (id) => (at(id).value === "" ? null : at(id).valueAsNumber);
const ms = (value) => (value < 1000 ? `${Math.round(value)} ms` : `${(value / 1000).toFixed(2)} s`);

const tokens = new Tokens(at("tokens"), at("card"));
let listed = [];
let points = [];
let running = null;

// --- the form ---------------------------------------------------------------------------------------------------------

const posterior = () => listed.find((model) => model.id === at("model").value)?.posterior ?? null;

function showModel() {
  const found = posterior();
  const info = at("model-info");
  info.replaceChildren();
  if (found === null) {
    info.textContent = listed.length ? "no posterior: answers without uncertainty" : "";
  } else {
    const facts = [
      `${found.kind} posterior`, found.method, `τ ${found.tau ?? "none"}`, `K ${found.default_n_samples}, at most ${found.max_n_samples}`,
    ];
    info.append(`${facts.join(" · ")} · `, element("code", { title: found.digest }, found.digest.slice(0, 15)));
  }
  at("tau").placeholder = found?.tau ? `fitted: ${Number(found.tau.toPrecision(3))}` : "fitted";
  showMode();
  setK(found?.default_n_samples ?? 0);
}

function showMode() {
  const mode = at("mode").value;
  const scored = mode === "choices" || mode === "generate";
  at("mode-info").textContent = MODES[mode];
  at("labels-field").hidden = mode !== "choices";
  for (const input of [at("k"), at("k-slider")]) {
    input.min = scored ? 1 : 0;
    input.max = Math.max(posterior()?.max_n_samples ?? 0, Number(input.min));
  }
  setK(Math.max(number("k") ?? 0, Number(at("k").min)));
  showCurve();
}

function setK(k) {
  at("k").value = k;
  at("k-slider").value = k;
  at("k-info").textContent = k === 0 ? "0: the mean alone, as stock vLLM answers, without scores" : "";
}

function values() {
  return {
    endpoint: checked("endpoint"), model: at("model").value, prompt: at("prompt").value, mode: at("mode").value, k: number("k") ?? 0,
    labels: labelsOf(at("labels").value, at("label-space").checked), tau: number("tau"), temperature: number("temperature") ?? 0,
    maxTokens: number("max-tokens"), threshold: number("threshold"), posteriorSeed: number("posterior-seed"),
    tokenSeed: number("token-seed"), returnSamples: at("return-samples").checked,
  };
}

// --- errors -----------------------------------------------------------------------------------------------------------

function clearError() {
  at("error").hidden = true;
  document.querySelectorAll("[aria-invalid]").forEach((field) => field.removeAttribute("aria-invalid"));
}

function showError(error) {
  if (!(error instanceof ApiError)) console.error(error);
  const box = at("error");
  box.replaceChildren(element("strong", {}, [error.status, error.type].filter(Boolean).join(" ") || "Error"), element("p", {}, error.message));
  const facts = [["param", error.param], ["request id", error.requestId]].filter(([, value]) => value);
  const list = element("dl");
  for (const [name, value] of facts) list.append(element("dt", {}, name), element("dd", {}, element("code", {}, String(value))));
  box.append(list);
  box.hidden = false;
  at(error.status === 401 ? "key" : FIELD_OF[error.param])?.setAttribute("aria-invalid", "true");
}

// --- one question -----------------------------------------------------------------------------------------------------

// OpenAI's two layouts of log-probabilities -> [{text, logprob, alternatives}].
function spoken(logprobs) {
  if (!logprobs) return [];
  if (logprobs.content) {
    return logprobs.content.map(({ token, logprob, top_logprobs: top }) => ({
      text: token, logprob, alternatives: top.map((other) => [other.token, other.logprob]),
    }));
  }
  return logprobs.tokens.map((text, index) => ({
    text, logprob: logprobs.token_logprobs[index],
    alternatives: Object.entries(logprobs.top_logprobs?.[index] ?? {}).sort(([, a], [, b]) => b - a),
  }));
}

class Answer {
  constructor(values) {
    Object.assign(this, { values, started: performance.now(), first: null, spoken: [], scores: [], text: "", uncertainty: null, usage: null });
  }

  take(chunk) {
    if (chunk.usage) this.usage = chunk.usage;
    for (const choice of chunk.choices) {
      this.spoken.push(...spoken(choice.logprobs));
      const text = choice.text ?? choice.delta?.content ?? "";
      this.text += text;
      const whole = choice.uncertainty?.mode ? choice.uncertainty : null;
      if (whole) this.uncertainty = whole;
      if (whole?.tokens) this.scores = whole.tokens;
      else this.scores.push(...(choice.uncertainty?.tokens ?? []));
      if (this.first === null && (text || this.scores.length)) this.first = performance.now() - this.started;
    }
  }

  entries() {
    const count = Math.max(this.spoken.length, this.scores.length);
    if (!count) return this.text ? [{ text: this.text }] : [];
    return Array.from({ length: count }, (_, index) => {
      const scores = this.scores[index];
      return { ...this.spoken[index], ...(scores ? { text: scores.token, scores } : {}) };
    });
  }

  draw() {
    tokens.entries = this.entries();
    tokens.draw();
  }
}

function drawBars({ choices, choices_mass: mass, answers, samples }) {
  if (choices) {
    const rows = choices.map(({ label, prob, std }) => ({
      name: label.trim(), value: prob, std, dots: (samples ?? []).map((sample) => sample.probs[label]),
    })).sort((a, b) => b.value - a.value);
    const spread = samples ? "; ticks: each sample" : "";
    at("bars").replaceChildren(bars(`Probability of each label ± standard deviation over the samples${spread}. All labels together have ${(100 * mass).toFixed(1)} % of the probability.`, rows));
  } else if (answers) {
    const rows = answers.map(({ answer, count, share }) => ({ name: answer || "(empty)", value: share, note: `${count} of ${answers.reduce((sum, other) => sum + other.count, 0)}` }));
    at("bars").replaceChildren(bars("Share of the samples that gave each answer", rows));
  }
}

function drawSummary(answer) {
  const found = answer.uncertainty;
  const rows = [];
  if (found) {
    const unit = ` ${found.unit}`;
    const score = (value) => (value === null ? "none" : [value.toFixed(3), unit]);
    const kind = found.mode === "generate" ? "agreement" : found.calibrated ? "calibrated" : "not calibrated";
    rows.push(
      ["confidence", found.confidence === null ? "none" : [found.confidence.toFixed(3), ` ${kind}`]],
      answer.values.threshold === null ? ["flag", ["none", " no threshold given"]] : ["flag", found.flag.replace("_", " "), found.flag === "ok" ? "good" : "bad"],
      ["epistemic", score(found.epistemic)], ["aleatoric", score(found.aleatoric)], ["total", score(found.total)],
      ["samples", [String(found.n_effective), ` of ${found.n_samples}, τ ${Number(found.tau.toPrecision(3))}`]],
      ["adapter", [found.adapter.name, ` ${found.adapter.digest.slice(0, 15)}`], "", found.adapter.digest],
    );
  }
  rows.push(["time (first token)", [ms(performance.now() - answer.started), answer.first === null ? "" : ` (${ms(answer.first)})`]]);
  at("summary").replaceChildren(
    ...rows.map(([name, value, kind = "", title = ""]) => {
      const [main, unit = ""] = Array.isArray(value) ? value : [value];
      return element("div", title ? { title } : {}, element("dt", {}, name), element("dd", { class: kind }, main, element("small", {}, unit)));
    }),
  );
}

async function send() {
  if (running) return;
  clearError();
  const given = values();
  const { path, body } = buildRequest(given);
  const answer = new Answer(given);
  const abort = (running = new AbortController());
  tokens.clear();
  at("bars").replaceChildren();
  at("summary").replaceChildren();
  at("empty").hidden = true;
  at("asked").textContent = given.endpoint === "completions" ? given.prompt : "";
  at("send").disabled = true;
  at("stop").disabled = false;
  at("status").textContent = "asking …";
  // On a phone the answer lies below the form.
  if (matchMedia("(max-width: 820px)").matches) at("answer-title").scrollIntoView();
  try {
    for await (const chunk of ask(path, body, at("key").value, abort.signal)) {
      if (answer.first === null) at("status").textContent = "answering …";
      answer.take(chunk);
      answer.draw();
    }
    if (answer.uncertainty) drawBars(answer.uncertainty);
    else if (given.k > 0) throw new ApiError("The server answered without the uncertainty it was asked for.");
    drawSummary(answer);
    const confidence = answer.uncertainty?.confidence;
    at("status").textContent = `done: ${answer.usage?.completion_tokens ?? answer.entries().length} tokens${
      confidence == null ? "" : `, confidence ${confidence.toFixed(2)}`}`;
  } catch (error) {
    if (abort.signal.aborted) {
      at("status").textContent = `stopped after ${answer.entries().length} tokens`;
    } else {
      at("status").textContent = "failed";
      showError(error);
    }
  } finally {
    running = null;
    at("send").disabled = false;
    at("stop").disabled = true;
    showCurve();
  }
}

// --- models, curve, copying -------------------------------------------------------------------------------------------

async function loadModels() {
  try {
    const before = at("model").value;
    listed = await models(at("key").value);
    clearError();
    at("model").replaceChildren(...listed.map(({ id }) => element("option", { value: id }, id)));
    const preferred = listed.find(({ id }) => id === before) ?? listed.find((model) => model.posterior) ?? listed[0];
    if (preferred) at("model").value = preferred.id;
    showModel();
  } catch (error) {
    showError(error);
  }
}

function drawCurve() {
  at("curve").replaceChildren(...(points.length ? [curve(points, at("curve").clientWidth)] : []));
}

async function showCurve() {
  const mode = at("mode").value;
  try {
    points = latencyByK(await metricsText(), mode);
    drawCurve();
    const count = points.reduce((sum, point) => sum + point.count, 0);
    at("curve-info").textContent = points.length
      ? `${count} answers of the mean and of mode ${mode} since the server started, from its own metrics.`
      : `No answer of mode ${mode} yet.`;
  } catch (error) {
    at("curve-info").textContent = `The server's metrics cannot be read: ${error.message}`;
  }
}

async function copy(text) {
  at("code").textContent = text;
  at("code").hidden = false;
  try {
    await navigator.clipboard.writeText(text);
    at("copied").textContent = "copied";
  } catch {
    // No clipboard without https: the text is selected, to be copied by hand.
    getSelection().selectAllChildren(at("code"));
    at("copied").textContent = "selected: copy it with Ctrl+C";
  }
}

function asText(kind) {
  const { path, body } = buildRequest(values());
  const base = new URL("./", location.href).href;
  const withKey = at("key").value !== "";
  return kind === "curl" ? asCurl(base + path, body, withKey) : asPython(base, path, body, withKey);
}

// --- start ------------------------------------------------------------------------------------------------------------

at("key").value = sessionStorage.getItem(KEY) ?? "";
at("key").addEventListener("change", () => {
  sessionStorage.setItem(KEY, at("key").value);
  loadModels();
});
at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
at("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("form").requestSubmit();
  if (event.key === "Escape") {
    running?.abort();
    tokens.hide();
  }
});
at("model").addEventListener("change", showModel);
at("mode").addEventListener("change", showMode);
for (const id of ["k", "k-slider"]) at(id).addEventListener("input", () => setK(number(id) ?? 0));
for (const input of document.querySelectorAll("input[name=measure]")) {
  input.addEventListener("change", () => {
    drawLegend(at("legend"), checked("measure"));
    tokens.colourBy(checked("measure"));
  });
}
addEventListener("resize", drawCurve);
at("refresh").addEventListener("click", showCurve);
at("copy-curl").addEventListener("click", () => copy(asText("curl")));
at("copy-python").addEventListener("click", () => copy(asText("python")));
tokens.measure = checked("measure");
drawLegend(at("legend"), tokens.measure);
loadModels();
