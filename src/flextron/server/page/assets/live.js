// The engine live: one stream while the tab is shown, the last ten minutes.
import { events, request } from "./api.js";
import { el, short, write } from "./dom.js";
import { lineChart } from "./lines.js";

const SPAN = 600;

function share(part, whole) {
  return whole > 0 ? (100 * part) / whole : null;
}

function clock(time) {
  return new Date(time * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
}

const CHARTS = [
  { title: "Requests", series: { running: (s) => s.running, waiting: (s) => s.waiting } },
  { title: "Time between tokens (TPOT)", unit: "ms", series: { mean: (s) => s.tpot_ms, "95 %": (s) => s.tpot_p95_ms }, limit: "slo_tpot_ms" },
  { title: "Time to first token (TTFT)", unit: "ms", series: { mean: (s) => s.ttft_ms, "95 %": (s) => s.ttft_p95_ms }, limit: "slo_ttft_ms" },
  { title: "Tokens by target", unit: "tokens/s", isMix: true },
  { title: "Latency cap", series: { cap: (s) => s.cap, "narrowed a second": (s) => s.narrowed } },
  { title: "KV cache in use", unit: "%", series: { used: (s) => 100 * s.kv } },
  { title: "Prefix cache: tokens found", unit: "%", series: { found: (s) => share(s.found, s.looked_up) } },
  { title: "Drafted tokens that held", unit: "%", series: { accepted: (s) => share(s.accepted, s.drafted) } },
  { title: "Finetuning", unit: "tokens/s", series: { trained: (s) => s.trained } },
];

export class Live {
  constructor(facts) {
    this.facts = facts;
    this.samples = [];
    this.drawnAt = 0;
    this.abort = null;
    this.state = el("p", { class: "hint", role: "status" }, "Not connected.");
    this.charts = CHARTS.map(({ title, unit }) => lineChart(title, unit));
    this.tiles = {};
    const tiles = el("dl", { class: "figures tiles" });
    for (const name of ["running", "waiting", "tokens/s", "TPOT", "TTFT", "KV cache"]) {
      this.tiles[name] = el("dd", {}, "–");
      tiles.append(el("div", {}, el("dt", {}, name), this.tiles[name]));
    }
    const link = el("a", { href: "metrics", target: "_blank", rel: "noopener" }, "All metrics, for Prometheus");
    this.element = el(
      "div",
      {},
      el("div", { class: "row spread" }, this.state, link),
      tiles,
      el("div", { class: "charts" }, ...this.charts.map((chart) => chart.element)),
    );
  }

  /** Begin to look, and go on after the server was away. */
  async start() {
    if (this.abort) return;
    const abort = (this.abort = new AbortController());
    while (!abort.signal.aborted) {
      try {
        const response = await request("page/live", { signal: abort.signal });
        this.samples = [];
        write(this.state, "Connected: a sample a second.");
        for await (const data of events(response)) this.add(JSON.parse(data));
      } catch (error) {
        if (abort.signal.aborted || error.status === 401) break;
      }
      if (abort.signal.aborted) break;
      write(this.state, "The server does not answer; trying again every two seconds.");
      await new Promise((resolve) => setTimeout(resolve, 2000));
    }
    if (this.abort === abort) this.abort = null;
  }

  stop() {
    this.abort?.abort();
    this.abort = null;
  }

  add(sample) {
    this.samples.push(sample);
    while (this.samples[0].time < sample.time - SPAN) this.samples.shift();
    this.isDue ??= requestAnimationFrame(() => {
      this.isDue = null;
      this.draw();
    });
  }

  draw() {
    const now = this.samples.at(-1);
    const sum = Object.values(now.tokens).reduce((a, b) => a + b, 0);
    const values = {
      running: now.running,
      waiting: now.waiting,
      "tokens/s": short(sum),
      TPOT: now.tpot_ms === null ? "–" : `${short(now.tpot_ms)} ms`,
      TTFT: now.ttft_ms === null ? "–" : `${short(now.ttft_ms)} ms`,
      "KV cache": `${short(100 * now.kv)} %`,
    };
    for (const [name, value] of Object.entries(values)) write(this.tiles[name], String(value));
    // a minute at least, so that the first samples do not fill the chart
    const begin = Math.min(this.samples[0].time, now.time - 60);
    // drawing has the engine's cores to share, and over ten minutes a second is less than a pixel
    if (now.time - this.drawnAt < Math.max(1.5, (now.time - begin) / 150)) return;
    this.drawnAt = now.time;
    const options = { x: [begin, now.time], tick: clock };
    CHARTS.forEach(({ series, limit, isMix }, i) => {
      const named = isMix ? this.mix() : Object.entries(series).map(([name, read]) => ({ name, points: this.points(read) }));
      this.charts[i].update(named, { ...options, limit: limit ? this.facts.settings[limit] : null, isStacked: isMix });
    });
  }

  /** One value a sample, and a hole where there was none or nobody looked. */
  points(read) {
    const found = [];
    let last = null;
    for (const sample of this.samples) {
      if (last !== null && sample.time - last > 5) found.push([last, null]);
      found.push([sample.time, read(sample) ?? null]);
      last = sample.time;
    }
    return found;
  }

  mix() {
    const names = [...new Set(this.samples.flatMap((sample) => Object.keys(sample.tokens)))].sort();
    return names.map((name) => ({ name, points: this.points((sample) => sample.tokens[name] ?? 0) }));
  }
}
