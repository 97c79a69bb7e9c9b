// Finetuning: a file is dropped, checked and sent, and its job is watched and steered.
import { json, request } from "./api.js";
import { el, field, say, write } from "./dom.js";
import { JobCard } from "./job.js";
import { checkExamples } from "./jsonl.js";

const SETTINGS = {
  n_epochs: { label: "Epochs", value: 3, min: 1, step: 1 },
  batch_size: { label: "Batch size", value: 8, min: 1, step: 1 },
  learning_rate_multiplier: { label: "Learning rate, factor", value: 1, min: 0, step: "any" },
  rank: { label: "Rank", value: 16, min: 1, step: 1 },
  checkpoint_every: { label: "Checkpoint every … steps", value: "", min: 1, step: 1, placeholder: "at the end only" },
};
const POLL_MS = 1000;

/** A place for a file, by drop or by choice; `file` is set once it has been checked and is good. */
class FileDrop {
  constructor(label, facts, onChange) {
    this.facts = facts;
    this.file = null;
    this.onChange = onChange;
    this.input = el("input", { type: "file", accept: ".jsonl,application/jsonl,application/x-ndjson" });
    this.input.addEventListener("change", () => this.take(this.input.files[0]));
    this.state = el("div", { class: "drop-state", "aria-live": "polite" }, "Drop a JSONL file here, or choose one.");
    this.element = el("div", { class: "drop" }, field(label, this.input), this.state);
    for (const name of ["dragenter", "dragover"]) {
      this.element.addEventListener(name, (event) => {
        event.preventDefault();
        this.element.classList.add("over");
      });
    }
    this.element.addEventListener("dragleave", () => this.element.classList.remove("over"));
    this.element.addEventListener("drop", (event) => {
      event.preventDefault();
      this.element.classList.remove("over");
      if (event.dataTransfer.files.length) this.take(event.dataTransfer.files[0]);
    });
  }

  async take(file) {
    this.file = null;
    this.onChange();
    if (!file) return;
    const most = this.facts.finetuning.max_file_mb;
    if (file.size > most * 1e6) {
      this.refuse(file.name, [{ message: `is larger than the ${most} MB that this server takes` }]);
      return;
    }
    const { count, kind, errors } = checkExamples(await file.text(), { hasChat: this.facts.has_chat });
    if (errors.length) {
      this.refuse(file.name, errors);
      return;
    }
    this.file = file;
    const what = kind === "messages" ? "conversations" : "prompts with completions";
    this.state.replaceChildren(el("span", { class: "good" }, `${file.name}: ${count} examples (${what}), ${Math.ceil(file.size / 1000)} kB`));
    this.onChange();
  }

  refuse(name, errors) {
    const lines = errors.map(({ line, message }) => el("li", {}, line ? `line ${line} ${message}` : `the file ${message}`));
    this.state.replaceChildren(el("span", { class: "error" }, `${name} was not sent. Mend it and drop it again:`), el("ul", { class: "error" }, ...lines));
  }

  clear() {
    this.file = null;
    this.input.value = "";
    write(this.state, "Drop a JSONL file here, or choose one.");
    this.onChange();
  }
}

async function upload(file) {
  const form = new FormData();
  form.append("purpose", "fine-tune");
  form.append("file", file);
  return (await (await request("v1/files", { method: "POST", body: form })).json()).id;
}

export class Finetuning {
  /** `onChat(adapter)` opens the chat with the base and an adapter side by side. */
  constructor(facts, onChat, onAdapters) {
    this.facts = facts;
    this.onChat = onChat;
    this.onAdapters = onAdapters;
    this.cards = new Map();
    this.element = el("div", {});
    if (!facts.finetuning) {
      this.element.append(
        el("p", { class: "card" }, "This server does not finetune. Start it with ", el("code", {}, "--state-directory DIRECTORY"), ", where jobs, files and adapters are kept."),
      );
      return;
    }
    this.training = new FileDrop("Training file", facts, () => this.showState());
    this.validation = new FileDrop("Validation file (optional)", facts, () => this.showState());
    this.suffix = el("input", { type: "text", pattern: "[A-Za-z0-9_\\-]{1,64}", maxlength: 64, placeholder: "none" });
    this.inputs = {};
    const fields = [field("Name of the adapter", this.suffix, "letters, digits, _ and -")];
    for (const [name, { label, ...attributes }] of Object.entries(SETTINGS)) {
      this.inputs[name] = el("input", { type: "number", ...attributes });
      fields.push(field(label, this.inputs[name]));
    }
    this.target = el("input", { type: "number", min: 0, max: 1, step: "any", placeholder: "full model" });
    if (facts.has_latency) fields.push(field("Train at this part of the latency", this.target));
    this.start = el("button", { type: "button", class: "main", disabled: true, onclick: () => this.begin() }, "Start training");
    this.problem = el("p", { class: "error", role: "alert" });
    this.list = el("div", { class: "jobs" });
    this.none = el("p", { class: "hint" }, "No jobs yet.");
    this.element.append(
      el("section", { class: "card", "aria-label": "New job" }, el("h2", {}, "New job"), el("div", { class: "drops" }, this.training.element, this.validation.element), el("div", { class: "fields" }, ...fields), el("div", { class: "row" }, this.start), this.problem),
      el("section", { "aria-label": "Jobs" }, el("h2", {}, "Jobs"), this.none, this.list),
    );
  }

  showState() {
    if (this.start) this.start.disabled = !this.training.file || this.isSending === true;
  }

  async begin() {
    write(this.problem, "");
    this.isSending = true;
    this.showState();
    try {
      const hyperparameters = {};
      for (const [name, input] of Object.entries(this.inputs)) {
        if (input.value !== "") hyperparameters[name] = Number(input.value);
      }
      const body = { model: this.facts.finetuning.model, training_file: await upload(this.training.file), hyperparameters };
      if (this.validation.file) body.validation_file = await upload(this.validation.file);
      if (this.suffix.value) body.suffix = this.suffix.value;
      if (this.target.value !== "") body.flextron = { latency: Number(this.target.value) };
      await json("v1/fine_tuning/jobs", body);
      say("the job has begun");
      this.training.clear();
      this.validation.clear();
      this.suffix.value = "";
    } catch (error) {
      write(this.problem, error.message);
    }
    this.isSending = false;
    this.showState();
    await this.refresh();
  }

  /** Look at the jobs now and then while the tab is shown. */
  async watch() {
    if (!this.facts.finetuning || this.isWatching) return;
    this.isWatching = true;
    while (this.isWatching) {
      await this.refresh();
      await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    }
  }

  unwatch() {
    this.isWatching = false;
  }

  async refresh() {
    try {
      const { data } = await json("v1/fine_tuning/jobs?limit=50");
      this.none.hidden = data.length > 0;
      for (const job of data.toReversed()) {
        if (!this.cards.has(job.id)) {
          const card = new JobCard(this.onChat, () => this.refresh(), this.onAdapters);
          this.cards.set(job.id, card);
          this.list.prepend(card.element);
        }
      }
      await Promise.all(data.map((job) => this.cards.get(job.id).update(job)));
      if (this.isLost) write(this.problem, "");
      this.isLost = false;
    } catch (error) {
      this.isLost = true;
      write(this.problem, error.message);
      if (error.status === 401) this.unwatch();
    }
  }
}
