// Lines over time or steps, small and alike.
import { el, svg, short, write } from "./dom.js";
import { ticks } from "./chart.js";

const INSET = { left: 42, right: 8, top: 6, bottom: 20 };

/**
 * A chart of some series.
 *
 * `title` stands above it, `unit` after its numbers. `update(series, options)` draws: a series is `{ name, points }`
 * with points `[x, y | null]`; options are `x` (`[low, high]`), `limit` (a dashed line, such as an objective), `stacked`,
 * and `tick(x)`, which words a place on the x axis.
 */
export function lineChart(title, unit = "") {
  const root = svg("svg", { class: "chart", role: "img" });
  const legend = el("div", { class: "legend" });
  const box = el("div", { class: "chart-box small" }, root);
  const element = el("figure", { class: "figure" }, el("figcaption", {}, title), box, legend);
  let last = null;

  function draw() {
    if (last === null) return;
    const { series, x: range, limit = null, isStacked = false, tick = short } = last;
    const width = Math.max(160, box.clientWidth), height = Math.max(80, box.clientHeight);
    const inner = [width - INSET.left - INSET.right, height - INSET.top - INSET.bottom];
    const layers = isStacked ? stacked(series) : series.map(({ points }) => points.map(([x, y]) => [x, y, null]));
    const values = layers.flat().map((point) => point[1]).filter((y) => y !== null);
    const high = 1.08 * (Math.max(...values, limit ?? 0) || 1);
    const low = last.isFromLeast && values.length ? Math.min(...values) * 0.95 : 0;
    const [xLow, xHigh] = range;
    const x = (value) => INSET.left + ((value - xLow) / (xHigh - xLow || 1)) * inner[0];
    const y = (value) => INSET.top + (1 - (value - low) / (high - low || 1)) * inner[1];
    root.setAttribute("viewBox", `0 0 ${width} ${height}`);
    root.replaceChildren();
    for (const value of ticks(low, high, Math.max(2, inner[1] / 30))) {
      if (value > high) continue;
      root.append(svg("line", { class: "grid", x1: INSET.left, x2: width - INSET.right, y1: y(value), y2: y(value) }));
      root.append(svg("text", { x: INSET.left - 5, y: y(value) + 4, "text-anchor": "end" }, short(value)));
    }
    for (const value of [xLow, (xLow + xHigh) / 2, xHigh]) {
      const anchor = value === xLow ? "start" : value === xHigh ? "end" : "middle";
      root.append(svg("text", { x: x(value), y: height - 4, "text-anchor": anchor }, tick(value)));
    }
    layers.forEach((points, i) => {
      for (const run of runs(points)) {
        const line = run.map((p) => `${x(p[0]).toFixed(1)},${y(p[1]).toFixed(1)}`);
        if (isStacked) {
          const back = run.map((p) => `${x(p[0]).toFixed(1)},${y(p[2]).toFixed(1)}`).reverse();
          root.append(svg("polygon", { class: `area c${i % 8}`, points: [...line, ...back].join(" ") }));
        } else if (run.length === 1) {
          root.append(svg("circle", { class: `point c${i % 8}`, cx: x(run[0][0]), cy: y(run[0][1]), r: 2 }));
        } else root.append(svg("polyline", { class: `line c${i % 8}`, points: line.join(" ") }));
      }
    });
    if (limit !== null) {
      root.append(svg("line", { class: "limit", x1: INSET.left, x2: width - INSET.right, y1: y(limit), y2: y(limit) }));
    }
  }

  function words() {
    const texts = last.series.map(({ name, points }) => {
      const known = points.filter((point) => point[1] !== null);
      return `${name} ${known.length ? short(known[known.length - 1][1]) : "–"}${unit && ` ${unit}`}`;
    });
    if (last.limit) texts.push(`objective ${short(last.limit)}${unit && ` ${unit}`}`);
    while (legend.children.length > texts.length) legend.lastChild.remove();
    texts.forEach((text, i) => {
      if (!legend.children[i]) legend.append(el("span"));
      legend.children[i].className = i < last.series.length ? `key c${i % 8}` : "key limit";
      write(legend.children[i], text);
    });
    root.setAttribute("aria-label", `${title}: ${texts.join(", ") || "nothing yet"}`);
  }

  new ResizeObserver(draw).observe(box);
  return {
    element,
    update(series, options) {
      last = { series, ...options };
      words();
      draw();
    },
  };
}

/** Points without gaps in between. */
function runs(points) {
  const found = [[]];
  for (const point of points) {
    if (point[1] === null) found.push([]);
    else found[found.length - 1].push(point);
  }
  return found.filter((run) => run.length);
}

/** Each series on top of those before it; all have the same places. */
function stacked(series) {
  const sums = new Map();
  return series.map(({ points }) =>
    points.map(([x, y]) => {
      const below = sums.get(x) ?? 0;
      sums.set(x, below + (y ?? 0));
      return [x, below + (y ?? 0), below];
    }),
  );
}
