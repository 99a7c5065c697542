"use strict";

// Which words of the prompt drove the answer: the prompt in colour, a table of the same numbers, a map over steps.
report.panel("saliency", (element, view) => {
  const {state, el, number} = report;
  const found = view.data;
  if (!found) {
    element.append(el("p", {class: "caption"},
      "Not made: the run cannot be made once more, or the model is large and no target was asked for."));
    return;
  }
  const most = Math.max(1e-9, ...found.scores.flat().map(Math.abs));
  const SHOWN = 10;  // rows of the table

  element.append(el("p", {class: "caption"},
    "How much each part of the prompt drove ", found.target === "the answer" ? "the answer" : el("b", {}, `“${found.target}”`),
    ": what log p of it gains, in nats, when the part comes on in place of random words, averaged over the orders in which parts come on. " +
    "Orange with a solid line raises it, blue with a dashed line lowers it. At later steps the draft already carries part of the prompt."));
  const readout = el("p", {class: "map-readout", "aria-live": "polite"});
  const prompt = el("p", {class: "saliency-text", dir: "auto"});
  const table = el("table", {class: "numbers"});
  const heat = el("div", {class: "saliency-map", role: "img"});
  const axis = el("div", {class: "axis", "aria-hidden": "true"});
  const names = el("div", {class: "names tokens", "aria-hidden": "true"});
  element.append(readout, prompt, table,
    el("figure", {class: "map"}, el("figcaption", {}, el("b", {}, "By step")), el("div", {class: "with-axis"}, axis, heat)), names);

  // Steps may be thinned out: the last one read that is not later.
  const index = () => Math.max(0, found.steps.findLastIndex((step) => step <= Math.max(1, state.step)));
  const signed = (score) => `${score > 0 ? "+" : score < 0 ? "−" : ""}${number(Math.abs(score))}`;
  const effect = (score) => (score > 0 ? "raises" : score < 0 ? "lowers" : "nothing");
  const shade = (score) => `color-mix(in oklab, var(${score < 0 ? "--accepted" : "--dropped"}) ${(75 * Math.abs(score) / most).toFixed(1)}%, transparent)`;

  function tell() {
    const i = index(), scores = found.scores[i], errors = found.stderr[i];
    readout.textContent = `Step ${found.steps[i]}: log p ${signed(found.on[i])} with the whole prompt, ${signed(found.off[i])} with none of it.`;
    prompt.replaceChildren(...found.prompt_ids.flatMap((id, at) => {
      const unit = found.token_units[at], score = unit < 0 ? 0 : scores[unit];
      const strong = Math.abs(score) > 0.05 * most;
      return [el("span", {class: unit < 0 ? "outside" : strong ? effect(score) : "", title: unit < 0 ? null : signed(score), style: {background: shade(score)}},
        report.tokenEl(id)), " "];
    }));
    const order = scores.map((_, unit) => unit).sort((a, b) => Math.abs(scores[b]) - Math.abs(scores[a])).slice(0, SHOWN);
    const row = (head, cells) => el("tr", {}, cells.map((cell, c) => el(head || !c ? "th" : "td", {scope: head ? "col" : c ? null : "row"}, cell)));
    table.replaceChildren(el("thead", {}, row(true, ["part, at token", "nats", "standard error", "effect"])),
      el("tbody", {}, order.map((unit) => row(false, [[el("bdi", {class: "token boxed"}, found.units[unit]), ` @${found.places[unit]}`], signed(scores[unit]),
        errors[unit] == null ? "–" : number(errors[unit], 3), effect(scores[unit])]))));
  }

  const count = found.units.length, rows = found.steps.length;
  heat.setAttribute("aria-label", `Effect of ${count} parts of the prompt at ${rows} steps; the table holds the numbers of each step.`);
  heat.style.setProperty("grid-template-columns", `repeat(${count}, 1fr)`);
  heat.append(...found.scores.flatMap((scores, i) => scores.map((score, unit) =>
    el("span", {style: {background: shade(score)}, title: `step ${found.steps[i]}, ${found.units[unit]}: ${signed(score)}`}, score < -0.05 * most ? "−" : ""))));
  axis.append(...found.steps.map((step, i) => el("span", {style: {top: `${(100 * (i + 0.5)) / rows}%`}}, String(step))));
  names.append(...found.units.map((unit, i) => el("span", {style: {left: `${(100 * (i + 0.5)) / count}%`}}, unit)));
  view.on(tell);
});
