// The chat: one prompt for one column or two.
import { json } from "./api.js";
import { Column } from "./column.js";
import { el, field } from "./dom.js";

const SAMPLING = {
  max_tokens: { label: "Most tokens", step: 1, min: 1 },
  temperature: { label: "Temperature", value: "", step: 0.1, min: 0, hint: "0 is greedy" },
  top_p: { label: "Top p", value: "", step: 0.05, min: 0, max: 1 },
  top_k: { label: "Top k", value: "", step: 1, min: 0 },
  seed: { label: "Seed", value: "", step: 1, min: 0 },
};

export class Chat {
  constructor(facts) {
    this.facts = facts;
    this.inputs = {};
    this.columns = [];
    this.grid = el("div", { class: "columns" });
    this.prompt = el("textarea", { rows: 2, placeholder: "Once upon", "aria-label": "Prompt" });
    this.prompt.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.send();
      }
      if (event.key === "Escape") this.stop();
    });
    this.sendButton = el("button", { type: "button", class: "main", onclick: () => this.send() }, "Send");
    this.stopButton = el("button", { type: "button", disabled: true, onclick: () => this.stop() }, "Stop");
    this.two = el("input", { type: "checkbox", id: "two-columns" });
    this.two.addEventListener("change", () => this.setColumns(this.two.checked ? 2 : 1));
    const clear = el("button", { type: "button", class: "quiet", onclick: () => this.clear() }, "New conversation");
    const composer = el(
      "div",
      { class: "composer card" },
      this.prompt,
      el("div", { class: "row" }, this.sendButton, this.stopButton, clear, el("label", { class: "check" }, this.two, " Two columns")),
      this.makeSettings(),
    );
    const missing = facts.has_latency ? [] : facts.missing.map((text) => el("p", { class: "missing" }, text));
    this.element = el("div", {}, ...missing, composer, this.grid);
    this.setColumns(1);
  }

  makeSettings() {
    this.mode = el("select", {}, el("option", { value: "text" }, "continue a text"));
    if (this.facts.has_chat) {
      this.mode.prepend(el("option", { value: "chat", selected: true }, "chat"));
      this.mode.value = "chat";
    }
    this.system = el("input", { type: "text", placeholder: "none" });
    const fields = [field("Mode", this.mode), field("System message", this.system, "in chats only")];
    for (const [name, { label, hint, ...attributes }] of Object.entries(SAMPLING)) {
      const input = el("input", { type: "number", placeholder: "default", ...attributes });
      this.inputs[name] = input;
      fields.push(field(label, input, hint));
    }
    // room for the conversation in models of few positions, and an end for those that never end by themselves
    this.inputs.max_tokens.value = Math.min(256, this.facts.positions >> 1);
    return el("details", { class: "settings" }, el("summary", {}, "Sampling and mode"), el("div", { class: "fields" }, ...fields));
  }

  settings() {
    const sampling = {};
    for (const [name, input] of Object.entries(this.inputs)) {
      if (input.value !== "") sampling[name] = Number(input.value);
    }
    return { isChat: this.mode.value === "chat", system: this.system.value.trim(), sampling };
  }

  setColumns(count) {
    while (this.columns.length > count) {
      const column = this.columns.pop();
      column.stop();
      column.element.remove();
    }
    while (this.columns.length < count) {
      const name = `Column ${this.columns.length + 1}`;
      const column = new Column(name, this.facts, () => this.settings(), () => this.showState());
      if (this.names) column.setModels(this.names);
      this.columns.push(column);
      this.grid.append(column.element);
    }
    this.grid.classList.toggle("two", count === 2);
    this.two.checked = count === 2;
    this.showState();
  }

  /** Adapters come and go while the page is open. */
  async refreshModels() {
    try {
      const { data } = await json("v1/models");
      this.names = data.map((card) => card.id).filter((id) => !id.includes("@"));
      for (const column of this.columns) column.setModels(this.names);
    } catch {
      // whoever sends a prompt is told
    }
  }

  /** The base in the first column, an adapter in the second. */
  compare(adapter) {
    this.setColumns(2);
    const names = [...new Set([...(this.names ?? []), this.facts.name, adapter])];
    this.columns.forEach((column, i) => {
      column.setModels(names);
      column.model.value = i ? adapter : this.facts.name;
    });
    this.prompt.focus();
  }

  async send() {
    const text = this.prompt.value;
    if (!text || this.columns.some((column) => column.isBusy)) return;
    this.prompt.value = "";
    await Promise.all(this.columns.map((column) => column.send(text)));
  }

  stop() {
    for (const column of this.columns) column.stop();
  }

  clear() {
    for (const column of this.columns) column.clear();
    this.prompt.focus();
  }

  showState() {
    const isBusy = this.columns.some((column) => column.isBusy);
    this.stopButton.disabled = !isBusy;
    this.sendButton.disabled = isBusy;
    this.element.setAttribute("aria-busy", String(isBusy));
  }
}
