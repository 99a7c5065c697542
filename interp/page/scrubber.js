"use strict";

// The bar that stays in view: which block, which step, and what happened at it.
report.scrubber = (element) => {
  const {data, state, set, el, block, number} = report;
  let timer = 0;

  const icon = (path) => report.svg("svg", {viewBox: "0 0 16 16", "aria-hidden": "true"}, report.svg("path", {d: path}));
  const icons = {play: "M4 2.5v11l9-5.5z", pause: "M4 2.5h3v11H4zm5 0h3v11H9z", back: "M11 3 5 8l6 5z", next: "M5 3l6 5-6 5z"};

  const play = el("button", {type: "button", class: "play", onclick: () => (timer ? stop() : run())});
  const back = el("button", {type: "button", "aria-label": "Previous step", onclick: () => go(state.step - 1)}, icon(icons.back));
  const next = el("button", {type: "button", "aria-label": "Next step", onclick: () => go(state.step + 1)}, icon(icons.next));
  const range = el("input", {type: "range", id: "step", min: 0, step: 1, "aria-label": "Denoising step",
    oninput: () => go(range.valueAsNumber)});
  const label = el("output", {class: "step-label", for: "step"});
  const readout = el("span", {class: "readout"});
  const spoken = el("span", {class: "visually-hidden", "aria-live": "polite"});
  const blocks = el("select", {"aria-label": "Block", onchange: () => { stop(); jump(blocks.selectedIndex); }},
    data.blocks.map((one, i) => el("option", {value: i}, `block ${i + 1} of ${data.blocks.length}`)));
  const theme = el("button", {type: "button", class: "theme", "aria-label": "Switch between light and dark",
    title: "light or dark", onclick: () => {
      document.documentElement.dataset.theme = state.theme === "dark" ? "light" : "dark";
      set({theme: report.readTheme()});
    }}, icon("M8 1a7 7 0 1 0 0 14A7 7 0 0 0 8 1zm0 2v10A5 5 0 0 1 8 3z"));

  element.append(el("div", {class: "page row"},
    data.blocks.length > 1 ? blocks : null,
    el("div", {class: "buttons"}, play, back, next), range, label, readout, spoken));
  document.querySelector("header.page").append(theme);

  function go(step) {
    stop();
    set({step});
  }
  function jump(index) {
    set({block: index, step: data.blocks[index].num_steps});
  }
  function run() {
    if (state.step >= block().num_steps) set({step: 0});
    const pace = report.clamp(7000 / block().num_steps, 140, 650);
    timer = setInterval(() => {
      set({step: state.step + 1});
      if (state.step >= block().num_steps) stop();
    }, pace);
    showPlay();
  }
  function stop() {
    clearInterval(timer);
    timer = 0;
    showPlay();
  }
  function showPlay() {
    play.replaceChildren(icon(timer ? icons.pause : icons.play));
    play.setAttribute("aria-label", timer ? "Pause" : "Play the steps");
  }

  // What happened at a step, in words.
  function account(one, step) {
    if (step === 0) return "the random start";
    const i = step - 1;
    const moves = [one.newly_accepted[i] ? `+${one.newly_accepted[i]}` : "", one.unaccepted[i] ? `−${one.unaccepted[i]}` : ""];
    const change = moves.filter(Boolean).join(" ");
    return `τ ${number(one.temperature[i])} · mean entropy ${number(one.mean_entropy[i])} nats · ` +
      `${one.accepted_count[i]} of ${one.start.length} accepted${change ? ` (${change})` : ""}`;
  }

  function tokenAt(one, {step, position}) {
    const status = report.acceptedAt(one, step, position) ? "accepted" : "not accepted";
    return `${report.tokenOf(report.canvasAt(one, step)[position])}, ${status}, entropy ${number(report.entropyAt(one, step, position))}`;
  }

  report.on((now, before) => {
    const one = block();
    blocks.selectedIndex = now.block;
    range.max = one.num_steps;
    range.valueAsNumber = now.step;
    range.style.setProperty("--done", `${(100 * now.step) / one.num_steps}%`);
    range.setAttribute("aria-valuetext", `step ${now.step} of ${one.num_steps}`);
    label.replaceChildren("step ", el("b", {}, String(now.step)), ` / ${one.num_steps}`);
    readout.textContent = account(one, now.step);
    back.disabled = now.step === 0;
    next.disabled = now.step === one.num_steps;
    const stepped = before && (before.step !== now.step || before.block !== now.block);
    const moved = before && before.position !== now.position && document.activeElement?.dataset.map;
    if (stepped && !timer) spoken.textContent = `step ${now.step} of ${one.num_steps}: ${account(one, now.step)}`;
    else if (moved) spoken.textContent = `position ${now.position}: ${tokenAt(one, now)}`;
  });
  showPlay();

  // Keys that work wherever the focus is, unless the element in focus has a use for them.
  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest("input, select, textarea, summary, button, a, [data-keys]")) {
      if (event.target !== range || event.key !== " ") return;
    }
    const moves = {
      ArrowLeft: () => go(state.step - 1), ArrowRight: () => go(state.step + 1), Home: () => go(0),
      End: () => go(block().num_steps), " ": () => play.click(), Escape: () => set({pinned: false}),
    };
    if (moves[event.key]) {
      moves[event.key]();
      event.preventDefault();
    }
  });

  // The same keys for every figure over steps and positions.
  report.gridKeys = (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const moves = {
      ArrowLeft: () => set({position: state.position - 1}), ArrowRight: () => set({position: state.position + 1}),
      ArrowUp: () => go(state.step - 1), ArrowDown: () => go(state.step + 1),
      Home: () => set({position: 0}), End: () => set({position: block().start.length - 1}),
      Enter: () => set({pinned: !state.pinned}), " ": () => play.click(), Escape: () => set({pinned: false}),
    };
    if (moves[event.key]) {
      moves[event.key]();
      event.preventDefault();
    }
  };
};
