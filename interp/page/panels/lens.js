"use strict";

// The logit lens: what each layer would say if it were the last one, at the chosen step.
report.panel("lens", (element, view) => {
  const {state, set, el, block, clamp} = report;
  const lens = view.data;
  if (!lens) {
    element.append(el("p", {class: "caption"}, "This page was made of a run that was not read layer by layer."));
    return;
  }
  Object.assign(view.report.vocabulary, lens.vocabulary);  // words that occur in no other figure
  const count = lens.layers.length;
  const now = () => lens.blocks[state.block];
  const scale = () => report.legendBar([[0, "1"], [0.5, "0.5"], [1, "0"]], "", 110);

  const caption = el("p", {class: "caption"},
    "The residual stream after each layer, read as if it were the last: final norm, output table, softmax, before temperature. " +
    "One row per layer, the last one uppermost. A dot: the final token is the most likely. What a layer seems to say is not proof that later ones use it.");
  const positions = figure("lens", "Probability of the final token, at this step", () => block().start.length,
    (layer, c) => (state.step ? now().final_probs[state.step - 1][layer][c] / 100 : null),
    (layer, c) => state.step > 0 && now().top[state.step - 1][layer][c] === block().committed[c],
    (c) => ({position: c, pinned: true}));
  const shares = figure("lens-share", "Share of the answer with the final token on top, by step", () => block().num_steps,
    (layer, i) => now().share[i][layer], () => false, (i) => ({step: i + 1}));
  positions.plot.addEventListener("pointermove", (event) => {
    if (event.pointerType === "mouse" && !state.pinned) set({position: columnAt(positions, event)});
  });
  const steps = el("div", {class: "names indices", "aria-hidden": "true"});
  const readout = el("p", {class: "map-readout"});
  const table = el("table", {class: "numbers lens-layers"});
  element.append(caption, positions.root, readout, table, shares.root, steps);

  function figure(name, title, columns, value, dot, target) {
    const picture = el("canvas", {});
    const cross = el("div", {class: "cross column"});
    const axis = el("div", {class: "axis", "aria-hidden": "true"});
    const plot = el("div", {class: "plot", tabindex: 0, role: "application", "aria-roledescription": "map",
      "data-keys": true, "data-map": name}, picture, cross);
    const root = el("figure", {class: "map"}, el("figcaption", {}, el("b", {}, title), scale()), el("div", {class: "with-axis"}, axis, plot));
    const one = {title, columns, value, dot, root, picture, cross, axis, plot};
    plot.addEventListener("keydown", report.gridKeys);
    plot.addEventListener("click", (event) => {
      set(target(columnAt(one, event)));
      plot.focus({preventScroll: true});
    });
    return one;
  }

  function columnAt(one, event) {
    const box = one.plot.getBoundingClientRect();
    return clamp(Math.floor(((event.clientX - box.left) / box.width) * one.columns()), 0, one.columns() - 1);
  }

  // The last layer is at the top.
  function paint(one) {
    const height = clamp(count * 16, 60, 220);
    const ratio = devicePixelRatio || 1;
    one.plot.style.setProperty("height", `${height}px`);
    one.picture.width = Math.round(Math.max(1, one.plot.clientWidth) * ratio);
    one.picture.height = Math.round(height * ratio);
    const pen = one.picture.getContext("2d");
    const edge = (i, parts, size) => Math.round((i * size) / parts);
    const columns = one.columns();
    for (let layer = 0; layer < count; layer++) {
      const y = edge(count - 1 - layer, count, one.picture.height), h = edge(count - layer, count, one.picture.height) - y;
      for (let c = 0; c < columns; c++) {
        const p = one.value(layer, c);
        if (p == null) continue;
        const x = edge(c, columns, one.picture.width), w = edge(c + 1, columns, one.picture.width) - x;
        pen.fillStyle = report.ramp(1 - p);
        pen.fillRect(x, y, w, h);
        if (one.dot(layer, c)) {
          pen.fillStyle = report.inkOn(1 - p);
          pen.beginPath();
          pen.arc(x + w / 2, y + h / 2, Math.min(2.5 * ratio, w / 3, h / 3), 0, 2 * Math.PI);
          pen.fill();
        }
      }
    }
    one.axis.replaceChildren(...lens.layers.map((layer, i) => el("span", {style: {top: `${(100 * (count - 0.5 - i)) / count}%`}}, String(layer))));
    one.plot.setAttribute("aria-label", `${one.title}: ${count} layers by ${columns}. Arrow keys move; the table holds the numbers.`);
  }

  function tell() {
    if (!state.step) {
      readout.textContent = "Step 0 is the random start: nothing has been read yet.";
      table.replaceChildren();
      return;
    }
    const [at, c] = [now(), state.position];
    const ids = at.top[state.step - 1], probs = at.top_probs[state.step - 1], finals = at.final_probs[state.step - 1];
    readout.replaceChildren(`Step ${state.step}, position ${c}, final token `, report.tokenEl(block().committed[c], "boxed"), ":");
    const row = (head, cells) => el("tr", {}, el("th", {scope: head ? "col" : "row"}, cells[0]), cells.slice(1).map((cell) => el(head ? "th" : "td", {}, cell)));
    table.replaceChildren(el("thead", {}, row(true, ["layer", "most likely token", "probability", "of the final token"])),
      el("tbody", {}, lens.layers.map((layer, i) => row(false,
        [String(layer), report.tokenEl(ids[i][c], "boxed"), `${probs[i][c]}%`, `${finals[i][c]}%`])).reverse()));
  }

  function layAll() {
    paint(positions);
    paint(shares);
    const n = block().num_steps;
    const every = Math.ceil(n / Math.max(1, element.clientWidth / 40));
    steps.replaceChildren(...Array.from({length: n}, (_, i) => i + 1).filter((step) => (step - 1) % every === 0)
      .map((step) => el("span", {style: {left: `${(100 * (step - 0.5)) / n}%`}}, String(step))));
  }

  view.on((after, before) => {
    if (!before || after.block !== before.block || after.theme !== before.theme) layAll();
    else if (after.step !== before.step) paint(positions);
    const place = (one, column) => {
      one.cross.hidden = column < 0;
      one.cross.style.setProperty("left", `${(100 * column) / one.columns()}%`);
      one.cross.style.setProperty("width", `${100 / one.columns()}%`);
    };
    place(positions, after.position);
    place(shares, after.step - 1);
    tell();
  });
  report.onWidth(element, layAll);
});
