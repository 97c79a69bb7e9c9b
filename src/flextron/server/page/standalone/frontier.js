// The stand-alone file: chart, values of the point under the pointer or the slider, and a table of the best.
const facts = JSON.parse(document.getElementById("data").textContent);
const best = facts.points.filter((point) => point.best).sort((a, b) => a.latency - b.latency);
const readout = el("p", { class: "readout", "data-testid": "readout" });
const strip = specStrip(facts.full);
const slider = el("input", { type: "range", min: 0, max: best.length - 1, "aria-label": "Best sub-networks by latency" });
let picked = facts.points[0];

function tell(point) {
  readout.textContent = `${describe(point)} (${point.kind})`;
  strip.show(point.spec);
}

function pick(point) {
  picked = point;
  chart.select(point);
  slider.value = best.indexOf(point);
  slider.setAttribute("aria-valuetext", describe(point));
  tell(point);
}

const chart = frontierChart(facts.points, {
  onPick: pick,
  onHover: (point) => tell(point ?? picked),
  label: `Frontier of ${facts.name}: perplexity over latency`,
});
slider.addEventListener("input", () => pick(best[Number(slider.value)]));

const head = ["latency", "ms a token", "parameters", "MB", "perplexity", "widths"];
const rows = best.map((point) => {
  const values = [point.latency, point.latency_ms, point.params, point.mem_bytes / 1e6, Math.exp(point.loss)];
  return [...values.map(short), inWords(point.spec, facts.full)];
});
const table = el(
  "table",
  {},
  el("caption", {}, `The best of ${facts.points.length} sub-networks, measured on ${facts.device}; text: ${facts.text}`),
  el("thead", {}, el("tr", {}, ...head.map((name) => el("th", { scope: "col" }, name)))),
  el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((value) => el("td", {}, value))))),
);
document.title = `Frontier of ${facts.name} – flextron`;
document.getElementById("main").replaceChildren(
  el("h1", {}, `Frontier of ${facts.name}`),
  el("div", { class: "card target" }, chart.element, slider, readout, strip.element),
  el("div", { class: "card scroll", tabindex: 0, role: "region", "aria-label": "Table" }, table),
);
pick(best.at(-1));
