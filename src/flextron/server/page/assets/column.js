// One column of the chat: its model and target, what was said, and the figures of the last answer.
import { currentKey, stream } from "./api.js";
import { copyButton, el, field, say, seconds, short, write } from "./dom.js";
import { asCurl, asPython } from "./snippets.js";
import { specStrip } from "./strip.js";
import { TargetPicker } from "./target.js";

const BASE = new URL(".", document.baseURI).href.replace(/\/$/, "");

function words(target) {
  if (!target) return "full model";
  return Object.entries(target).map(([name, value]) => `${name} ${value}`).join(", ");
}

export class Column {
  /** `settings()` gives mode, system message and sampling when a request begins; `onState()` hears of begin and end. */
  constructor(name, facts, settings, onState) {
    this.name = name;
    this.settings = settings;
    this.onState = onState;
    this.turns = [];
    this.abort = null;
    this.body = null;
    this.model = el("select", {});
    this.setModels([facts.name]);
    this.picker = new TargetPicker(facts, name);
    this.strip = specStrip(facts.full.spec);
    this.log = el("div", { class: "log", role: "region", "aria-label": `${name}: conversation`, tabindex: 0 });
    const marks = ["0 to 20 %", "20 to 40 %", "40 to 60 %", "60 to 80 %", "80 to 100 %"];
    this.spread = el(
      "p",
      { class: "hint shares", hidden: true },
      "Each token's part of the MLPs: ",
      ...marks.flatMap((mark, i) => [el("span", { class: `share share-${i}` }, mark), " "]),
    );
    this.figures = {};
    const list = el("dl", { class: "figures" });
    const rows = { speed: "tokens/s", first: "first token", count: "tokens", params: "parameters", asked: "asked", given: "given" };
    for (const [key, label] of Object.entries(rows)) {
      this.figures[key] = el("dd", { "data-figure": key }, "–");
      list.append(el("div", {}, el("dt", {}, label), this.figures[key]));
    }
    this.retryButton = el("button", { type: "button", class: "quiet", disabled: true }, "Retry");
    this.retryButton.addEventListener("click", () => this.retry());
    this.copies = [
      copyButton("Copy as curl", () => asCurl(BASE, this.path, this.body, currentKey() !== null)),
      copyButton("Copy as Python", () => asPython(BASE, this.path, this.body, currentKey() !== null)),
    ];
    for (const button of this.copies) button.disabled = true;
    this.element = el(
      "section",
      { class: "column card", "aria-label": name },
      el("h2", {}, name),
      field("Model", this.model),
      this.picker.element,
      this.log,
      this.spread,
      list,
      this.strip.element,
      el("div", { class: "row" }, this.retryButton, ...this.copies),
    );
  }

  /** The names that can be chosen; a name that is chosen stays so. */
  setModels(names) {
    const kept = this.model.value;
    const all = kept && !names.includes(kept) ? [...names, kept] : names;
    if (all.length === this.model.options.length && all.every((each, i) => each === this.model.options[i].value)) return;
    this.model.replaceChildren(...all.map((each) => el("option", { value: each }, each)));
    if (kept) this.model.value = kept;
  }

  get isBusy() {
    return this.abort !== null;
  }

  clear() {
    this.stop();
    this.turns = [];
    this.log.replaceChildren();
    this.retryButton.disabled = true;
  }

  stop() {
    this.abort?.abort();
  }

  /** Say something and stream the answer. */
  async send(text) {
    this.turns.push({ role: "user", content: text });
    this.log.append(el("div", { class: "turn user" }, text));
    await this.answer();
  }

  /** Ask for the last answer again, with the target as it is now. */
  async retry() {
    this.stop();
    await this.done;
    if (this.turns.at(-1)?.role === "assistant") this.turns.pop();
    while (this.log.lastChild && !this.log.lastChild.classList.contains("user")) this.log.lastChild.remove();
    if (this.turns.length) await this.answer();
  }

  makeBody() {
    const { isChat, system, sampling } = this.settings();
    this.path = isChat ? "v1/chat/completions" : "v1/completions";
    const target = this.picker.target();
    const first = system ? [{ role: "system", content: system }] : [];
    const said = isChat
      ? { messages: [...first, ...this.turns.map(({ role, content }) => ({ role, content }))] }
      : { prompt: this.turns.map(({ content }) => content).join("") };
    return {
      model: this.model.value,
      ...said,
      ...sampling,
      ...(target ? { flextron: target } : {}),
      stream: true,
      stream_options: { include_usage: true },
      return_token_ids: true,
    };
  }

  answer() {
    this.done = this.streamAnswer();
    return this.done;
  }

  async streamAnswer() {
    this.body = this.makeBody();
    this.abort = new AbortController();
    for (const button of this.copies) button.disabled = false;
    const bubble = el("div", { class: "turn assistant" });
    this.log.append(bubble);
    this.log.scrollTop = this.log.scrollHeight;
    this.begin();
    this.onState();
    let reason = "stopped";
    try {
      for await (const chunk of stream(this.path, this.body, this.abort.signal)) {
        if (chunk.flextron) this.report(chunk.flextron);
        const choice = chunk.choices[0];
        if (!choice) continue;
        if (choice.finish_reason) reason = choice.finish_reason === "length" ? "length" : "complete";
        const text = choice.delta ? choice.delta.content : choice.text;
        if (choice.token_ids?.length) this.count(choice.token_ids.length);
        if (text) this.append(bubble, text, choice.flextron?.mlp_shares);
      }
      if (reason === "length") bubble.append(el("span", { class: "note" }, " (cut off at the token limit)"));
    } catch (error) {
      if (error.name === "AbortError") bubble.append(el("span", { class: "note" }, " (stopped)"));
      else {
        reason = "error";
        bubble.append(el("span", { class: "error", role: "alert" }, error.message));
      }
    }
    this.showFigures();
    const content = this.text;
    if (content && reason !== "error") this.turns.push({ role: "assistant", content });
    this.abort = null;
    this.retryButton.disabled = false;
    this.onState();
    if (reason !== "error") {
      say(`${this.name}: ${reason === "stopped" ? "stopped" : "answered"}, ${this.tokens} tokens, ${this.figures.speed.textContent} tokens a second`);
    }
  }

  begin() {
    this.text = "";
    this.spread.hidden = true;
    this.tokens = 0;
    this.begun = performance.now();
    this.firstAt = this.lastAt = null;
    for (const figure of Object.values(this.figures)) write(figure, "–");
  }

  /** `shares`: with a token router, the parts of the MLPs that the text's tokens ran through. */
  append(bubble, text, shares) {
    this.text += text;
    const isAtEnd = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 40;
    if (shares?.length) {
      const mean = shares.reduce((sum, share) => sum + share, 0) / shares.length;
      this.spread.hidden = false;
      bubble.append(el("span", { class: `share share-${Math.min(4, Math.floor(mean * 5))}`, title: `${Math.round(100 * mean)} % of the MLPs` }, text));
    } else bubble.append(text);
    if (isAtEnd) this.log.scrollTop = this.log.scrollHeight;
  }

  count(tokens) {
    this.lastAt = performance.now();
    if (this.firstAt === null) {
      this.firstAt = this.lastAt;
      this.firstTokens = tokens;
      write(this.figures.first, seconds((this.firstAt - this.begun) / 1000));
    }
    this.tokens += tokens;
    if (!this.isDue) {
      // a few times a second: more cannot be read
      this.isDue = true;
      setTimeout(() => {
        this.isDue = false;
        this.showFigures();
      }, 200);
    }
  }

  showFigures() {
    write(this.figures.count, String(this.tokens));
    const span = (this.lastAt - this.firstAt) / 1000;
    if (span > 0) write(this.figures.speed, short((this.tokens - this.firstTokens) / span));
  }

  report({ spec, params, asked, target, adapter }) {
    this.strip.show(spec);
    write(this.figures.params, short(params) + (adapter ? `, with ${adapter}` : ""));
    write(this.figures.asked, words(asked));
    const isNarrowed = JSON.stringify(asked) !== JSON.stringify(target);
    write(this.figures.given, words(target) + (isNarrowed ? " (narrowed under load)" : ""));
    this.figures.given.classList.toggle("narrowed", isNarrowed);
  }
}
