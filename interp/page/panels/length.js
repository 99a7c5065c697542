"use strict";

// The length that each step expects: the sum over positions of the probability that the answer goes on there.
report.panel("length", (element, view) => {
  const {state, el, svg, block, number, stepChart} = report;
  if (!view.data) {
    element.append(el("p", {class: "caption"}, "The record of this run kept no candidates."));
    return;
  }
  element.append(el("p", {class: "caption"},
    "Sum over positions of one minus the probability of an end token or padding. The band is what lies beyond the recorded candidates. " +
    "The rule is the length that came out, in this block."));
  stepChart(element, () => {
    const {low, high, final} = view.data.blocks[state.block], c = block().start.length;
    const line = (values, x, y) => values.map((v, i) => `${x(i + 1).toFixed(1)},${y(v).toFixed(1)}`);
    return {
      title: "positions expected", height: 110, low: 0, high: c, ticks: [[0, "0"], [c / 2, String(c / 2)], [c, String(c)]],
      draw: (x, y, thick, [left, right]) => [
        svg("line", {class: "rule", x1: left, x2: right, y1: y(final), y2: y(final)}),
        svg("text", {class: "rule-label", x: left + 5, y: y(final) - 4}, `final: ${final}`),
        svg("polygon", {class: "band", points: [...line(low, x, y), ...line(high, x, y).reverse()].join(" ")}),
        svg("polyline", {class: "curve line-a", points: line(high, x, y).join(" ")}),
        high.map((v, i) => svg("circle", {class: "dot line-a", r: 3, cx: x(i + 1), cy: y(v)}))],
      tell: (i) => (high[i] - low[i] < 0.05 ? number(high[i], 1) : `${number(low[i], 1)} to ${number(high[i], 1)}`) + `, in the end ${final}`,
    };
  });
});
