"use strict";

// Lines over steps on one axis: mean entropy with the stop threshold, what was accepted, what changed, temperature.
report.panel("curves", (element, view) => {
  const {state, set, el, svg, block, number} = report;
  const sampler = view.report.sampler;
  const [LEFT, RIGHT, TOP] = [54, 10, 6];
  const root = el("div", {class: "curves"});
  const stable = sampler.stability === "canvas" ? " and every argmax equals the token that was fed in."
    : sampler.stability_threshold === 0 ? "."
      : sampler.stability_threshold === 1 ? " and no argmax has changed."
        : ` and no argmax has changed for ${sampler.stability_threshold} steps.`;
  const caption = el("p", {class: "caption"}, sampler.early_stop
    ? `A block ends at the first step at which the mean entropy is below ${number(sampler.confidence_threshold, 4)} nats${stable}`
    : "Early stop was off in this run: a block takes all its steps.");
  element.append(caption, root);

  const LOW = 1e-4;  // floor of the logarithmic axis, nats
  const log = (value) => Math.log10(Math.max(value, LOW));

  function charts(one) {
    const top = Math.max(view.report.model.max_entropy, 1);
    const c = one.start.length;
    const changed = one.argmax_changed;
    const temperatures = [sampler.t_min, sampler.t_max];
    return [
      {title: "mean entropy, nats (log scale)", height: 108, low: log(LOW), high: log(top),
        ticks: [[0.0001, "≤0.0001"], [0.001, "0.001"], [0.01, "0.01"], [0.1, "0.1"], [1, "1"], [10, "10"]].filter(([v]) => v <= top)
          .map(([value, text]) => [log(value), text]),
        lines: [{css: "line-a", values: one.mean_entropy.map(log)}],
        rule: [log(sampler.confidence_threshold), `stop below ${number(sampler.confidence_threshold, 4)}`],
        tell: (i) => `${number(one.mean_entropy[i])}`},
      {title: "positions", height: 96, low: 0, high: c, ticks: [[0, "0"], [c / 2, String(c / 2)], [c, String(c)]],
        lines: [{css: "line-a", values: one.accepted_count, name: "accepted"},
          {css: "line-b", values: one.argmax_final, name: "argmax already final"}],
        tell: (i) => `${one.accepted_count[i]} accepted, ${one.argmax_final[i]} already final`},
      {title: "argmax changed since the step before", height: 62, low: 0, high: Math.max(1, ...changed.slice(1)),
        ticks: [[0, "0"], [Math.max(1, ...changed.slice(1)), String(Math.max(1, ...changed.slice(1)))]],
        bars: [{css: "bar-a", values: changed}], tell: (i) => (changed[i] == null ? "–" : `${changed[i]}`)},
      {title: "un-accepted", height: 46, low: 0, high: Math.max(1, ...one.unaccepted),
        ticks: [[0, "0"], [Math.max(1, ...one.unaccepted), String(Math.max(1, ...one.unaccepted))]],
        bars: [{css: "bar-b", values: one.unaccepted}], tell: (i) => `${one.unaccepted[i]}`},
      {title: "temperature τ", height: 52, low: Math.min(0, ...temperatures), high: Math.max(...temperatures),
        ticks: [...new Set([0, ...temperatures])].map((t) => [t, number(t)]),
        lines: [{css: "line-c", values: one.temperature}], tell: (i) => number(one.temperature[i])},
    ];
  }

  let cursors = [];
  function lay() {
    const one = block();
    const n = one.num_steps;
    const width = Math.max(260, root.clientWidth || 700);
    const x = (step) => LEFT + ((width - LEFT - RIGHT) * (step - 0.5)) / n;
    cursors = [];
    root.replaceChildren(...charts(one).map((chart) => draw(chart, one, width, x)), stepAxis(n, width, x));
  }

  function draw(chart, one, width, x) {
    const {height, low, high} = chart;
    const y = (value) => TOP + (height - TOP - 4) * (1 - (value - low) / (high - low || 1));
    const points = (values) => values.map((value, i) => `${x(i + 1).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
    const thick = Math.max(2, ((width - LEFT - RIGHT) / one.num_steps) * 0.62);
    const reading = el("b", {});
    const cursor = svg("line", {class: "now", y1: 0, y2: height});
    const dots = (chart.lines ?? []).map((line) => [line, svg("circle", {class: `dot ${line.css}`, r: 3.4})]);
    cursors.push((step) => {
      const shown = step > 0;
      for (const node of [cursor, ...dots.map(([, dot]) => dot)]) node.setAttribute("visibility", shown ? "visible" : "hidden");
      reading.textContent = shown ? chart.tell(step - 1) : "–";
      if (!shown) return;
      cursor.setAttribute("x1", x(step));
      cursor.setAttribute("x2", x(step));
      for (const [line, dot] of dots) {
        dot.setAttribute("cx", x(step));
        dot.setAttribute("cy", y(line.values[step - 1]));
      }
    });
    const picture = svg("svg", {width, height, viewBox: `0 0 ${width} ${height}`, role: "img",
      "aria-label": `${chart.title} for each of ${one.num_steps} steps; the numbers are in the table of steps`},
      chart.ticks.map(([value, text]) => [
        svg("line", {class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value)}),
        svg("text", {class: "tick", x: LEFT - 6, y: y(value) + 3.5, "text-anchor": "end"}, text)]).flat(),
      cursor,
      chart.rule ? [svg("line", {class: "rule", x1: LEFT, x2: width - RIGHT, y1: y(chart.rule[0]), y2: y(chart.rule[0])}),
        svg("text", {class: "rule-label", x: LEFT + 5, y: y(chart.rule[0]) - 4}, chart.rule[1])] : null,
      (chart.bars ?? []).map(({css, values}) => values.map((value, i) => (value
        ? svg("rect", {class: css, x: x(i + 1) - thick / 2, width: thick, y: y(value), height: y(0) - y(value)}) : null))),
      (chart.lines ?? []).map((line) => svg("polyline", {class: `curve ${line.css}`, points: points(line.values)})),
      dots.map(([, dot]) => dot));
    const names = (chart.lines ?? []).filter((line) => line.name)
      .map((line) => el("span", {class: "entry"}, el("span", {class: `stroke ${line.css}`}), line.name));
    return el("figure", {class: "chart"}, el("figcaption", {}, el("span", {}, chart.title), names, reading), picture);
  }

  function stepAxis(n, width, x) {
    const every = Math.ceil((n * 26) / (width - LEFT - RIGHT));
    const shown = Array.from({length: n}, (_, i) => i + 1).filter((t) => t === 1 || (t % every === 0 && n - t >= every) || t === n);
    return svg("svg", {width, height: 18, viewBox: `0 0 ${width} 18`, class: "steps", "aria-hidden": "true"},
      svg("text", {class: "tick", x: 0, y: 12}, "step"),
      shown.map((t) => svg("text", {class: "tick", x: x(t), y: 12, "text-anchor": "middle"}, String(t))));
  }

  function stepAt(event) {
    const box = root.getBoundingClientRect();
    const n = block().num_steps;
    const u = (event.clientX - box.left - LEFT) / (box.width - LEFT - RIGHT);
    return report.clamp(Math.floor(u * n) + 1, 1, n);
  }
  root.addEventListener("pointerdown", (event) => set({step: stepAt(event)}));
  root.addEventListener("pointermove", (event) => { if (event.buttons & 1) set({step: stepAt(event)}); });

  view.on((now, before) => {
    if (!before || now.block !== before.block) lay();
    for (const move of cursors) move(now.step);
  });
  report.onWidth(root, () => {
    lay();
    for (const move of cursors) move(state.step);
  });
});
