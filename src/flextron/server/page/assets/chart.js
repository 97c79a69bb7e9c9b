// The frontier: quality over latency, a point a sub-network. Points can be picked by pointer.
import { el, svg, short } from "./dom.js";

const MARGIN = { left: 44, right: 10, top: 8, bottom: 30 };

/** Round steps over a range, about `count` of them. */
export function ticks(low, high, count = 4) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((value) => value >= rough);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-6; value += step) {
    found.push(Number(value.toPrecision(6)));
  }
  return found;
}

/** The same where the axis is logarithmic: 1, 2 and 5 times powers of ten, if these are enough. */
function logTicks(low, high, count) {
  const found = [];
  for (let power = 10 ** Math.floor(Math.log10(low)); power <= high; power *= 10) {
    found.push(...[1, 2, 5].map((factor) => factor * power).filter((value) => value >= low && value <= high));
  }
  return found.length > 2 ? found : ticks(low, high, count);
}

/** What a point is, in words. */
export function describe(point) {
  const parts = [
    `${short(point.latency * 100)} % of the full latency`,
    `${short(point.latency_ms)} ms a token`,
    `${short(point.params)} parameters`,
    `${short(point.mem_bytes / 1e6)} MB`,
    `perplexity ${short(Math.exp(point.loss))}`,
  ];
  return parts.join(", ");
}

/**
 * A chart of points with `latency` and `loss`; those with `best` are joined by a line.
 * `onPick(point)` is called when one is pressed or dragged to, `onHover(point | null)` when one is pointed at.
 * Returns `{ element, select(point) }`.
 */
export function frontierChart(points, { onPick = () => {}, onHover = () => {}, label = "Perplexity over latency" } = {}) {
  const root = svg("svg", { class: "chart", role: "img", "aria-label": label });
  const element = el("div", { class: "chart-box" }, root);
  const best = points.filter((point) => point.best).sort((a, b) => a.latency - b.latency);
  const xs = points.map((point) => point.latency);
  const ys = points.map((point) => Math.exp(point.loss));
  let selected = null;
  let place = () => [0, 0];
  const dots = new Map();

  function draw() {
    const width = Math.max(200, element.clientWidth || 320);
    const height = Math.max(100, element.clientHeight || 150);
    const xLow = Math.min(...xs), xHigh = Math.max(...xs, xLow + 1e-6);
    // a frontier's worst points are far off and say little
    const shown = best.length > 2 ? best.map((point) => Math.exp(point.loss)) : ys;
    const yLow = Math.min(...shown) * 0.97, yHigh = Math.max(...shown) * 1.05;
    const logs = [Math.log(yLow), Math.log(yHigh)];
    const inner = [width - MARGIN.left - MARGIN.right, height - MARGIN.top - MARGIN.bottom];
    const x = (value) => MARGIN.left + ((value - xLow) / (xHigh - xLow || 1)) * inner[0];
    const y = (value) =>
      MARGIN.top + Math.max(0, (logs[1] - Math.log(value)) / (logs[1] - logs[0] || 1)) * inner[1];
    place = (point) => [x(point.latency), y(Math.exp(point.loss))];
    root.setAttribute("viewBox", `0 0 ${width} ${height}`);
    root.replaceChildren();
    dots.clear();
    for (const value of ticks(xLow, xHigh, Math.min(8, inner[0] / 70))) {
      root.append(svg("line", { class: "grid", x1: x(value), x2: x(value), y1: MARGIN.top, y2: MARGIN.top + inner[1] }));
      root.append(svg("text", { x: x(value), y: height - 16, "text-anchor": "middle" }, short(value)));
    }
    for (const value of logTicks(yLow, yHigh, Math.max(2, inner[1] / 36))) {
      root.append(svg("line", { class: "grid", x1: MARGIN.left, x2: MARGIN.left + inner[0], y1: y(value), y2: y(value) }));
      root.append(svg("text", { x: MARGIN.left - 5, y: y(value) + 4, "text-anchor": "end" }, short(value)));
    }
    const middle = MARGIN.left + inner[0] / 2;
    root.append(svg("text", { x: middle, y: height - 3, "text-anchor": "middle" }, "latency, of the full model’s"));
    const [across, up] = [11, MARGIN.top + inner[1] / 2];
    const turned = { x: across, y: up, "text-anchor": "middle", transform: `rotate(-90 ${across} ${up})` };
    root.append(svg("text", turned, "perplexity"));
    const line = best.map((point) => place(point).map((value) => value.toFixed(1)).join(",")).join(" ");
    root.append(svg("polyline", { class: "line", points: line }));
    for (const point of points) {
      const [cx, cy] = place(point);
      const dot = svg("circle", { class: point.best ? "dot best" : "dot", cx, cy, r: point.best ? 4 : 2.5 });
      dot.append(svg("title", {}, describe(point)));
      dots.set(point, dot);
      root.append(dot);
    }
    mark();
  }

  function mark() {
    for (const [point, dot] of dots) {
      dot.classList.toggle("selected", point === selected);
      dot.setAttribute("r", point === selected ? 7 : point.best ? 4 : 2.5);
    }
  }

  function nearest(event, among) {
    const box = root.getBoundingClientRect();
    const at = [event.clientX - box.left, event.clientY - box.top];
    const far = (point) => {
      const [px, py] = place(point);
      return Math.hypot(px - at[0], (py - at[1]) / 4);
    };
    return among.reduce((a, b) => (far(b) < far(a) ? b : a), among[0]);
  }

  root.addEventListener("pointerdown", (event) => {
    root.setPointerCapture(event.pointerId);
    onPick(nearest(event, best));
  });
  root.addEventListener("pointermove", (event) => {
    if (event.buttons & 1) onPick(nearest(event, best));
    else onHover(nearest(event, points));
  });
  root.addEventListener("pointerleave", () => onHover(null));
  new ResizeObserver(draw).observe(element);
  return {
    element,
    select(point) {
      selected = point;
      mark();
    },
  };
}
