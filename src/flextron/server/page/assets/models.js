// What is served: base, sub-networks and adapters, the device and its latencies, and how the server was started.
import { json } from "./api.js";
import { copyButton, el, say, short, write } from "./dom.js";
import { inWords } from "./strip.js";

function table(caption, head, rows) {
  const cells = (tag, values, attributes = {}) => values.map((value) => el(tag, attributes, value));
  return el(
    "div",
    { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
    el("table", {}, el("caption", {}, caption), el("thead", {}, el("tr", {}, ...cells("th", head, { scope: "col" }))), el("tbody", {}, ...rows.map((row) => el("tr", {}, ...cells("td", row))))),
  );
}

function pairs(entries) {
  return el("dl", { class: "facts" }, ...entries.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
}

function shown(value) {
  if (value === null) return "not set";
  if (value === true) return "yes";
  if (value === false) return "no";
  if (Array.isArray(value)) return value.length ? value.join(", ") : "none";
  return typeof value === "object" ? "on" : String(value);
}

function latencies(found, here) {
  const rows = (widths) => Object.entries(widths).sort((a, b) => b[0] - a[0]).map(([width, ms]) => [width, short(ms)]);
  const title = `${found.phase === "prefill" ? "reading a prompt" : "a decode step"} on ${found.device}${found.device === here ? " (this device)" : ""}`;
  return el(
    "details",
    { open: found.device === here },
    el("summary", {}, `Latencies of ${title}`),
    pairs([
      ["full model", `${short(found.full_ms)} ms`],
      ["everything but the layers", `${short(found.base_ms)} ms`],
      ["sequences, context", `${found.batch_size}, ${found.context} tokens`],
      ["error of the fit", `${short(100 * found.median_error)} % (median), ${short(100 * found.max_error)} % (most)`],
    ]),
    el("div", { class: "tables" }, table("MLP of a layer", ["width", "ms"], rows(found.mlp_ms)), table("Attention of a layer", ["KV groups", "ms"], rows(found.attention_ms))),
  );
}

export class Models {
  /** `onMeasured(facts)` hears of what was measured from here. */
  constructor(facts, onMeasured) {
    this.facts = facts;
    this.onMeasured = onMeasured;
    this.served = el("div", {}, el("p", { class: "hint" }, "…"));
    this.problem = el("p", { class: "error", role: "alert" });
    this.element = el("div", { class: "stack" }, this.problem, ...this.missing(), this.about(), this.frontier(), this.measured(), this.settings());
  }

  missing() {
    if (!this.facts.missing.length) return [];
    const remedies = { "Measure once and keep it": "flextron profile DIRECTORY", "Or measure at each start": "flextron serve DIRECTORY --profile" };
    const lines = Object.entries(remedies).map(([when, command]) => el("p", {}, `${when}: `, el("code", {}, command), " ", copyButton("Copy", () => command)));
    const duration = this.facts.frontier ? "half a minute" : "some minutes, for sub-networks are searched, too";
    const button = el("button", { type: "button" }, "Measure now");
    const state = el("span", { class: "hint" }, `It takes about ${duration}. All answers wait meanwhile, and what is measured is gone when the server ends.`);
    button.addEventListener("click", () => this.measure(button, state));
    return [
      el("section", { class: "card warning", "aria-label": "What is missing" }, el("h2", {}, "What is missing"), ...this.facts.missing.map((text) => el("p", {}, text)), el("p", {}, button, " ", state), ...lines),
    ];
  }

  async measure(button, state) {
    button.disabled = true;
    write(state, "Measuring…");
    say("measuring");
    try {
      const facts = await json("page/measure", {});
      say("measured");
      this.onMeasured(facts);
    } catch (error) {
      write(this.problem, error.message);
      write(state, "");
      button.disabled = false;
    }
  }

  about() {
    const { facts } = this;
    const entries = [
      ["name", facts.name],
      ["made from", facts.source || "not known"],
      ["family", facts.family],
      ["parameters", `${short(facts.smallest)} to ${short(facts.full.params)}`],
      ["sub-networks", `10^${Math.round(facts.log10_size)}`],
      ["context", `${facts.positions} tokens`],
      ["chat template", facts.has_chat ? "yes" : "no: it continues texts"],
      ["device", facts.device],
      ["flextron", facts.version],
    ];
    return el("section", { class: "card", "aria-label": "Model" }, el("h2", {}, "Model"), pairs(entries), this.served);
  }

  frontier() {
    const { frontier, full } = this.facts;
    if (!frontier) return null;
    const rows = frontier.points
      .filter((point) => point.best)
      .map((point) => [short(point.latency), short(point.latency_ms), short(point.params), short(point.mem_bytes / 1e6), short(Math.exp(point.loss)), inWords(point.spec, full.spec)]);
    const head = ["latency", "ms a token", "parameters", "MB", "perplexity", "widths"];
    return el("section", { class: "card", "aria-label": "Sub-networks" }, el("h2", {}, "Sub-networks"), table(`Best of ${frontier.points.length} that were measured on ${frontier.device}, text: ${frontier.text}`, head, rows));
  }

  measured() {
    if (!this.facts.tables.length) return null;
    return el("section", { class: "card", "aria-label": "Latencies" }, el("h2", {}, "Latencies"), ...this.facts.tables.map((found) => latencies(found, this.facts.device)));
  }

  settings() {
    const entries = Object.entries(this.facts.settings).map(([name, value]) => [name, shown(value)]);
    entries.unshift(["API key", this.facts.has_key ? "asked for" : "none"]);
    return el("section", { class: "card", "aria-label": "Server" }, el("h2", {}, "Started with"), pairs(entries));
  }

  async refresh() {
    try {
      const { data } = await json("v1/models");
      write(this.problem, "");
      const rows = data.map(({ id, parent, flextron }) => [id, flextron.adapter ? "adapter" : parent ? "sub-network" : "base", short(flextron.params)]);
      this.served.replaceChildren(table("Names that requests may use", ["name", "kind", "parameters"], rows));
    } catch (error) {
      write(this.problem, error.message);
    }
  }
}
