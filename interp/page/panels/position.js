"use strict";

// Everything about one position: candidates at this step, and its history over all steps.
report.panel("position", (element, view) => {
  const {state, set, el, svg, block, number, percent, tokenEl, tokenOf, acceptedAt, droppedAt, entropyAt} = report;

  const head = el("div", {class: "position-head"});
  const verdict = el("p", {class: "caption"});
  const candidates = el("table", {class: "candidates"});
  const lines = el("div", {class: "sparks"});
  const history = el("table", {class: "history"});
  const scroller = el("div", {class: "scroller", tabindex: 0, role: "region", "aria-label": "Tokens at this position, step by step"}, history);
  element.append(head, verdict, candidates, lines, el("h3", {}, "Step by step"), scroller);

  function drawHead() {
    const one = block();
    const {position, pinned} = state;
    head.replaceChildren(
      el("div", {class: "where"}, "position ", el("b", {}, String(position)), ` of ${one.start.length}`),
      el("button", {type: "button", class: "pin", "aria-pressed": String(pinned), onclick: () => set({pinned: !pinned}),
        title: "Keep this position while the pointer moves"}, pinned ? "pinned" : "pin"),
      el("div", {class: "final"}, "final token ", tokenEl(one.committed[position], "boxed")));
  }

  function drawVerdict() {
    const one = block();
    const {position, step} = state;
    if (step === 0) {
      verdict.replaceChildren("Step 0: a token drawn uniformly at random, ", tokenEl(one.start[position], "boxed"),
        `. H = ln V = ${number(view.report.model.max_entropy)} nats.`);
      return;
    }
    const words = acceptedAt(one, step, position) ? "accepted"
      : droppedAt(one, step, position) ? "un-accepted at this step, now random" : "not accepted, random";
    verdict.replaceChildren(`Step ${step}: the canvas holds `, tokenEl(report.canvasAt(one, step)[position], "boxed"),
      ` (${words}). H = ${number(entropyAt(one, step, position))} nats at τ = ${number(one.temperature[step - 1])}.`);
  }

  function drawCandidates() {
    const one = block();
    const {position, step} = state;
    if (!one.top_ids || step === 0) {
      const why = step === 0 ? "No candidates before the first step." : "The record kept no candidates (top_k = 0).";
      candidates.replaceChildren(el("tbody", {}, el("tr", {}, el("td", {class: "nothing"}, why))));
      return;
    }
    const ids = one.top_ids[step - 1][position];
    const probs = one.top_probs[step - 1][position];
    const rest = Math.max(0, 1 - probs.reduce((sum, p) => sum + p, 0));
    const row = (name, p, css, notes) => el("tr", {class: css}, el("th", {scope: "row"}, name),
      el("td", {class: "meter"}, el("span", {style: {width: `${100 * p}%`}})),
      el("td", {class: "p"}, percent(p)), el("td", {class: "note"}, notes));
    candidates.replaceChildren(
      el("caption", {}, `most likely tokens at step ${step}`),
      el("colgroup", {}, ["c-token", "c-meter", "c-p", "c-note"].map((name) => el("col", {class: name}))),
      el("thead", {class: "visually-hidden"}, el("tr", {}, ["token", "bar", "probability", "notes"].map((n) => el("th", {scope: "col"}, n)))),
      el("tbody", {}, ids.map((id, i) => row(tokenEl(id), probs[i], id === one.committed[position] ? "is-final" : "",
        [id === one.committed[position] && "final",
          acceptedAt(one, step, position) && id === one.tokens[step - 1][position] && "drawn"].filter(Boolean).join(", "))),
      row("all others", rest, "rest", "")));
  }

  // Probability of a token at a position, or null where it was not among the recorded candidates.
  function probabilityOf(one, position, id, step) {
    const at = one.top_ids[step - 1][position].indexOf(id);
    return at < 0 ? null : one.top_probs[step - 1][position][at];
  }

  const WIDTH = 300, HEIGHT = 46, PAD = 5;
  function spark(label, heights, reading, ticks) {
    const one = block();
    const n = one.num_steps;
    const x = (step) => PAD + ((WIDTH - 2 * PAD) * (step - 0.5)) / n;
    const y = (u) => HEIGHT - 3 - (HEIGHT - 8) * u;
    const runs = [];
    heights.forEach((u, i) => {
      if (u == null) return;
      if (i === 0 || heights[i - 1] == null) runs.push([]);
      runs.at(-1).push([x(i + 1), y(u)]);
    });
    const picture = svg("svg", {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "spark", role: "img", "aria-label": `${label}: ${reading}`,
      onclick: (event) => {
        const box = picture.getBoundingClientRect();
        const u = ((event.clientX - box.left) / box.width * WIDTH - PAD) / (WIDTH - 2 * PAD);
        set({step: report.clamp(Math.floor(u * n) + 1, 1, n)});
      }},
      svg("line", {class: "base", x1: 0, x2: WIDTH, y1: y(0), y2: y(0)}),
      state.step ? svg("line", {class: "now", x1: x(state.step), x2: x(state.step), y1: 0, y2: HEIGHT}) : null,
      runs.map((points) => (points.length > 1
        ? svg("polyline", {class: "line", points: points.map((p) => p.map((v) => v.toFixed(1)).join(",")).join(" ")})
        : svg("circle", {class: "dot", cx: points[0][0], cy: points[0][1], r: 1.8}))),
      ticks.map((step) => svg("rect", {class: "tick", x: x(step) - Math.max(1, 110 / n) , y: HEIGHT - 3, width: Math.max(2, 220 / n), height: 3})),
      state.step && heights[state.step - 1] != null
        ? svg("circle", {class: "dot", cx: x(state.step), cy: y(heights[state.step - 1]), r: 3.2}) : null);
    return el("figure", {}, el("figcaption", {}, label, el("b", {}, reading)), picture);
  }

  function drawSparks() {
    const one = block();
    const {position, step} = state;
    const steps = Array.from({length: one.num_steps}, (_, i) => i + 1);
    const accepted = steps.filter((t) => acceptedAt(one, t, position));
    const figures = [spark("entropy (log scale), accepted below", steps.map((t) => report.entropyFraction(entropyAt(one, t, position))),
      `${number(entropyAt(one, step, position))} nats`, accepted)];
    if (one.top_ids) {
      const final = one.committed[position];
      const p = steps.map((t) => probabilityOf(one, position, final, t));
      figures.push(spark("probability of the final token", p,
        step === 0 ? "–" : p[step - 1] == null ? "not in the top" : percent(p[step - 1]), []));
    }
    lines.replaceChildren(...figures);
  }

  function drawHistory() {
    const one = block();
    const {position} = state;
    const row = (step) => {
      const argmax = step ? one.argmax[step - 1][position] : null;
      const marks = [droppedAt(one, step, position) && "un-accepted", step === one.settled[position] && "settles",
        step === one.first_accepted[position] && "first accepted"].filter(Boolean).join(", ");
      const accepted = acceptedAt(one, step, position);
      return el("tr", {"data-step": step, class: accepted ? "accepted" : "", onclick: () => set({step})},
        el("th", {scope: "row"}, el("button", {type: "button", "aria-label": `go to step ${step}`}, String(step))),
        el("td", {}, tokenEl(report.canvasAt(one, step)[position], accepted ? "" : "faint")),
        el("td", {}, argmax == null ? "–" : tokenEl(argmax, argmax === one.argmax.at(-1)[position] ? "strong" : "")),
        el("td", {class: "p"}, el("span", {class: "swatch", style: {background: report.entropyColour(entropyAt(one, step, position))}}),
          number(entropyAt(one, step, position))),
        el("td", {class: "note"}, marks));
    };
    history.replaceChildren(
      el("thead", {}, el("tr", {}, ["step", "canvas", "argmax", "H", ""].map((name) => el("th", {scope: "col"}, name)))),
      el("tbody", {}, Array.from({length: one.num_steps + 1}, (_, step) => row(step))));
  }

  function markHistory() {
    for (const row of history.querySelectorAll("tr[data-step]")) {
      const here = Number(row.dataset.step) === state.step;
      row.classList.toggle("here", here);
      if (here) row.setAttribute("aria-current", "step");
      else row.removeAttribute("aria-current");
    }
    cancelAnimationFrame(scrolling);
    scrolling = requestAnimationFrame(reveal);
  }

  // Once a frame, because reading a place lays the page out; scrollIntoView would move the page as well.
  let scrolling = 0;
  function reveal() {
    const row = history.querySelector("tr.here");
    if (!row) return;
    const below = row.offsetTop + row.offsetHeight - scroller.clientHeight;
    const above = row.offsetTop - history.tHead.offsetHeight;
    if (scroller.scrollTop < below) scroller.scrollTop = below + 4;
    else if (scroller.scrollTop > above) scroller.scrollTop = above - 4;
  }

  view.on((now, before) => {
    const moved = !before || ["block", "position", "theme"].some((key) => now[key] !== before[key]);
    if (moved || now.pinned !== before.pinned) drawHead();
    if (moved) drawHistory();
    drawVerdict();
    drawCandidates();
    drawSparks();
    markHistory();
  });
});
