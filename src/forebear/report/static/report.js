"use strict";
// Fills what the server wrote for one method with that of another, and draws the charts.
(() => {
  document.documentElement.classList.add("js");
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (selector, root = document) => root.querySelector(selector);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const label = (name) => data.labels[name] ?? name;
  const digits = (value) => (value == null ? "none" : String(Number(value.toPrecision(3))));

  // Pictures and lists ---------------------------------------------------------------------

  function fill(slot, number, score, largest) {
    const example = data.examples[number];
    const text = score == null ? "" : `, score ${digits(score)}`;
    slot.classList.toggle("flipped", example.flipped);
    slot.title = `Example ${example.id}${text}`;
    $(".name", slot).textContent = example.label ?? "";
    $(".truth", slot).textContent = example.flipped ? `is ${example.true}` : "";
    const thumb = $(".thumb", slot);
    if (thumb) {
      thumb.style.setProperty("--c", number % data.columns);
      thumb.style.setProperty("--r", Math.floor(number / data.columns));
    } else {
      $(".text", slot).textContent = example.text ?? example.id;
    }
    if (score == null) return;
    $(".bar i", slot).style.width = `${largest ? (100 * Math.abs(score)) / largest : 0}%`;
    $(".sr", slot).textContent = `score ${digits(score)}`;
  }

  function showQueries(method) {
    all("#cards .card").forEach((card, index) => {
      const query = data.queries[index];
      const lists = ["proponents", "opponents"].map((side) => query[side][method] ?? []);
      const largest = Math.max(0, ...lists.flat().map(([, score]) => Math.abs(score)));
      all(".side", card).forEach((part, side) => {
        $(".none", part).hidden = lists[side].length > 0;
        all(".slot", part).forEach((slot, rank) => {
          slot.hidden = rank >= lists[side].length;
          if (!slot.hidden) fill(slot, ...lists[side][rank], largest);
        });
      });
    });
  }

  function showSuspects(method) {
    const suspects = data.suspects[method];
    all("#suspects > .slot").forEach((slot, rank) => fill(slot, suspects.examples[rank]));
    $("#suspects-finding").textContent = suspects.finding;
    draw();
  }

  const chosen = (name) => $(`input[name="${name}"]:checked`)?.value;
  function choose(name, show) {
    const inputs = all(`input[name="${name}"]`);
    inputs.forEach((input) => input.addEventListener("change", () => show(input.value)));
    // A browser may restore another choice than the one that was written.
    if (inputs.length && !inputs.find((input) => input.checked).defaultChecked) show(chosen(name));
  }

  // Charts ---------------------------------------------------------------------------------

  const base = (width) => ({ width, style: { background: "none", color: "var(--soft)", fontSize: "13px" } });
  const two = (value) => value.toFixed(2).replace("-", "−");
  const percent = (value) => `${Math.round(value * 1000) / 10}\u00a0%`;

  function ldsChart(width) {
    const narrow = width < 560;
    const left = narrow ? 104 : 176;
    const ceiling = data.ceiling;
    const rows = data.lds.filter((row) => row.mean != null);
    const low = Math.min(0, ...rows.map((row) => row.low));
    const high = Math.max(...rows.map((row) => row.high), ceiling ? ceiling.mean : 0);
    const tone = (row) => (row.name === data.best ? "var(--accent)" : "var(--faint)");
    const marks = [
      Plot.barX(rows, { x: "mean", y: "label", fill: tone, insetTop: 7, insetBottom: 7, rx: 2 }),
      Plot.ruleY(rows, { x1: "low", x2: "high", y: "label", stroke: "var(--ink)", strokeWidth: 1.5 }),
      Plot.ruleX([0], { stroke: "var(--ink)" }),
      Plot.axisY({ label: null, tickSize: 0, tickPadding: left, textAnchor: "start", lineWidth: left / 14, fontSize: 14, fill: "var(--ink)" }),
      Plot.text(rows, { x: (row) => Math.max(row.high, 0), y: "label", text: (row) => two(row.mean), dx: 8, textAnchor: "start",
        fill: "var(--ink)", stroke: "var(--paper)", strokeWidth: 5, fontWeight: 600, fontSize: 14 }),
    ];
    if (ceiling) {
      marks.unshift(
        Plot.rect([ceiling], { x1: "low", x2: "high", fill: "var(--ink)", fillOpacity: 0.07 }),
        Plot.ruleX([ceiling.mean], { stroke: "var(--ink)", strokeDasharray: "4 4" }),
        Plot.text([ceiling], { x: "mean", frameAnchor: "top", dy: -18, text: (c) => `noise ceiling ${two(c.mean)}`,
          textAnchor: ceiling.mean > 0.6 * high ? "end" : "start", dx: ceiling.mean > 0.6 * high ? 3 : 0, fill: "var(--ink)" }));
    }
    return Plot.plot({
      ...base(width), height: 56 + 44 * rows.length, marginLeft: left, marginTop: 34, marginBottom: 34, marginRight: 56,
      x: { domain: [low, high], label: null, ticks: narrow ? 4 : 8, tickSize: 0, nice: false, tickFormat: (v) => String(Math.round(v * 100) / 100).replace("-", "−") },
      y: { domain: rows.map((row) => row.label), label: null, tickSize: 0, padding: 0.1 },
      marks,
    });
  }

  // Labels at the ends of lines, pushed apart so that none covers another.
  function apart(ends, gap) {
    const sorted = [...ends].sort((a, b) => a.y - b.y);
    for (let pass = 0; pass < 60; pass++) {
      for (let i = 1; i < sorted.length; i++) {
        const short = gap - (sorted[i].at - sorted[i - 1].at);
        if (short > 0) { sorted[i].at += short / 2; sorted[i - 1].at -= short / 2; }
      }
    }
    return sorted;
  }

  function lines(width, { points, x, y, strong, height = 380 }) {
    const narrow = width < 560;
    const names = [...new Set(points.map((point) => point.name))];
    const right = narrow ? 92 : 160;
    const span = y.domain[1] - y.domain[0];
    const ends = apart(names.map((name) => {
      const last = points.filter((point) => point.name === name).at(-1);
      return { ...last, at: last.y };
    }), (17 / (height - 60)) * span);
    const isStrong = (point) => point.name === strong;
    const rest = points.filter((point) => !isStrong(point));
    const tone = (point) => (isStrong(point) ? "var(--accent)" : point.name === "random" ? "var(--faint)" : "var(--soft)");
    const dashed = (point) => (point.name === "random" ? "3 4" : null);
    return Plot.plot({
      ...base(width), height, marginLeft: 48, marginRight: right, marginTop: 30, marginBottom: 40,
      x: { tickSize: 0, labelArrow: "none", ticks: narrow ? 4 : undefined, ...x }, y: { grid: true, tickSize: 0, labelArrow: "none", ticks: 5, ...y },
      marks: [
        ...d3.groups(rest, (point) => point.name).map(([, line]) =>
          Plot.line(line, { x: "x", y: "y", stroke: tone(line[0]), strokeWidth: 1.5, strokeDasharray: dashed(line[0]) })),
        Plot.line(points.filter(isStrong), { x: "x", y: "y", stroke: "var(--accent)", strokeWidth: 2.75 }),
        points.length < 80 ? Plot.dot(points, { x: "x", y: "y", fill: tone, r: (point) => (isStrong(point) ? 3.5 : 2.5) }) : null,
        Plot.text(ends, { x: "x", y: "at", text: (end) => label(end.name), textAnchor: "start", dx: 10, lineWidth: narrow ? 8 : 20, textOverflow: "ellipsis",
          fill: (end) => (isStrong(end) ? "var(--accent)" : "var(--soft)"), fontWeight: 500 }),
      ],
    });
  }

  function removalChart(width) {
    const { fractions, curves } = data.removal;
    const points = Object.entries(curves).flatMap(([name, values]) =>
      values.map((y, i) => ({ name, x: fractions[i], y })).filter((point) => point.y != null));
    const [low, high] = d3.extent(points, (point) => point.y);
    const pad = 0.04 * (high - low || 1);
    return lines(width, { points, strong: data.best in curves ? data.best : Object.keys(curves)[0],
      x: { label: "share of the training set removed", tickFormat: percent, domain: d3.extent(fractions) },
      y: { label: "measurement after retraining", domain: [low - pad, high + pad], tickFormat: (v) => d3.format("~g")(v) } });
  }

  function foundChart(width) {
    const strong = chosen("suspect-method") ?? Object.keys(data.suspects)[0];
    const points = Object.entries(data.suspects).flatMap(([name, { curve }]) => curve.map(([x, y]) => ({ name, x, y })));
    // All curves end in one corner, so the strong one is named here and the others by the chooser.
    const narrow = width < 560;
    const own = points.filter((point) => point.name === strong);
    const at = own.find((point) => point.y >= 0.6) ?? own.at(-1);
    return Plot.plot({
      ...base(width), height: 320, marginLeft: 48, marginRight: 24, marginTop: 30, marginBottom: 40,
      x: { domain: [0, 1], label: "share of the list read", labelArrow: "none", tickFormat: percent, tickSize: 0, ticks: narrow ? 4 : 10 },
      y: { domain: [0, 1], label: "share of the planted errors found", labelArrow: "none", tickFormat: percent, tickSize: 0, ticks: 5, grid: true },
      marks: [
        Plot.line([[0, 0], [1, 1]], { stroke: "var(--faint)", strokeDasharray: "3 4" }),
        Plot.line(points.filter((point) => point.name !== strong), { x: "x", y: "y", z: "name", stroke: "var(--faint)", strokeWidth: 1.25 }),
        Plot.line(own, { x: "x", y: "y", stroke: "var(--accent)", strokeWidth: 2.75 }),
        Plot.text([at], { x: "x", y: "y", text: () => label(strong), dx: 12, textAnchor: "start", fill: "var(--accent)", fontWeight: 600, stroke: "var(--paper)", strokeWidth: 5 }),
      ],
    });
  }

  const charts = { "chart-lds": ldsChart, "chart-removal": removalChart, "chart-found": foundChart };
  function draw() {
    for (const [id, chart] of Object.entries(charts)) {
      const place = document.getElementById(id);
      if (place && place.clientWidth) place.replaceChildren(chart(place.clientWidth));
    }
  }

  choose("query-method", showQueries);
  choose("suspect-method", showSuspects);
  draw();
  let width = document.documentElement.clientWidth;
  window.addEventListener("resize", () => {
    if (document.documentElement.clientWidth === width) return;
    width = document.documentElement.clientWidth;
    requestAnimationFrame(draw);
  });
  // Closed parts would be missing on paper.
  window.addEventListener("beforeprint", () => all("details").forEach((part) => { part.open = true; }));
})();
