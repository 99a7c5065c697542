"use strict";

// Tokens that stand at several places at once, and texts that are held shifted against the final one.
report.panel("smearing", (element, view) => {
  const {state, el, svg, number, plural, tokenEl, stepChart, on} = report;
  if (!view.data) {
    element.append(el("p", {class: "caption"}, "The record of this run kept no candidates."));
    return;
  }
  const now = () => view.data.blocks[state.block];
  const percent = Math.round(100 * view.data.floor);
  element.append(el("p", {class: "caption"},
    `A token is smeared where it has ${percent}% or more at a place that is not its own in the end, and as much at its own, within two positions. ` +
    "The lower chart asks the same of the whole text: its mean probability in place, and shifted by one position."));
  stepChart(element, () => {
    const counts = now().tokens.map((found) => found.length), top = Math.max(1, ...counts);
    return {
      title: "smeared tokens", height: 62, low: 0, high: top, ticks: [[0, "0"], [top, String(top)]],
      draw: (x, y, thick) => counts.map((v, i) => (v ? svg("rect", {class: "bar-a", x: x(i + 1) - thick / 2, width: thick, y: y(v), height: y(0) - y(v)}) : null)),
      tell: (i) => String(counts[i]),
    };
  });
  stepChart(element, () => {
    const {spacing, meaning} = now(), middle = (spacing[0].length - 1) / 2;
    const best = spacing.map((row) => Math.max(row[middle - 1], row[middle + 1]));
    const line = (values, x, y) => values.map((v, i) => `${x(i + 1).toFixed(1)},${y(v).toFixed(1)}`).join(" ");
    const entry = (css, text) => el("span", {class: "entry"}, el("span", {class: `stroke ${css}`}), text);
    return {
      title: "probability of the final text", height: 80, low: 0, high: 1, ticks: [[0, "0"], [0.5, "0.5"], [1, "1"]],
      names: [entry("line-a", "in place"), entry("line-b", "shifted by one"), entry("line-c", "shuffled")],
      draw: (x, y) => [["line-a", spacing.map((row) => row[middle])], ["line-b", best], ["line-c", now().null]]
        .map(([css, values]) => svg("polyline", {class: `curve ${css}`, points: line(values, x, y)})),
      tell: (i) => `${number(spacing[i][middle])} in place, ${number(best[i])} shifted` + (meaning[i] ? `, another text at ${plural(meaning[i], "position")}` : ""),
    };
  });
  const list = el("p", {class: "smears"});
  element.append(list);
  on(() => {
    const found = state.step ? now().tokens[state.step - 1] : [];
    list.replaceChildren(...(found.length ? [`Step ${state.step}: `, ...found.slice(0, 24).flatMap(([at, id]) => [tokenEl(id, "boxed"), ` at ${at}  `])]
      : [state.step ? `Step ${state.step}: no token is smeared.` : "Step 0 is the random start."]));
  });
});
