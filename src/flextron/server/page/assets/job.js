// One finetuning job: how it stands, its losses, what can be done with it, and its adapters.
import { json, ServerError } from "./api.js";
import { el, say, seconds, short, write } from "./dom.js";
import { lineChart } from "./lines.js";

const STATUS = {
  validating_files: "reads its files",
  queued: "waits",
  running: "trains",
  paused: "paused",
  succeeded: "finished",
  failed: "failed",
  cancelled: "cancelled",
};
const ALIVE = new Set(["validating_files", "queued", "running"]);
const ENDED = new Set(["succeeded", "failed", "cancelled"]);
const PATH = "v1/fine_tuning/jobs";
const MOST_PAGES = 50;

export class JobCard {
  constructor(onChat, onChange, onAdapters) {
    Object.assign(this, { onChat, onChange, onAdapters });
    this.seen = new Set();
    this.steps = new Map();
    this.total = null;
    this.names = new Map();
    this.title = el("h3", {});
    this.state = el("p", { class: "job-state" });
    this.bar = el("progress", { max: 1, value: 0 });
    this.problem = el("p", { class: "error", role: "alert" });
    this.chart = lineChart("Loss", "nats");
    this.adapters = el("ul", { class: "adapters" });
    this.buttons = {};
    for (const [name, label] of Object.entries({ pause: "Pause", resume: "Resume", cancel: "Cancel" })) {
      this.buttons[name] = el("button", { type: "button", hidden: true, onclick: () => this.change(name) }, label);
    }
    this.element = el(
      "article",
      { class: "card job" },
      this.title,
      this.state,
      this.bar,
      el("div", { class: "row" }, ...Object.values(this.buttons)),
      this.problem,
      this.chart.element,
      this.adapters,
    );
  }

  async update(job) {
    const before = this.job?.status;
    this.job = job;
    this.element.dataset.status = job.status;
    const name = job.user_provided_suffix ?? job.id;
    write(this.title, name);
    this.bar.setAttribute("aria-label", `progress of ${name}`);
    this.buttons.pause.hidden = !ALIVE.has(job.status);
    this.buttons.resume.hidden = job.status !== "paused";
    this.buttons.cancel.hidden = ENDED.has(job.status);
    for (const [verb, button] of Object.entries(this.buttons)) button.setAttribute("aria-label", `${verb} ${name}`);
    if (job.error) write(this.problem, `The job failed: ${job.error.message}`);
    if (!ENDED.has(before)) await this.readEvents();
    this.showState();
    if (!ENDED.has(before)) await this.readAdapters();
    if (before && before !== job.status) say(`${name}: ${STATUS[job.status]}`);
  }

  showState() {
    const step = Math.max(0, ...this.steps.keys());
    const parts = [STATUS[this.job.status]];
    if (this.total) parts.push(`step ${step} of ${this.total}`);
    if (this.job.trained_tokens) parts.push(`${short(this.job.trained_tokens)} tokens`);
    if (this.job.estimated_finish) {
      const left = this.job.estimated_finish - Date.now() / 1000;
      if (left > 0) parts.push(`about ${seconds(left)} left`);
    }
    write(this.state, parts.join(", "));
    this.bar.value = this.job.status === "succeeded" ? 1 : this.total ? step / this.total : 0;
    const ordered = [...this.steps].sort((a, b) => a[0] - b[0]);
    const series = [{ name: "training", points: ordered.map(([at, data]) => [at, data.train_loss]) }];
    const scored = ordered.filter(([, data]) => typeof data.valid_loss === "number");
    if (scored.length) series.push({ name: "validation", points: scored.map(([at, data]) => [at, data.valid_loss]) });
    this.chart.update(series, { x: [1, Math.max(2, this.total ?? step)], tick: (at) => `step ${Math.round(at)}` });
  }

  /** Events come newest first: read until one that is known. */
  async readEvents() {
    let after = "";
    for (let page = 0; page < MOST_PAGES; page++) {
      const { data, has_more: hasMore } = await json(`${PATH}/${this.job.id}/events?limit=100${after}`);
      const fresh = data.filter((event) => !this.seen.has(event.id));
      for (const event of fresh) {
        this.seen.add(event.id);
        if (event.type === "metrics") {
          this.steps.set(event.data.step, event.data);
          this.total = event.data.total_steps ?? this.total;
        }
      }
      if (!hasMore || fresh.length < data.length) return;
      after = `&after=${data.at(-1).id}`;
    }
  }

  async readAdapters() {
    const { data } = await json(`${PATH}/${this.job.id}/checkpoints?limit=100`);
    let isNew = false;
    for (const { fine_tuned_model_checkpoint: name, step_number: step } of data.toReversed()) {
      if (this.names.has(name)) continue;
      isNew = true;
      const item = el("li", {}, el("code", {}, name), ` step ${step} `);
      const chat = el("button", { type: "button", onclick: () => this.onChat(name) }, "Chat");
      chat.setAttribute("aria-label", `Chat with ${name}`);
      const remove = el("button", { type: "button", class: "quiet", onclick: () => this.remove(name) }, "Delete");
      remove.setAttribute("aria-label", `Delete ${name}`);
      item.append(chat, " ", remove);
      this.names.set(name, item);
      this.adapters.append(item);
    }
    if (isNew) this.onAdapters();
  }

  async change(verb) {
    write(this.problem, "");
    try {
      await json(`${PATH}/${this.job.id}/${verb}`, {});
    } catch (error) {
      write(this.problem, error.message);
    }
    await this.onChange();
  }

  async remove(name) {
    if (!window.confirm(`Delete the adapter ${name} and its files for good?`)) return;
    try {
      await json(`v1/models/${encodeURIComponent(name)}`, undefined, "DELETE");
    } catch (error) {
      if (!(error instanceof ServerError) || error.status !== 404) {
        write(this.problem, error.message);
        return;
      }
    }
    this.names.get(name).remove();
    say(`${name} was deleted`);
    this.onAdapters();
  }
}
