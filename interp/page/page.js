"use strict";

// The core of the page: the data, the state that all panels share, and helpers to draw with.
// Text only ever enters the page through `el` and `svg`, as text nodes.
const report = (() => {
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const registered = new Map();
  const listeners = [];
  let started = false;

  const darkScheme = matchMedia("(prefers-color-scheme: dark)");

  // block: index into data.blocks; step: 0 (random start) to num_steps; shown: "canvas" or "argmax".
  const state = {block: 0, step: 0, position: 0, pinned: false, shown: "canvas", theme: "light"};

  const block = () => data.blocks[state.block];
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

  function set(changes) {
    const before = {...state};
    Object.assign(state, changes);
    state.block = clamp(state.block, 0, data.blocks.length - 1);
    state.step = clamp(state.step, 0, block().num_steps);
    state.position = clamp(state.position, 0, block().start.length - 1);
    if (started && Object.keys(state).some((key) => state[key] !== before[key])) {
      for (const listener of listeners) listener(state, before);
    }
  }

  function on(listener) {
    listeners.push(listener);
    listener(state, null);
  }

  function panel(name, draw) {
    registered.set(name, draw);
  }

  // ---- elements -------------------------------------------------------------------------------

  function build(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes ?? {})) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (name === "style") for (const [key, one] of Object.entries(value)) node.style.setProperty(key, one);
      else if (value === true) node.setAttribute(name, "");
      else if (value !== false && value != null) node.setAttribute(name, value);
    }
    node.append(...children.flat(Infinity).filter((child) => child != null));
    return node;
  }

  const el = (tag, attributes, ...children) => build(document.createElement(tag), attributes, children);
  const svg = (tag, attributes, ...children) =>
    build(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

  // A token as an inline element that keeps its own writing direction; the word marker is faint.
  function tokenEl(id, css = "") {
    const special = isSpecial(id) ? " special" : "";
    const parts = tokenOf(id).split(/(▁+)/).filter(Boolean);
    return el("bdi", {class: `token ${css}${special}`},
      parts.map((part) => (part[0] === "▁" ? el("span", {class: "space"}, part) : part)));
  }

  // ---- tokens and numbers ---------------------------------------------------------------------

  const specials = new Set(data.special_ids);
  const tokenOf = (id) => data.vocabulary[id] ?? `#${id}`;
  const isSpecial = (id) => specials.has(id);

  // What the canvas holds after a step; step 0 is the random start.
  const canvasAt = (one, step) => (step ? one.tokens[step - 1] : one.start);
  const acceptedAt = (one, step, position) => step > 0 && one.accepted[step - 1][position] === 1;
  const droppedAt = (one, step, position) =>
    step > 1 && acceptedAt(one, step - 1, position) && !acceptedAt(one, step, position);
  // Nothing is predicted at step 0: the canvas is drawn from the uniform distribution.
  const entropyAt = (one, step, position) =>
    step ? one.entropy[step - 1][position] : data.model.max_entropy;

  function number(value, digits = 2) {
    if (value == null) return "–";
    if (value === 0) return "0";
    if (Math.abs(value) < 0.00095) return value < 1e-5 ? "<0.00001" : value.toFixed(5);
    return Math.abs(value) < 0.1 ? value.toFixed(3) : value.toFixed(digits);
  }
  const percent = (p) => (p >= 0.9995 ? "100%" : p < 0.001 ? "<0.1%" : `${(100 * p).toFixed(p < 0.0995 ? 1 : 0)}%`);
  const plural = (count, one, many = `${one}s`) => `${count} ${count === 1 ? one : many}`;

  // ---- colour ---------------------------------------------------------------------------------

  // More ink is more uncertainty: lightness leaves the paper's at 0 and moves monotonically to the
  // other end at 1, so the order survives any colour blindness and a grey print. Hue only helps.
  function rampParts(u) {
    const bell = Math.sin(Math.PI * Math.min(1, 0.12 + 0.76 * u));
    return state.theme === "dark"
      ? [0.235 + 0.665 * u, (0.012 + 0.135 * u) * (0.55 + 0.45 * bell), 285 - 190 * Math.pow(u, 0.9)]
      : [0.985 - 0.6 * u, 0.012 + 0.135 * Math.pow(u, 0.8) * (0.7 + 0.3 * bell), 105 + 178 * Math.pow(u, 0.75)];
  }
  const tables = {};
  function ramp(u) {
    tables[state.theme] ??= Array.from({length: 256}, (_, i) => {
      const [l, c, h] = rampParts(i / 255);
      return `oklch(${l.toFixed(4)} ${c.toFixed(4)} ${h.toFixed(1)})`;
    });
    return tables[state.theme][Math.round(255 * clamp(u, 0, 1))];
  }
  const inkOn = (u) => (rampParts(clamp(u, 0, 1))[0] > 0.64 ? "oklch(0.2 0.02 270)" : "oklch(0.985 0.005 270)");

  // Entropies span 0.001 to ln V; this scale is linear below 0.01 nats and logarithmic above.
  const KNEE = 0.01;
  const entropyFraction = (nats) => Math.log1p(nats / KNEE) / Math.log1p(data.model.max_entropy / KNEE);
  const entropyColour = (nats) => ramp(entropyFraction(nats));
  const entropyTicks = [0, 0.01, 0.1, 1, data.model.max_entropy].filter((tick, i, all) =>
    i === all.length - 1 || tick < 0.6 * data.model.max_entropy).map((tick) =>
    [entropyFraction(tick), String(Number(tick.toFixed(2)))]);

  // A colour of the style sheet, resolved for drawing on a canvas element.
  const cssColour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // A horizontal scale: a bar of the ramp with ticks below.
  function legendBar(ticks, label, width = 230) {
    const bar = el("canvas", {width: 256, height: 1, class: "bar"});
    const paint = () => {
      const pen = bar.getContext("2d");
      for (let i = 0; i < 256; i++) {
        pen.fillStyle = ramp(i / 255);
        pen.fillRect(i, 0, 1, 1);
      }
    };
    on((now, before) => { if (!before || now.theme !== before.theme) paint(); });
    const marks = ticks.map(([u, text]) => el("span", {style: {left: `${100 * u}%`}}, text));
    return el("div", {class: "scale"}, el("span", {class: "label"}, label),
      el("div", {class: "barbox", style: {width: `${width}px`}}, bar, el("div", {class: "ticks"}, marks)));
  }

  // A chart over the steps of the block, which follows the state and moves it. `make()` gives what to draw of the block:
  // {title, names, height, low, high, ticks, draw(x, y, thick), tell(i)}; x takes steps from 1, tell entries from 0.
  function stepChart(element, make) {
    const [LEFT, RIGHT, TOP] = [54, 10, 6];
    const root = el("div", {class: "curves"});
    element.append(root);
    let chart = null, reading = null, now = null, x = null;
    function move() {
      now.setAttribute("visibility", state.step ? "visible" : "hidden");
      if (state.step) for (const end of ["x1", "x2"]) now.setAttribute(end, x(state.step));
      reading.textContent = state.step ? chart.tell(state.step - 1) : "–";
    }
    function lay() {
      chart = make();
      const {height, low, high} = chart, n = block().num_steps, width = Math.max(260, root.clientWidth || 700);
      const span = width - LEFT - RIGHT, every = Math.ceil((n * 26) / span);
      x = (step) => LEFT + (span * (step - 0.5)) / n;
      const y = (value) => TOP + (height - TOP - 4) * (1 - (value - low) / (high - low || 1));
      now = svg("line", {class: "now", y1: 0, y2: height});
      reading = el("b", {});
      const numbered = Array.from({length: n}, (_, i) => i + 1).filter((t) => t === 1 || (t % every === 0 && n - t >= every) || t === n);
      const picture = svg("svg", {width, height: height + 18, viewBox: `0 0 ${width} ${height + 18}`, role: "img",
        "aria-label": `${chart.title}, for each of ${n} steps`},
        chart.ticks.map(([value, text]) => [svg("line", {class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value)}),
          svg("text", {class: "tick", x: LEFT - 6, y: y(value) + 3.5, "text-anchor": "end"}, text)]),
        chart.draw(x, y, Math.max(2, (span / n) * 0.62), [LEFT, width - RIGHT]), now,
        svg("text", {class: "tick", x: 0, y: height + 12}, "step"),
        numbered.map((t) => svg("text", {class: "tick", x: x(t), y: height + 12, "text-anchor": "middle"}, String(t))));
      root.replaceChildren(el("figure", {class: "chart"},
        el("figcaption", {}, el("span", {}, chart.title), chart.names ?? [], reading), picture));
      move();
    }
    const go = (event) => {
      const box = root.getBoundingClientRect();
      set({step: clamp(Math.floor(((event.clientX - box.left - LEFT) / (box.width - LEFT - RIGHT)) * block().num_steps) + 1, 1, block().num_steps)});
    };
    root.addEventListener("pointerdown", go);
    root.addEventListener("pointermove", (event) => { if (event.buttons & 1) go(event); });
    on((after, before) => (!before || after.block !== before.block ? lay() : move()));
    onWidth(root, lay);
  }

  // Called with the first width and with every other one: a figure is laid out in pixels.
  function onWidth(element, lay) {
    let width = 0;
    new ResizeObserver(() => {
      if (element.clientWidth !== width) {
        width = element.clientWidth;
        lay();
      }
    }).observe(element);
  }

  // ---- start ----------------------------------------------------------------------------------

  function readTheme() {
    const chosen = document.documentElement.dataset.theme;
    return chosen || (darkScheme.matches ? "dark" : "light");
  }

  // The view is kept in the address, so that a link leads to this very step and position.
  const addressable = ["file:", "http:", "https:"].includes(location.protocol);
  function readAddress() {
    const asked = new URLSearchParams(addressable ? location.hash.slice(1) : "");
    const whole = (name) => (/^\d{1,9}$/.test(asked.get(name) ?? "") ? Number(asked.get(name)) : null);
    const found = {};
    if (whole("block") !== null) found.block = whole("block") - 1;
    if (whole("step") !== null) found.step = whole("step");
    if (whole("position") !== null) Object.assign(found, {position: whole("position"), pinned: true});
    if (asked.get("show") === "argmax") found.shown = "argmax";
    return found;
  }
  let pending = 0;
  function writeAddress() {
    clearTimeout(pending);
    pending = setTimeout(() => {
      const parts = [`block=${state.block + 1}`, `step=${state.step}`];
      if (state.pinned) parts.push(`position=${state.position}`);
      if (state.shown === "argmax") parts.push("show=argmax");
      history.replaceState(null, "", `#${parts.join("&")}`);
    }, 300);
  }

  function start() {
    if (!data.blocks.length) {
      document.getElementById("panels").append(el("p", {class: "notice"}, "No block was run."));
      return;
    }
    state.theme = readTheme();
    set({step: data.blocks[0].num_steps, ...readAddress()});
    started = true;
    darkScheme.addEventListener("change", () => set({theme: readTheme()}));
    if (addressable) {
      addEventListener("hashchange", () => set(readAddress()));
      on((now, before) => { if (before) writeAddress(); });
    }
    api.scrubber(document.getElementById("scrubber"));
    for (const one of data.panels) {
      const body = el("div", {class: "body"});
      const section = el("section", {class: "panel", id: `panel-${one.name}`, "aria-labelledby": `title-${one.name}`},
        el("h2", {id: `title-${one.name}`}, one.title), body);
      document.querySelector(`#panels .${one.place}`).append(section);
      try {
        registered.get(one.name)(body, {data: one.data, report: data, on, set, state});
      } catch (error) {  // one broken panel leaves the others alone
        body.replaceChildren(el("p", {class: "notice"}, `This panel failed: ${error.message}`));
        console.error(error);
      }
    }
    const versions = Object.entries(data.versions).map(([name, version]) => `${name} ${version}`);
    document.getElementById("colophon").textContent =
      `${data.schema} ${data.schema_version} · ${data.created} · ${versions.join(" · ")}`;
  }

  const api = {
    data, state, set, on, panel, start, block, clamp, el, svg, tokenEl, tokenOf, isSpecial, canvasAt,
    acceptedAt, droppedAt, entropyAt, number, percent, plural, ramp, inkOn, entropyFraction, entropyColour,
    entropyTicks, cssColour, legendBar, stepChart, onWidth, readTheme,
  };
  return api;
})();
