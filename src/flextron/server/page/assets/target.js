// The target of a column: a slider along the frontier, or a number in any of its units.
import { frontierChart, describe } from "./chart.js";
import { el, field, say, short } from "./dom.js";

const UNITS = {
  latency: { name: "part of full latency", step: "0.01", places: 2 },
  latency_ms: { name: "ms a token", step: "any", places: 3 },
  params: { name: "parameters", step: "1", places: 0 },
  memory_gb: { name: "memory, GB", step: "any", places: 4 },
  max_loss_increase: { name: "loss increase, part of full loss", step: "any", places: 4 },
};
const CONTEXT = 2048;

/** How much of a unit a point takes. */
function measure(point, unit, full) {
  if (unit === "memory_gb") return (point.mem_bytes + CONTEXT * point.kv_bytes_per_token) / 1e9;
  return unit === "max_loss_increase" ? point.loss / full.loss - 1 : point[unit];
}

/** The point that the server chooses for a target: as `Frontier.select`. */
export function chosen(points, unit, limit) {
  const full = points[0];
  const within = points.filter((point) => measure(point, unit, full) <= limit + Math.abs(limit) * 1e-9);
  const order = unit === "max_loss_increase" ? ["latency_ms", "loss"] : ["loss", "latency_ms"];
  within.sort((a, b) => a[order[0]] - b[order[0]] || a[order[1]] - b[order[1]]);
  return within[0] ?? null;
}

/** The smallest number of a unit's places with which a point is still reached. */
function reaching(point, unit, full) {
  const factor = 10 ** UNITS[unit].places;
  return Math.ceil(measure(point, unit, full) * factor - 1e-6) / factor;
}

/** Chart, slider and number. `target()` is the key `flextron` of a request, or null for the full model. */
export class TargetPicker {
  constructor(facts, name) {
    this.points = facts.frontier?.points ?? [];
    this.unit = facts.has_latency ? "latency" : "params";
    this.value = null;
    this.readout = el("p", { class: "readout", "data-testid": "readout" });
    this.element = el("div", { class: "target" });
    if (!this.points.length) {
      this.element.append(el("p", { class: "hint" }, "This model has no measured sub-networks, so it answers as a whole."));
      return;
    }
    this.rungs = this.points.filter((point) => point.best).sort((a, b) => a.latency - b.latency);
    this.slider = el("input", {
      type: "range",
      min: 0,
      max: this.rungs.length - 1,
      step: 1,
      "aria-label": `Target of ${name}, along the frontier`,
    });
    this.slider.addEventListener("input", () => this.pick(this.rungs[Number(this.slider.value)]));
    this.number = el("input", { type: "number", min: 0, step: UNITS[this.unit].step, placeholder: "full model" });
    this.number.addEventListener("input", () => this.typed());
    const needsLatency = new Set(["latency", "latency_ms"]);
    const units = Object.entries(UNITS).filter(([unit]) => facts.has_latency || !needsLatency.has(unit));
    this.select = el("select", {}, ...units.map(([unit, { name }]) => el("option", { value: unit }, name)));
    this.select.addEventListener("change", () => this.changeUnit(this.select.value));
    this.router = el("input", { type: "checkbox" });
    this.router.addEventListener("change", () => this.typed());
    this.chart = frontierChart(this.points, {
      onPick: (point) => this.pick(point),
      onHover: (point) => this.tell(point ?? this.point()),
      label: `Frontier of ${facts.name}: perplexity over latency, ${this.rungs.length} best sub-networks`,
    });
    const whole = el("button", { type: "button", class: "quiet", onclick: () => this.clear() }, "Full model");
    const row = el("div", { class: "row" }, field("Target", this.number), field("Unit", this.select), whole);
    this.element.append(this.chart.element, this.slider, this.readout, row);
    if (facts.token_targets.length) {
      row.append(el("label", { class: "check" }, this.router, " each token chooses (token router)"));
    }
    this.clear();
  }

  /** The key `flextron` of a request. */
  target() {
    if (this.value === null) return null;
    const isRouted = this.router?.checked && this.unit === "latency";
    return { [this.unit]: this.value, ...(isRouted ? { router: "token" } : {}) };
  }

  /** The point that the target means; null if none is within it. */
  point() {
    return this.value === null ? this.points[0] : chosen(this.points, this.unit, this.value);
  }

  pick(point) {
    this.value = reaching(point, this.unit, this.points[0]);
    this.number.value = this.value;
    this.show();
  }

  clear() {
    this.value = null;
    this.number.value = "";
    this.show();
  }

  typed() {
    const value = Number(this.number.value);
    this.value = this.number.value === "" || !Number.isFinite(value) ? null : value;
    this.show();
  }

  changeUnit(unit) {
    const point = this.point();
    this.unit = unit;
    this.number.step = UNITS[unit].step;
    if (this.value !== null && point) this.pick(point);
    say(`target in ${UNITS[unit].name}`);
  }

  show() {
    const point = this.point();
    this.tell(point);
    this.chart.select(point);
    this.number.setAttribute("aria-invalid", String(point === null));
    if (!point) return;
    const below = this.rungs.filter((rung) => rung.latency <= point.latency + 1e-9);
    this.slider.value = Math.max(0, below.length - 1);
    this.slider.setAttribute("aria-valuetext", describe(point));
  }

  tell(point) {
    if (point) this.readout.textContent = (point === this.points[0] ? "full model: " : "") + describe(point);
    else {
      const measures = this.points.map((each) => measure(each, this.unit, this.points[0]));
      const [low, high] = [Math.min(...measures), Math.max(...measures)];
      this.readout.textContent = `No sub-network is within that; this model spans ${short(low)} to ${short(high)}.`;
    }
  }
}
