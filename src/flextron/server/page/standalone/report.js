// The report of a load on a server: what was asked of it, how long it took, and how that is distributed.
const report = JSON.parse(document.getElementById("data").textContent);
const { server, arrivals, summary, objectives } = report;

function table(caption, head, rows) {
  return el(
    "div",
    { class: "card scroll", tabindex: 0, role: "region", "aria-label": caption },
    el(
      "table",
      {},
      el("caption", {}, caption),
      el("thead", {}, el("tr", {}, ...head.map((name) => el("th", { scope: "col" }, name)))),
      el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((value) => el("td", {}, value))))),
    ),
  );
}

function facts() {
  const percent = (value) => (value === null ? "–" : `${short(100 * value)} %`);
  const asked = Object.entries(objectives).filter(([, value]) => value !== null);
  const rows = [
    ["server", `${server.model} at ${server.url}, ${server.endpoint}`],
    ["date", report.date],
    ["flextron", report.versions.flextron],
    ["arrivals", arrivals.process],
    ["requests offered a second", short(arrivals.offered_rate_per_s)],
    ["requests", `${summary.num_ok} answered of ${summary.num_requests}`],
    ...(report.interrupted ? [["unfinished when it was interrupted", String(report.num_unfinished)]] : []),
    ...Object.entries(report.error_examples).map(([kind, example]) => [`error: ${kind}`, example]),
    ["duration", seconds(report.duration_s)],
    ["requests a second", short(summary.requests_per_s)],
    ["output tokens a second", short(summary.output_tokens_per_s)],
    ["all tokens a second", short(summary.total_tokens_per_s)],
    ...(asked.length
      ? [
          ["objectives", asked.map(([name, value]) => `${name} ${short(value)}`).join(", ")],
          ["attainment", percent(summary.attainment)],
          ["goodput, requests a second", short(summary.goodput_per_s)],
        ]
      : []),
  ];
  const list = rows.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)));
  return el("section", { class: "card", "aria-label": "Run" }, el("dl", { class: "facts" }, ...list));
}

const KINDS = { ttft_ms: "Time to first token", tpot_ms: "Time per output token", e2e_ms: "Time to the end" };

function spreads() {
  const spread = (found) => ["mean", "p50", "p90", "p99", "max"].map((key) => short(found[key]));
  // an object would put a target such as "1" before all others, whatever order it was given
  const parts = [["all", summary], ...Object.entries(report.by_target)];
  const rows = parts.flatMap(([target, part]) =>
    Object.entries(KINDS).filter(([key]) => part[key]).map(([key, title]) => [target, title, ...spread(part[key])]),
  );
  return table("Latencies in milliseconds", ["target", "latency", "mean", "p50", "p90", "p99", "most"], rows);
}

/** Of each target, the part of its requests that took at most so long. */
function distribution(key, title) {
  const targets = [...new Set(report.requests.map((request) => request.target))];
  const series = targets.map((target) => {
    const values = report.requests.filter((request) => request.target === target && request[key] !== null).map((request) => request[key]);
    values.sort((a, b) => a - b);
    return { name: target || "all", points: values.map((value, i) => [value, (100 * (i + 1)) / values.length]) };
  });
  const all = series.flatMap(({ points }) => points.map(([value]) => value));
  if (!all.length) return null;
  const chart = lineChart(`${title}: part of the requests within`, "%");
  chart.update(series, { x: [0, Math.max(...all)], tick: (value) => `${short(value)} ms` });
  return el("div", { class: "card" }, chart.element);
}

document.title = `Load on ${server.model} – flextron`;
document
  .getElementById("main")
  .replaceChildren(
    el("h1", {}, `Load on ${server.model}`),
    facts(),
    spreads(),
    ...Object.entries(KINDS).map(([key, title]) => distribution(key, title)).filter((part) => part !== null),
  );
