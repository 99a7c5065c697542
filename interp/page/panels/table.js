"use strict";

// The numbers behind the figures: for screen readers, for copying, for those who distrust pictures.
report.panel("table", (element, view) => {
  const {set, el, block, number, tokenEl} = report;
  const positions = el("table", {class: "numbers"});
  const steps = el("table", {class: "numbers"});
  const fold = (title, table) => el("details", {}, el("summary", {}, title),
    el("div", {class: "scroller wide", tabindex: 0, role: "region", "aria-label": title}, table));
  const foldPositions = fold("Positions: final token, when it settled and was accepted", positions);
  const foldSteps = fold("Steps: entropy, acceptance, temperature", steps);
  element.append(foldPositions, foldSteps);

  const head = (names) => el("thead", {}, el("tr", {}, names.map((name) => el("th", {scope: "col"}, name))));
  const go = (change, text) => el("button", {type: "button", class: "link", onclick: () => set(change)}, text);

  function fillPositions(one) {
    positions.replaceChildren(
      head(["position", "final token", "settled at step", "first accepted at step", "un-accepts", "entropy at first acceptance", "entropy at the end", "part"]),
      el("tbody", {}, one.committed.map((id, i) => el("tr", {},
        el("th", {scope: "row"}, go({position: i, pinned: true}, String(i))),
        el("td", {}, tokenEl(id)),
        el("td", {}, go({position: i, step: one.settled[i], pinned: true}, String(one.settled[i]))),
        el("td", {}, one.first_accepted[i] == null ? "never"
          : go({position: i, step: one.first_accepted[i], pinned: true}, String(one.first_accepted[i]))),
        el("td", {}, String(one.unaccepts[i])),
        el("td", {}, number(one.entropy_at_commit[i])),
        el("td", {}, number(one.entropy_at_end[i])),
        el("td", {}, i < one.answer_length ? "answer" : "after the end")))));
  }

  function fillSteps(one) {
    steps.replaceChildren(
      head(["step", "temperature", "mean entropy", "accepted", "newly accepted", "un-accepted", "argmax changed", "argmax already final"]),
      el("tbody", {}, one.temperature.map((temperature, i) => el("tr", {},
        el("th", {scope: "row"}, go({step: i + 1}, String(i + 1))),
        [number(temperature), number(one.mean_entropy[i]), one.accepted_count[i], one.newly_accepted[i], one.unaccepted[i],
          one.argmax_changed[i] ?? "–", one.argmax_final[i]].map((value) => el("td", {}, String(value)))))));
  }

  // Filled when first opened: a long block has many rows.
  function fill() {
    if (foldPositions.open) fillPositions(block());
    if (foldSteps.open) fillSteps(block());
  }
  foldPositions.addEventListener("toggle", fill);
  foldSteps.addEventListener("toggle", fill);
  view.on((now, before) => { if (!before || now.block !== before.block) fill(); });
});
