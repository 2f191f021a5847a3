// The answer's tokens: colour and underline by score, a card with the numbers of the one that is looked at.

import { dots, element, share } from "./charts.js";

const STEPS = 5;
// Nats at which a colour is full: fixed, so that two answers can be compared by eye.
const FULL = { epistemic: 0.5, aleatoric: 2, total: 2 };

const level = (score, measure) => Math.min(Math.ceil((score / FULL[measure]) * STEPS - 0.5), STEPS);
const nats = (value) => (value === null || value === undefined ? "−∞" : value.toFixed(3).replace("-", "−"));
const visible = (text) => text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥");

export function drawLegend(place, measure) {
  const swatches = Array.from({ length: STEPS + 1 }, (_, step) => {
    const swatch = element("span", { class: `token level-${step}` }, step === STEPS ? `≥ ${FULL[measure].toFixed(1)}` : ((FULL[measure] * step) / STEPS).toFixed(1));
    return swatch;
  });
  place.replaceChildren(element("span", {}, measure), ...swatches, element("span", {}, "nats"));
}

export class Tokens {
  // entries: [{text, scores?, logprob?, alternatives?: [[text, logprob]]}]; scores as in the API's uncertainty.tokens.
  constructor(list, card) {
    Object.assign(this, { list, card, entries: [], measure: "epistemic", current: 0, hiding: 0 });
    const token = (event) => event.target.closest("[role=option]");
    list.addEventListener("pointerover", (event) => token(event) && this.show(Number(token(event).dataset.index)));
    list.addEventListener("focusin", (event) => token(event) && this.select(Number(token(event).dataset.index)));
    list.addEventListener("focusout", () => this.hide());
    list.parentElement.parentElement.addEventListener("pointerleave", () => this.hide());
    list.addEventListener("keydown", (event) => this.move(event));
  }

  clear() {
    this.entries = [];
    this.current = 0;
    this.list.replaceChildren();
    this.hide();
  }

  colourBy(measure) {
    this.measure = measure;
    this.draw();
  }

  // Nodes are kept, so that a token under the pointer or in focus stays while the answer grows.
  draw() {
    this.entries.forEach((entry, index) => {
      const node = this.list.children[index] ?? this.list.appendChild(element("span", { role: "option", "data-index": index }));
      const score = entry.scores?.[this.measure];
      node.textContent = entry.text;
      node.className = score === undefined ? "token plain" : `token level-${Math.max(level(score, this.measure), 0)}`;
      node.tabIndex = index === this.current ? 0 : -1;
      node.setAttribute("aria-selected", String(index === this.current));
      const value = score === undefined ? "not scored" : `${this.measure} ${nats(score)} nats`;
      node.setAttribute("aria-label", `${visible(entry.text)}, ${value}`);
    });
    while (this.list.children.length > this.entries.length) this.list.lastChild.remove();
  }

  select(index) {
    this.current = index;
    this.draw();
    this.show(index);
  }

  move(event) {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    this.list.children[Math.min(Math.max(this.current + step, 0), this.entries.length - 1)]?.focus();
  }

  hide() {
    this.card.hidden = true;
    this.list.querySelector(".shown")?.classList.remove("shown");
  }

  show(index) {
    const { text, scores, logprob, alternatives } = this.entries[index];
    this.hide();
    if (!scores && logprob === undefined) return;
    this.list.children[index].classList.add("shown");
    const rows = scores
      ? [["epistemic", scores.epistemic], ["aleatoric", scores.aleatoric], ["total", scores.total], ["log-probability", scores.logprob]]
      : [["log-probability", logprob]];
    const numbers = element("dl");
    for (const [name, value] of rows) numbers.append(element("dt", {}, name), element("dd", {}, nats(value)));
    if (scores) numbers.append(element("dt", {}, "variation ratio"), element("dd", {}, scores.variation_ratio.toFixed(2)));
    this.card.replaceChildren(element("p", { class: "of" }, element("code", {}, visible(text)), " in nats"), numbers);
    if (scores?.member_logprobs) this.card.append(dots(scores.member_logprobs, scores.logprob));
    if (alternatives?.length) {
      const list = element("ol");
      for (const [other, value] of alternatives) {
        list.append(element("li", {}, element("code", {}, visible(other)), share(Math.exp(value)), element("span", {}, `${(100 * Math.exp(value)).toFixed(1)} %`)));
      }
      this.card.append(element("p", { class: "of" }, "most likely here"), list);
    }
    if (scores?.member_tops) this.card.append(element("p", { class: "of" }, "most likely of each sample"), favourites(scores.member_tops));
    this.card.hidden = false;
    this.place(this.list.children[index]);
  }

  place(token) {
    const last = [...token.getClientRects()].at(-1);
    const box = this.card.parentElement.getBoundingClientRect();
    const left = Math.min(Math.max(last.left - box.left, 0), Math.max(box.width - this.card.offsetWidth, 0));
    this.card.style.setProperty("left", `${left}px`);
    this.card.style.setProperty("top", `${last.bottom - box.top}px`);
  }
}

// What the samples would most likely have said, and how many of them; the five most frequent.
function favourites(tops) {
  const counts = new Map();
  for (const { token } of tops) counts.set(token, (counts.get(token) ?? 0) + 1);
  const list = element("ol", { class: "favourites" });
  for (const [token, count] of [...counts].sort((one, other) => other[1] - one[1]).slice(0, 5)) {
    list.append(element("li", {}, element("code", {}, visible(token)), share(count / tops.length), element("span", {}, `${count} of ${tops.length}`)));
  }
  return list;
}
