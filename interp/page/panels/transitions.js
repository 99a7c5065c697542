"use strict";

// What became of each position since the step before: acceptance is decided anew at every step.
report.panel("transitions", (element, view) => {
  const {state, el, svg, block, stepChart} = report;
  if (!view.data) {
    element.append(el("p", {class: "caption"}, "This page was made without the record that this figure needs."));
    return;
  }
  const names = view.data.names;
  element.append(el("p", {class: "caption"},
    "Each step decides anew which positions keep their sample. A position may be given up again: being accepted is not being frozen. " +
    "Before the first step nothing is known, and the rule accepts position 0 alone."));
  stepChart(element, () => {
    const counts = view.data.blocks[state.block].counts, c = block().start.length;
    const order = [0, 2, 1, 3];  // from the bottom: kept, newly accepted, given up, still open
    return {
      title: "positions", height: 120, low: 0, high: c, ticks: [[0, "0"], [c / 2, String(c / 2)], [c, String(c)]],
      names: order.map((i) => el("span", {class: "entry"}, el("span", {class: `swatch part-${i}`}), names[i])),
      draw: (x, y, thick) => counts.map((row, i) => {
        let below = 0;
        return order.map((part) => {
          const [from, to] = [below, below += row[part]];
          return row[part] ? svg("rect", {class: `part-${part}`, x: x(i + 1) - thick / 2, width: thick, y: y(to), height: y(from) - y(to)}) : null;
        });
      }),
      tell: (i) => order.map((part) => `${counts[i][part]} ${names[part]}`).join(", "),
    };
  });
});
