// A sub-network as bars: one pair a layer, MLP width and KV groups, as parts of the full model's.
import { el, svg } from "./dom.js";

/** What a spec is, in words. */
export function inWords(spec, full) {
  const layers = spec.intermediate_size.map((width, i) => [width, spec.num_groups[i]]);
  const kept = layers.filter(([width, groups]) => width || groups);
  const span = (values) => {
    const [low, high] = [Math.min(...values), Math.max(...values)];
    return low === high ? `${low}` : `${low} to ${high}`;
  };
  if (!kept.length) return "all layers skipped";
  const most = [Math.max(...full.intermediate_size), Math.max(...full.num_groups)];
  return (
    `${kept.length} of ${layers.length} layers; MLP width ${span(kept.map((layer) => layer[0]))} of ${most[0]}, ` +
    `KV groups ${span(kept.map((layer) => layer[1]))} of ${most[1]}`
  );
}

/** The strip, with `show(spec | null)`. */
export function specStrip(full) {
  const count = full.intermediate_size.length;
  const root = svg("svg", { class: "strip", role: "img", viewBox: `0 0 ${count * 10} 32`, preserveAspectRatio: "none" });
  const words = el("p", { class: "hint strip-words" });
  const element = el("div", { class: "strip-box" }, root, words);

  function show(spec) {
    root.replaceChildren();
    full.intermediate_size.forEach((most, i) => {
      const width = spec?.intermediate_size[i] ?? 0;
      const groups = spec?.num_groups[i] ?? 0;
      const box = svg("g", {}, svg("rect", { class: "slot", x: i * 10 + 0.5, y: 0, width: 9, height: 32 }));
      const parts = [[width / (most || 1), "mlp", 1], [groups / (full.num_groups[i] || 1), "groups", 5.5]];
      for (const [part, name, at] of parts) {
        box.append(svg("rect", { class: name, x: i * 10 + at, y: 32 - 32 * part, width: 3.5, height: 32 * part }));
      }
      const state = width || groups ? `MLP ${width} of ${most}, groups ${groups} of ${full.num_groups[i]}` : "skipped";
      if (spec) box.append(svg("title", {}, `layer ${i + 1}: ${state}`));
      root.append(box);
    });
    const text = spec ? inWords(spec, full) : "No answer yet.";
    root.setAttribute("aria-label", `sub-network: ${text}`);
    words.textContent = text;
  }

  show(null);
  return { element, show };
}
