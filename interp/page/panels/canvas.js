"use strict";

// The tokens of one block in reading order, as they stand after the chosen step.
report.panel("canvas", (element, view) => {
  const {state, set, el, block, number, tokenOf, isSpecial, entropyAt, acceptedAt, droppedAt} = report;
  let chips = [];

  const choice = (value, text, title) => el("label", {title},
    el("input", {type: "radio", name: "shown", value, onchange: () => set({shown: value})}), el("span", {}, text));
  const toggle = el("div", {class: "segmented", role: "radiogroup", "aria-label": "What to show"},
    choice("canvas", "canvas", "the tokens that the next step reads: samples where accepted, random elsewhere"),
    choice("argmax", "argmax", "the most likely token at every position"));
  const caption = el("p", {class: "caption"});
  const board = el("div", {class: "board", role: "group", "data-keys": true, "aria-label": "Canvas tokens in reading order"});

  const mark = (css, text) => el("span", {class: "entry"},
    el("span", {class: `chip sample ${css}`, "aria-hidden": "true"}, el("bdi", {class: "token"}, "abc")), text);
  const legend = el("div", {class: "legend"},
    report.legendBar(report.entropyTicks, "entropy H, nats (more ink: less certain)"),
    el("div", {class: "entries"}, mark("accepted", "accepted"), mark("dropped", "un-accepted at this step"),
      mark("accepted changed", "differs from the step before"), mark("noise", "random token, drawn anew at every step"),
      mark("past", "after the end token")));

  element.append(el("div", {class: "bar-top"}, caption, toggle), board, legend);

  // A chip is as wide as the tokens that ever counted at its position, so that nothing jumps about
  // while the steps go by; random tokens are cut off where they are longer.
  function widthOf(one, position) {
    const lengths = [tokenOf(one.committed[position]).length];
    one.tokens.forEach((row, i) => { if (one.accepted[i][position]) lengths.push(tokenOf(row[position]).length); });
    return report.clamp(Math.max(...lengths), 3, 16);
  }

  function lay() {
    const one = block();
    const parts = [];
    chips = one.start.map((_, position) => {
      const chip = el("button", {type: "button", class: "chip", tabindex: -1, "data-position": position,
        style: {"--width": `${widthOf(one, position)}ch`}});
      parts.push(chip);
      if (position + 1 === one.answer_length && position + 1 < one.start.length) {
        parts.push(el("span", {class: "end-mark", title: "the answer ends here"}));
      }
      // Line breaks of the finished text break the line here too.
      if (/(\\n|\n)$/.test(tokenOf(one.committed[position]))) parts.push(el("span", {class: "break"}));
      return chip;
    });
    board.replaceChildren(...parts);
  }

  function tokenShown(one, step, position) {
    if (state.shown === "argmax" && step > 0) return one.argmax[step - 1][position];
    return report.canvasAt(one, step)[position];
  }

  function paint(chip, position) {
    const one = block();
    const {step, shown} = state;
    const id = tokenShown(one, step, position);
    const accepted = acceptedAt(one, step, position);
    const dropped = droppedAt(one, step, position);
    const noise = step === 0 || (shown === "canvas" && !accepted);
    const changed = !noise && step > (shown === "argmax" ? 1 : 0) && tokenShown(one, step - 1, position) !== id;
    const past = position >= one.answer_length;
    const entropy = entropyAt(one, step, position);
    const u = report.entropyFraction(entropy);
    if (Number(chip.dataset.id) !== id) {
      chip.dataset.id = id;
      chip.replaceChildren(report.tokenEl(id));
    }
    chip.style.setProperty("--fill", report.ramp(u));
    chip.style.setProperty("--ink-chip", report.inkOn(u));
    const flags = {accepted, dropped, noise, changed, past, special: isSpecial(id)};
    for (const [name, yes] of Object.entries(flags)) chip.classList.toggle(name, yes);
    const words = [accepted && "accepted", dropped && "un-accepted at this step", noise && "random token",
      changed && "changed", past && "after the end"].filter(Boolean);
    chip.setAttribute("aria-label", `position ${position}: ${tokenOf(id)}, entropy ${number(entropy)}` +
      (words.length ? `, ${words.join(", ")}` : ""));
  }

  function describe() {
    const one = block();
    const {step, shown} = state;
    if (step === 0) return "Step 0: every token is drawn uniformly at random. Nothing has been predicted yet.";
    if (shown === "argmax") return "The most likely token at every position, whether accepted or not.";
    if (step < one.num_steps) return "What the next step reads: samples where accepted, random tokens elsewhere.";
    const open = one.start.length - one.accepted_count[step - 1];
    return `The block ended here: ${one.stop_sentence}. ` + (open && view.report.sampler.commit === "argmax"
      ? `${report.plural(open, "position")} not accepted; the answer takes the argmax everywhere.` : "");
  }

  function choose(position) {
    const same = state.pinned && state.position === position;
    set({position, pinned: !same});
  }
  const chipOf = (event) => event.target.closest("[data-position]");
  board.addEventListener("click", (event) => { if (chipOf(event)) choose(Number(chipOf(event).dataset.position)); });
  board.addEventListener("pointerover", (event) => {
    if (event.pointerType === "mouse" && chipOf(event) && !state.pinned) set({position: Number(chipOf(event).dataset.position)});
  });
  board.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") return;  // these click the chip
    report.gridKeys(event);
    if (event.defaultPrevented) chips[state.position].focus();
  });

  view.on((now, before) => {
    const laid = !before || now.block !== before.block;
    if (laid) lay();
    const repaint = laid || ["step", "shown", "theme"].some((key) => now[key] !== before[key]);
    if (repaint) chips.forEach(paint);
    if (repaint) caption.textContent = describe();
    chips.forEach((chip, position) => {
      const here = position === now.position;
      if (!here && !laid && position !== before.position) return;
      chip.tabIndex = here ? 0 : -1;
      chip.classList.toggle("here", here);
      chip.classList.toggle("pinned", here && now.pinned);
      chip.setAttribute("aria-pressed", String(here && now.pinned));
    });
    for (const input of toggle.querySelectorAll("input")) input.checked = input.value === now.shown;
  });
});
