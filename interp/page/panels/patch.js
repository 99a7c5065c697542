"use strict";

// A patch map: the residual stream of another prompt's run, put into this one at one place at a time.
report.panel("patch", (element, view) => {
  const {state, set, el, block, clamp} = report;
  const found = view.data;
  Object.assign(view.report.vocabulary, found.vocabulary);  // words that occur in no other figure
  const parts = ["prompt", "canvas"].filter((name) => found.places[name].length);
  const columns = parts.flatMap((part) => found.places[part].map((place, i) => ({part, place, i})));
  const count = found.layers.length;

  element.append(el("p", {class: "caption"},
    "The run of the prompt “", el("b", {}, found.against), "” answers “", el("b", {}, found.answer), "”. Each cell puts what that run holds after one layer, at one token, into the run " +
    "shown here, for this step alone, and tells how far the answer moves to the other one: 100% is all the way, 0 nothing, a stroke marks a move in the other direction. " +
    "Left, tokens of the prompt from the first that differs on; right, positions on the canvas. One row per layer, the last one uppermost."));
  const picture = el("canvas", {});
  const axis = el("div", {class: "axis", "aria-hidden": "true"});
  const plot = el("div", {class: "plot", tabindex: 0, role: "application", "aria-roledescription": "map", "data-map": "patch"}, picture);
  const names = el("div", {class: "names tokens", "aria-hidden": "true"});
  const readout = el("p", {class: "map-readout", "aria-live": "polite"});
  const table = el("table", {class: "numbers patch-places"});
  const legend = report.legendBar([[0, "0"], [0.5, "50%"], [1, "100%"]], "", 110);
  element.append(el("figure", {class: "map"}, el("figcaption", {}, el("b", {}, "Way to the other answer"), legend),
    el("div", {class: "with-axis"}, axis, plot)), names, readout, table);
  let at = {layer: count - 1, column: 0};

  // Steps may be thinned out: the last swept one that is not later.
  const index = () => Math.max(0, found.steps.findLastIndex((step) => step <= Math.max(1, state.step)));
  const value = (layer, {part, i}) => found.recovery[part][index()][layer][i];
  const edge = (i, pieces, size) => Math.round((i * size) / pieces);

  function paint() {
    const ratio = devicePixelRatio || 1, height = clamp(count * 18, 70, 240);
    plot.style.setProperty("height", `${height}px`);
    picture.width = Math.round(Math.max(1, plot.clientWidth) * ratio);
    picture.height = Math.round(height * ratio);
    const pen = picture.getContext("2d");
    columns.forEach((column, c) => {
      const x = edge(c, columns.length, picture.width), w = edge(c + 1, columns.length, picture.width) - x;
      for (let layer = 0; layer < count; layer++) {
        const y = edge(count - 1 - layer, count, picture.height), h = edge(count - layer, count, picture.height) - y;
        const share = value(layer, column) / 100, shade = clamp(Math.abs(share), 0, 1);
        pen.fillStyle = report.ramp(shade);
        pen.fillRect(x, y, w, h);
        if (share <= -0.05) {
          pen.fillStyle = report.inkOn(shade);
          pen.fillRect(x + w / 4, y + h / 2 - ratio, w / 2, 2 * ratio);
        }
      }
      if (c && columns[c - 1].part !== column.part) {
        pen.fillStyle = report.cssColour("--ink");
        pen.fillRect(x - ratio, 0, 2 * ratio, picture.height);
      }
    });
    axis.replaceChildren(...found.layers.map((layer, i) => el("span", {style: {top: `${(100 * (count - 0.5 - i)) / count}%`}}, String(layer))));
    plot.setAttribute("aria-label", `Way to the other answer, ${count} layers by ${columns.length} places. Arrow keys move; the table holds the numbers.`);
  }

  const word = ({part, place, i}) => report.tokenEl(part === "prompt" ? found.prompt_ids[i][0] : block().committed[place]);
  const where = ({part, place, i}) => part === "prompt"
    ? [`prompt token ${place} `, report.tokenEl(found.prompt_ids[i][0], "boxed"), ...(found.prompt_ids[i][0] === found.prompt_ids[i][1] ? [] : [" (there ", report.tokenEl(found.prompt_ids[i][1], "boxed"), ")"])]
    : [`canvas position ${place} `, report.tokenEl(block().committed[place], "boxed"), ...(found.differ.includes(place) ? [" (there ", report.tokenEl(found.donor_ids[place], "boxed"), ")"] : [])];

  function tell() {
    const column = columns[at.column];
    readout.replaceChildren(`step ${found.steps[index()]} · layer ${found.layers[at.layer]} · `, ...where(column), ` · ${value(at.layer, column)}%`);
    const row = (head, cells) => el("tr", {}, cells.map((cell, i) => el(head || !i ? "th" : "td", {scope: head ? "col" : i ? null : "row"}, cell)));
    const best = columns.map((one) => {
      const shares = found.layers.map((_, layer) => value(layer, one));
      const layer = shares.reduce((top, share, i) => (Math.abs(share) > Math.abs(shares[top]) ? i : top), 0);
      return {one, layer, share: shares[layer]};
    }).sort((a, b) => Math.abs(b.share) - Math.abs(a.share)).slice(0, 6);
    table.replaceChildren(el("thead", {}, row(true, ["place", "layer", "way to the other answer"])),
      el("tbody", {}, best.map(({one, layer, share}) => row(false, [el("span", {}, ...where(one)), String(found.layers[layer]), `${share}%`]))));
  }

  function go(layer, column) {
    at = {layer: clamp(layer, 0, count - 1), column: clamp(column, 0, columns.length - 1)};
    if (columns[at.column].part === "canvas" && !state.pinned) set({position: columns[at.column].place});
    tell();
  }
  const pointed = (event) => {
    const box = plot.getBoundingClientRect();
    go(count - 1 - Math.floor(((event.clientY - box.top) / box.height) * count), Math.floor(((event.clientX - box.left) / box.width) * columns.length));
  };
  plot.addEventListener("pointermove", (event) => event.pointerType === "mouse" && pointed(event));
  plot.addEventListener("click", pointed);
  plot.addEventListener("keydown", (event) => {
    const move = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [1, 0], ArrowDown: [-1, 0]}[event.key];
    if (!move) return;
    event.preventDefault();
    event.stopPropagation();
    go(at.layer + move[0], at.column + move[1]);
  });

  function layAll() {
    paint();
    names.replaceChildren(...columns.map((column, c) => el("span", {style: {left: `${(100 * (c + 0.5)) / columns.length}%`}}, word(column))));
  }
  view.on((after, before) => {
    if (!before || after.theme !== before.theme || after.step !== before.step) layAll();
    tell();
  });
  report.onWidth(element, layAll);
});
