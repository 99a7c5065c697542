"use strict";

// Maps over step and position: entropy with the settled line, acceptance, and a strip of settled steps.
report.panel("maps", (element, view) => {
  const {state, set, el, block, number, tokenOf, acceptedAt, droppedAt, entropyAt} = report;
  const LEFT = 34;  // room for step numbers, CSS pixels

  const caption = el("p", {class: "caption"},
    "One column per position, one row per step, from top to bottom. The line (a tick, where columns are narrow) ",
    "marks where a position settles: below it, its argmax never changes again. Click a cell to go there.");
  const readout = el("p", {class: "map-readout"});
  const figures = [
    figure("entropy", "Entropy", paintEntropy, (one) => one.num_steps,
      report.legendBar(report.entropyTicks, "H, nats", 210)),
    figure("accepted", "Accepted", paintAccepted, (one) => one.num_steps,
      el("div", {class: "entries"}, key("key-accepted", "accepted"), key("key-open", "not accepted"), key("key-dropped", "un-accepted here"))),
    figure("settled", "Settled at step", paintSettled, () => 1, report.legendBar([[0, "1"], [1, "last"]], "step", 110)),
  ];
  const names = el("div", {class: "names", "aria-hidden": "true"});
  const summary = el("p", {class: "caption summary"});
  element.append(summary, caption, readout, ...figures.map((one) => one.root), names);

  // In words: how early the answer was decided, what came last, and what was taken back.
  function tellSummary() {
    const one = block();
    const inside = one.settled.map((step, position) => ({step, position})).filter(({position}) => position < one.answer_length);
    if (!inside.length) {
      summary.textContent = "No position of this block belongs to the answer.";
      return;
    }
    inside.sort((a, b) => a.step - b.step || a.position - b.position);
    const ends = view.report.answer.ended && state.block === view.report.blocks.length - 1;
    const half = inside[Math.ceil(inside.length / 2) - 1].step;
    const last = inside.at(-1);
    const returned = one.unaccepts.reduce((sum, count) => sum + count, 0);
    const link = (position, step) => el("button", {type: "button", class: "link", onclick: () => set({position, step, pinned: true})},
      `position ${position}`);
    const first = one.unaccepts.findIndex((count) => count > 0);
    const when = one.accepted.findIndex((_, i) => first >= 0 && droppedAt(one, i + 1, first)) + 1;
    summary.replaceChildren(`Of ${report.plural(inside.length, "position")} of the answer${ends ? ", end token included" : ""}, half had settled by step ${half} ` +
      `of ${one.num_steps}; the last was `, link(last.position, last.step), " (", report.tokenEl(one.committed[last.position], "boxed"),
      `) at step ${last.step}. `, returned ? `${report.plural(returned, "acceptance was", "acceptances were")} taken back on the way, for instance at ` : "Nothing that was accepted was taken back.",
      ...(returned ? [link(first, when), "."] : []));
  }

  function key(css, text) {
    return el("span", {class: "entry"}, el("span", {class: `key ${css}`}), text);
  }

  function figure(name, title, paint, rows, legend) {
    const picture = el("canvas", {});
    const row = el("div", {class: "cross row"});
    const column = el("div", {class: "cross column"});
    const axis = el("div", {class: "axis", "aria-hidden": "true"});
    const plot = el("div", {class: "plot", tabindex: 0, role: "application", "aria-roledescription": "map", "data-keys": true, "data-map": name}, picture, column, row);
    const root = el("figure", {class: "map"},
      el("figcaption", {}, el("b", {}, title), legend), el("div", {class: "with-axis"}, axis, plot));
    const one = {name, title, root, picture, row, column, axis, plot, paint, rows};
    plot.addEventListener("keydown", report.gridKeys);
    plot.addEventListener("click", (event) => {
      const cell = cellAt(one, event);
      set({...cell, pinned: true});
      plot.focus({preventScroll: true});
    });
    plot.addEventListener("pointermove", (event) => {
      if (event.pointerType !== "mouse") return;
      const cell = cellAt(one, event);
      tell(cell.step ?? state.step, cell.position);
      if (!state.pinned) set({position: cell.position});
    });
    plot.addEventListener("pointerleave", () => tell(state.step, state.position));
    return one;
  }

  function cellAt(one, event) {
    const box = one.plot.getBoundingClientRect();
    const cut = (value, size, count) => report.clamp(Math.floor((value / size) * count), 0, count - 1);
    const position = cut(event.clientX - box.left, box.width, block().start.length);
    if (one.rows(block()) === 1) return {position};
    return {position, step: 1 + cut(event.clientY - box.top, box.height, block().num_steps)};
  }

  function tell(step, position) {
    const one = block();
    const settled = one.settled[position];
    const status = acceptedAt(one, step, position) ? "accepted" : droppedAt(one, step, position) ? "un-accepted" : "not accepted";
    const holds = step ? ["argmax ", report.tokenEl(one.argmax[step - 1][position], "boxed"), ` · H ${number(entropyAt(one, step, position))} · ${status}`]
      : ["random start ", report.tokenEl(one.start[position], "boxed")];
    readout.replaceChildren(`step ${step} · position ${position} · `, ...holds, " · final ",
      report.tokenEl(one.committed[position], "boxed"), ` settled at step ${settled}`);
  }

  // ---- painting; a unit is a device pixel, so that cells meet without seams -------------------

  function paintEntropy(pen, one, xs, ys) {
    for (let i = 0; i < one.num_steps; i++) {
      one.entropy[i].forEach((entropy, c) => {
        pen.fillStyle = report.entropyColour(entropy);
        pen.fillRect(xs[c], ys[i], xs[c + 1] - xs[c], ys[i + 1] - ys[i]);
      });
    }
    // Narrow columns get a tick each: connected, the line would hide what it divides.
    const width = Math.max(1.5, devicePixelRatio * 1.5);
    const connected = xs[1] - xs[0] > 4 * width;
    for (const [colour, more] of [[report.cssColour("--paper"), (connected ? 2 : 1) * width], [report.cssColour("--ink"), 0]]) {
      pen.beginPath();
      one.settled.forEach((step, c) => {
        const y = Math.max(ys[step - 1], width / 2);
        if (c === 0 || !connected) pen.moveTo(xs[c], y);
        else pen.lineTo(xs[c], y);
        pen.lineTo(xs[c + 1], y);
      });
      pen.strokeStyle = colour;
      pen.lineWidth = width + more;
      pen.stroke();
    }
  }

  function paintAccepted(pen, one, xs, ys) {
    const full = report.cssColour("--field"), dropped = report.cssColour("--dropped"), pale = report.cssColour("--dropped-pale");
    for (let i = 0; i < one.num_steps; i++) {
      for (let c = 0; c < one.start.length; c++) {
        const [w, h] = [xs[c + 1] - xs[c], ys[i + 1] - ys[i]];
        if (one.accepted[i][c]) {
          pen.fillStyle = full;
          pen.fillRect(xs[c], ys[i], w, h);
        } else if (droppedAt(one, i + 1, c)) {
          pen.fillStyle = w > 7 && h > 7 ? pale : dropped;
          const wide = Math.max(w, 3 * devicePixelRatio);  // to be seen on a wide canvas too
          pen.fillRect(xs[c] + (w - wide) / 2, ys[i], wide, h);
          if (w > 7 && h > 7) cross(pen, xs[c] + w / 2, ys[i] + h / 2, Math.min(w, h) * 0.28, dropped);
        }
      }
    }
  }

  function cross(pen, x, y, r, colour) {
    pen.beginPath();
    pen.moveTo(x - r, y - r);
    pen.lineTo(x + r, y + r);
    pen.moveTo(x - r, y + r);
    pen.lineTo(x + r, y - r);
    pen.strokeStyle = colour;
    pen.lineWidth = 1.6 * devicePixelRatio;
    pen.stroke();
  }

  function paintSettled(pen, one, xs, ys) {
    const small = 10 * devicePixelRatio;
    pen.font = `${small}px system-ui, sans-serif`;
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    one.settled.forEach((step, c) => {
      const u = one.num_steps > 1 ? (step - 1) / (one.num_steps - 1) : 0;
      const w = xs[c + 1] - xs[c];
      pen.fillStyle = report.ramp(u);
      pen.fillRect(xs[c], ys[0], w, ys[1] - ys[0]);
      if (w > 1.5 * small) {
        pen.fillStyle = report.inkOn(u);
        pen.fillText(String(step), xs[c] + w / 2, (ys[0] + ys[1]) / 2);
      }
    });
  }

  // ---- layout -----------------------------------------------------------------------------------

  function lay(figure) {
    const one = block();
    const rows = figure.rows(one);
    const height = rows === 1 ? 20 : report.clamp(rows * 15, 120, 290);
    figure.plot.style.setProperty("height", `${height}px`);
    const ratio = devicePixelRatio || 1;
    const width = Math.max(1, figure.plot.clientWidth);
    figure.picture.width = Math.round(width * ratio);
    figure.picture.height = Math.round(height * ratio);
    const edges = (count, size) => Array.from({length: count + 1}, (_, i) => Math.round((i * size) / count));
    const pen = figure.picture.getContext("2d");
    pen.clearRect(0, 0, figure.picture.width, figure.picture.height);
    const xs = edges(one.start.length, figure.picture.width);
    figure.paint(pen, one, xs, edges(rows, figure.picture.height));
    if (one.answer_length > 0 && one.answer_length < one.start.length) {
      pen.strokeStyle = report.cssColour("--ink");
      pen.lineWidth = ratio;
      pen.setLineDash([3 * ratio, 3 * ratio]);
      pen.beginPath();
      pen.moveTo(xs[one.answer_length], 0);
      pen.lineTo(xs[one.answer_length], figure.picture.height);
      pen.stroke();
      pen.setLineDash([]);
    }
    const every = Math.ceil(rows / (height / 14));
    figure.axis.replaceChildren(...(rows === 1 ? [] : Array.from({length: rows}, (_, i) => i + 1)
      .filter((step) => step === 1 || step === rows || (step % every === 0 && rows - step >= every))
      .map((step) => el("span", {style: {top: `${(100 * (step - 0.5)) / rows}%`}}, String(step)))));
    figure.plot.setAttribute("aria-label", `${figure.title}, ${one.start.length} positions` +
      (rows > 1 ? ` by ${rows} steps` : "") + ". Arrow keys move; the tables below hold the numbers.");
  }

  function layNames() {
    const one = block();
    const count = one.start.length;
    const wide = (element.clientWidth - LEFT) / count;
    if (wide < 11) {
      const every = [8, 16, 32, 64, 128].find((n) => n * wide > 34) ?? count;
      names.className = "names indices";
      names.replaceChildren(...one.start.map((_, i) => i).filter((i) => i % every === 0)
        .map((i) => el("span", {style: {left: `${(100 * (i + 0.5)) / count}%`}}, String(i))));
    } else {
      names.className = "names tokens";
      names.replaceChildren(...one.committed.map((id, i) => el("span", {"data-position": i, style: {left: `${(100 * (i + 0.5)) / count}%`},
        class: i >= one.answer_length ? "past" : ""}, report.tokenEl(id))));
    }
  }

  function layAll() {
    figures.forEach(lay);
    layNames();
  }

  view.on((now, before) => {
    if (!before || now.block !== before.block || now.theme !== before.theme) layAll();
    if (!before || now.block !== before.block) tellSummary();
    const one = block();
    const [c, n] = [one.start.length, one.num_steps];
    for (const figure of figures) {
      figure.column.style.setProperty("left", `${(100 * now.position) / c}%`);
      figure.column.style.setProperty("width", `${100 / c}%`);
      figure.row.hidden = figure.rows(one) === 1 || now.step === 0;
      figure.row.style.setProperty("top", `${(100 * (now.step - 1)) / n}%`);
      figure.row.style.setProperty("height", `${100 / n}%`);
    }
    for (const name of names.children) name.classList.toggle("here", Number(name.dataset.position) === now.position);
    tell(now.step, now.position);
  });
  report.onWidth(element, layAll);
});
