"use strict";

// When each position was first accepted, and when its most likely token last changed.
report.panel("commit-order", (element, view) => {
  const {state, set, el, svg, block, clamp} = report;
  if (!view.data) {
    element.append(el("p", {class: "caption"}, "This page was made without the record that this figure needs."));
    return;
  }
  const [LEFT, RIGHT, HEIGHT] = [54, 10, 150];
  const root = el("div", {class: "curves order-plot"}), facts = el("div", {class: "orders"});
  const caption = el("p", {class: "caption"},
    "A dot: the step that first accepted the position. A dash: the step from which on its most likely token was the final one. " +
    "Pale: not content (the end token, padding). A line falling to the right is text written from left to right.");
  element.append(caption, root, facts);
  const said = {tau: "rank correlation with position, τ-b", control: "of blocks of 16 from left to right", "same call": "pairs accepted together",
    "out of order": "pairs in the other order", "tokens per call": "tokens a step", "given up": "times given up"};

  let here = null, now = null, x = null, y = null, each = 1;
  function lay() {
    const data = view.data.blocks[state.block], c = block().start.length, n = data.steps;
    const width = Math.max(260, root.clientWidth || 700);
    each = (width - LEFT - RIGHT) / c;
    x = (position) => LEFT + each * (position + 0.5);
    y = (step) => 8 + ((HEIGHT - 16) * (step - 0.5)) / n;
    here = svg("rect", {class: "here", y: 0, height: HEIGHT, width: Math.max(each, 2)});
    now = svg("line", {class: "now", x1: LEFT, x2: width - RIGHT});
    const rows = [...new Set([1, Math.ceil(n / 2), n])], every = Math.ceil(26 / each);
    const half = clamp(each * 0.4, 2, 9);
    root.replaceChildren(svg("svg", {width, height: HEIGHT + 18, viewBox: `0 0 ${width} ${HEIGHT + 18}`, role: "img",
      "aria-label": "step of the first acceptance against position; the numbers are in the tables"},
      here, rows.map((step) => [svg("line", {class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(step), y2: y(step)}),
        svg("text", {class: "tick", x: LEFT - 6, y: y(step) + 3.5, "text-anchor": "end"}, step === 1 ? "step 1" : String(step))]),
      now,
      data.lock.map((step, i) => svg("line", {class: data.content[i] ? "lock" : "lock after", x1: x(i) - half, x2: x(i) + half, y1: y(step), y2: y(step)})),
      data.commit.map((step, i) => (step == null ? null
        : svg("circle", {class: data.content[i] ? "mark" : "mark after", cx: x(i), cy: y(step), r: clamp(each * 0.28, 1.5, 5)}))),
      Array.from({length: c}, (_, i) => i).filter((i) => i % every === 0)
        .map((i) => svg("text", {class: "tick", x: x(i), y: HEIGHT + 12, "text-anchor": "middle"}, String(i))),
      svg("text", {class: "tick", x: 0, y: HEIGHT + 12}, "position")));
    facts.replaceChildren(...Object.entries(said).map(([name, text]) => el("span", {}, `${text} `, el("b", {}, data.measures[name] == null ? "–" : String(Number(data.measures[name].toFixed(3)))))));
    move();
  }
  function move() {
    here.setAttribute("x", x(state.position) - Math.max(each, 2) / 2);
    now.setAttribute("visibility", state.step ? "visible" : "hidden");
    if (state.step) for (const end of ["y1", "y2"]) now.setAttribute(end, y(state.step));
  }
  root.addEventListener("pointerdown", (event) => {
    const box = root.getBoundingClientRect();
    set({position: clamp(Math.floor((event.clientX - box.left - LEFT) / each), 0, block().start.length - 1), pinned: true});
  });
  view.on((after, before) => (!before || after.block !== before.block ? lay() : move()));
  report.onWidth(root, lay);
});
