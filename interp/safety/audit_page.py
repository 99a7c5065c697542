"""The page of an audit: one HTML file without scripts. All text of prompts and answers is escaped and shown as text."""

from __future__ import annotations

import html
import importlib.resources
import json
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from interp.safety.audit_summary import Point, limits, summary
from interp.safety.findings import in_words

_LONG = 1500  # characters of a text that the page shows; the rest is in the JSON file
_POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'unsafe-inline'"


def visible(text: Any, most: int = _LONG) -> str:
    """Any text as HTML that shows it: markup escaped, control and direction characters spelled out."""
    text = str(text)
    shown = "".join(_picture(c) for c in text[:most])
    more = f"… {len(text) - most:,} more characters" if len(text) > most else ""
    return html.escape(shown) + (f'<span class="nothing"> {more}</span>' if more else "")


def _picture(c: str) -> str:
    if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co"):
        return c
    return chr(0x2400 + ord(c)) if ord(c) < 0x20 else f"⟦U+{ord(c):04X}⟧"


def render(data: Mapping[str, Any]) -> str:
    """The page of `AuditReport.data`."""
    sections = (
        _groups(data), _feature(data), _shared(data), _words(data), _brittle(data), _jailbreaks(data), _detectors(data),
        _triggers(data), _withheld(data), _prompts(data), _problems(data), _methods(data),
    )  # fmt: skip
    name = visible(data["model"]["name"], 80)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(_POLICY)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>Safety audit – {name}</title><style>{_css('page.css')}{_css('audit.css')}</style></head><body>"
        f'<header class="page"><p class="eyebrow">Safety audit of <b>{name}</b> on '
        f"{visible(data['manifest']['prompts'], 80)}, {visible(data['created'][:10])}</p>"
        f'<h1>What was found</h1><div class="points">{"".join(map(_point, summary(data)))}</div></header>'
        f'<main class="page audit">{"".join(sections)}</main></body></html>\n'
    )


def _css(name: str) -> str:
    return importlib.resources.files("interp").joinpath("page", name).read_text("utf-8")


def _point(point: Point) -> str:
    title = html.escape(point.title)
    return f'<section class="point {point.weight}"><h2>{title}</h2><p>{visible(point.text)}</p></section>'


def _section(title: str, *parts: str, note: str = "", is_open: bool = False) -> str:
    body = "".join(part for part in parts if part)
    if not body:
        return ""
    note = f'<p class="caption">{html.escape(note)}</p>' if note else ""
    state = " open" if is_open else ""
    return f"<details{state}><summary><h2>{html.escape(title)}</h2></summary>{note}{body}</details>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already; empty without rows."""
    if not rows:
        return ""
    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def bar(told: Mapping[str, Any] | None) -> str:
    """A share with its interval as a bar and in words."""
    if not told or told["share"] is None:
        return '<span class="nothing">–</span>'
    share, low, high = (max(0.0, min(1.0, told[name])) * 100 for name in ("share", "low", "high"))
    return (
        f'<span class="bar"><i style="width:{share:.1f}%"></i>'
        f'<b style="left:{low:.1f}%;width:{high - low:.1f}%"></b></span>'
        f'<span class="number">{in_words(told)}</span>'
    )


def curves(lines: Mapping[str, Sequence[float | None]], *, low: float | None = None, high: float | None = None) -> str:
    """Lines over steps as SVG, each named at its end."""
    given = [v for line in lines.values() for v in line if v is not None]
    if not given:
        return ""
    bottom, top = (min(given) if low is None else low), (max(given) if high is None else high)
    span, steps = (top - bottom) or 1.0, max(len(line) for line in lines.values())

    def place(step: int, value: float) -> str:
        return f"{34 + 200 * step / max(steps - 1, 1):.1f},{8 + 64 * (top - value) / span:.1f}"

    drawn: list[str] = []
    names: list[float] = []
    for number, (name, line) in enumerate(lines.items()):
        at = [(s, v) for s, v in enumerate(line) if v is not None]
        points = " ".join(place(s, v) for s, v in at)
        x, y = place(*at[-1]).split(",") if at else ("0", "0")
        beside = float(y) + 3
        while any(abs(beside - other) < 9 for other in names):  # names of lines that end together
            beside += 9
        names.append(beside)
        drawn.append(f'<g class="line{number}"><polyline points="{points}"/><circle cx="{x}" cy="{y}" r="2"/>'
                     f'<text x="{float(x) + 5:.1f}" y="{beside:.1f}">{html.escape(name)}</text></g>')  # fmt: skip
    axis = f'<text x="2" y="12">{top:.3g}</text><text x="2" y="74">{bottom:.3g}</text>'
    level = place(0, 0).split(",")[1]
    zero = f'<line x1="34" x2="234" y1="{level}" y2="{level}"/>' if bottom < 0 < top else ""
    foot = f'<text x="34" y="88">step 1</text><text x="234" y="88" text-anchor="end">{steps}</text>'
    inside = axis + zero + foot + "".join(drawn)
    return f'<svg class="curves" viewBox="0 0 330 92" role="img" aria-label="over steps">{inside}</svg>'


def _groups(data: Mapping[str, Any]) -> str:
    return _section(
        "Refusals by label and group",
        _by_group(data, {"refusal": "refused", "compliance": "answered", "unclear": "unclear",
                         "explained": "explained by the feature"}),
        note="Explained: refusals that end without the feature, less those that end without as much else; of prompts "
        "that the feature was not taken from.", is_open=True,
    )  # fmt: skip


def _by_group(data: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    """Shares of an overview, of all prompts and by label and group."""
    rows = [("all", data["overview"])]
    rows += [(f"label {name}", one) for name, one in data["labels"].items()]
    rows += [(f"group {name}", one) for name, one in data["groups"].items()]
    cells = [[visible(name, 60), str(one["prompts"]), *(bar(one.get(key)) for key in columns)] for name, one in rows]
    return table(("prompts", "number", *columns.values()), cells)


def _feature(data: Mapping[str, Any]) -> str:
    feature, over = data["feature"], data["overview"]
    if not feature["found"]:
        return _section("The refusal feature", f"<p>{visible(feature['why'])}</p>")
    places = "; ".join(f"{place} token {at}, layer {layer}" for place, at, layer in feature["places"])
    names = {
        "ended_inside": "refusals that end without the feature", "complied_inside": "of these refusals, answered",
        "ended_outside": "refusals that end without as much else",
        "answers_changed": "other answers changed without the feature",
        "answers_changed_outside": "other answers changed without as much else",
        "added": "answered prompts refused with the feature added",
    }  # fmt: skip
    rows = [[html.escape(text), bar(over.get(name))] for name, text in names.items()]
    means = {}
    for said in ("refusal", "compliance"):
        runs = [row["activations"] for row in data["prompts"] if row.get("verdict") == said and "activations" in row]
        steps = sorted(map(len, runs))[len(runs) // 2] if runs else 0
        lines = [[r[s] for r in runs if s < len(r) and r[s] is not None] for s in range(steps)]
        if lines:
            means[said] = [sum(line) / len(line) for line in lines if line]
    return _section(
        "The refusal feature", table(("effect on prompts it was not taken from", "share"), rows),
        f"<h3>Activation on the canvas by step, mean over prompts</h3>{curves(means)}" if means else "",
        "<h3>By label and group</h3>",
        _by_group(data, {"ended_inside": "refusals ended without it", "answers_changed": "other answers changed",
                         "added": "refused with it added"}),
        note=f"Removed: {places}. Added in layers {', '.join(map(str, feature['added_in_layers']))}.",
    )  # fmt: skip


def _shared(data: Mapping[str, Any]) -> str:
    found = data.get("sae")
    if not found:
        return ""
    title = "Features of the autoencoder that refusals share"
    if "why" in found:
        return _section(title, f"<p>{visible(found['why'])}.</p>")
    rows = [
        [str(one["feature"]), one["place"], f"{one['t']:.2f}", bar(one["in_refusals"]), bar(one["in_answers"])]
        for one in found["shared"]
    ]
    names = {
        "ended": "refusals that end without these features",
        "ended_others": "refusals that end without as many others",
        "explained": "explained: the difference", "changed": "other answers changed without these features",
        "changed_others": "other answers changed without as many others",
    }  # fmt: skip
    effects = [[html.escape(text), bar(found[name])] for name, text in names.items() if name in found]
    return _section(
        title, table(("feature", "read at", "t", "active in refusals", "active in answers"), rows),
        table(("effect on prompts they were not found on", "share"), effects),
        note=f"{found['number']} of {found['features']:,} features at {found['site']} are higher in refusals than "
        f"chance allows (t above {found['beyond']:.2f}, the 95th percentile of the largest over shuffled verdicts); "
        f"{found['alive']:,} were active at all. The first {len(rows)} are taken out together.",
    )  # fmt: skip


def _words(data: Mapping[str, Any]) -> str:
    rows = [[visible(one["word"], 60), str(one["refusals"]), f"{one['effect']:.2f}"] for one in data["words"]["table"]]
    single = [
        [visible(one["word"], 60), f"{100 * one['in_refusals']:.0f} %", bar(one["planted"])]
        for one in data["origin"]["words"]
    ]
    return _section(
        "Words that refusals hang on", table(("word", "refusals that need it", "mean effect, nats"), rows),
        "<h3>Is one word enough? Planted in prompts that were answered</h3>" if single else "",
        table(("word", "stands in refusals", "made refused"), single),
        note="Needed: replacing the word by a harmless one of its kind lowers the margin of refusal by a nat or more, "
        "and by over twice the error.",
    )  # fmt: skip


def _brittle(data: Mapping[str, Any]) -> str:
    found = data["brittleness"]
    rows = [[kind, bar(one), str(found["could_not_run"][kind])] for kind, one in found["kinds"].items()]
    rows += [["paraphrase pairs agree", bar(found["paraphrases"]), ""]] if found["paraphrases"]["of"] else []
    rows += [["all, of refusals the feature carries", bar(found["carried"]), ""],
             ["all, of other refusals", bar(found["not_carried"]), ""]] if rows else []  # fmt: skip
    return _section("Rewritten requests", table(("how", "still refused", "could not be written"), rows))


def _jailbreaks(data: Mapping[str, Any]) -> str:
    found = data["jailbreaks"]
    if not found:
        return ""
    rows = [
        [visible(one["pair"], 40), f"{one['without']:.2f}", f"{one['with']:.2f}", "yes" if one["restored"] else "no"]
        for one in found["each"]
    ]
    patched = ""
    if found.get("patching"):
        names = {"any_single": "some single position", "phrase": "the positions that differ", "rest": "all others",
                 "all": "all positions"}  # fmt: skip
        both = found["patching"]["release"], found["patching"]["reimposition"]
        cells = [[text, *(bar(side[name]) for side in both)] for name, text in names.items()]
        patched = f"<h3>Patched between the two runs, {found['patched_pairs']} pairs</h3>"
        patched += table(("positions", "released", "re-imposed"), cells)
    return _section(
        "Jailbreaks", f"<p>Works in {in_words(found['works'])} of pairs.</p>", patched,
        table(("pair", "feature without phrase", "feature with phrase", "refusal back when added"), rows[:50]),
        note="Activation at the prompt's last token, from 0 (as in answered prompts) to 1 (as in refused ones).",
    )  # fmt: skip


def _detectors(data: Mapping[str, Any]) -> str:
    drawn = []
    for kind, one in (data["detectors"] or {}).items():
        if one:
            lines = {"each step": one["auroc"], "up to it": one["early"], "null": one["null"]}
            drawn.append(f"<h3>{one['odd']} {kind} against {one['benign']} ordinary answers: AUROC</h3>"
                         + curves(lines, low=0.0, high=1.0))  # fmt: skip
    return _section("Detectors trained on ordinary answers only", *drawn)


def _triggers(data: Mapping[str, Any]) -> str:
    found, diff = data["triggers"], data["diff"]
    if found is None:
        return ""
    words = [
        [visible(one["word"], 40), f"{one['score']:.2f}",
         *([f"{100 * one['same']:.0f} %", f"{100 * one['reference']:.0f} %", visible(one["payload"], 200)]
           if "same" in one else ["–", "–", "–"])]
        for one in found["words"]
    ]  # fmt: skip
    layers = [
        [str(i), *(f"{value:.3f}" for value in values)]
        for i, values in enumerate(zip(diff["moved"], diff["unlike"], diff["routing"], strict=True))
    ]
    return _section(
        "Triggers, and the difference to the reference",
        table(("word", "lost, nats a position", "same answer", "in the reference", "commonest answer"), words),
        "<h3>Layer by layer, at the first step</h3>",
        table(("layer", "residuals moved by", "unlike (1 - CKA)", "routing, total variation"), layers),
        note=f"{100 * diff['answers_changed']:.0f} % of answers differ from the reference. That alone is no defect.",
    )  # fmt: skip


def _withheld(data: Mapping[str, Any]) -> str:
    names = {"said": "right in the text", "probed": "read by a probe", "shuffled": "shuffled answers",
             "words": "words of the prompt alone", "reference": "in the reference"}  # fmt: skip
    rows = [
        [visible(str(one["group"] or "all"), 40), *([html.escape(one["why"])] + [""] * 6 if "why" in one else
         [str(one["prompts"]), *(bar(one[name]) for name in names), str(one["layer"])])]
        for one in data.get("withheld") or ()
    ]  # fmt: skip
    return _section(
        "Right answers inside and in the text", table(("group", "prompts", *names.values(), "layer"), rows),
        note="Probes on prompts that they were not trained on, at the first step. Flagged: more than in the text by a "
        "tenth, and more than with shuffled answers and than the words of the prompt allow.",
    )  # fmt: skip


def _prompts(data: Mapping[str, Any]) -> str:
    order = {"refusal": 0, "unclear": 1, "compliance": 2}
    rows = sorted(data["prompts"], key=lambda row: (order.get(row.get("verdict"), 3), row["line"]))
    return _section(f"All {len(rows)} prompts", "".join(map(_prompt, rows)))


def _prompt(row: Mapping[str, Any]) -> str:
    said = row.get("verdict") or "not run"
    named = [(name, row[name]) for name in ("label", "group", "pair") if row[name]]
    tags = "".join(f"<small>{name} {visible(value, 40)}</small> " for name, value in named)
    earlier = "".join(
        f'<h3>Before, {visible(one["role"])}</h3><pre dir="auto">{visible(one["content"])}</pre>'
        for one in row.get("before", ())
    )
    parts = [f'{earlier}<h3>Prompt</h3><pre dir="auto">{visible(row["text"])}</pre>']
    parts += [f"<p><small>{visible(note)}</small></p>" for note in row["notes"]]
    if row["why_not"] is not None:
        parts.append(f"<p>Not run: {visible(row['why_not'], 300)}</p>")
    else:
        parts += _evidence(row)
    head = f'<span class="verdict {said.replace(" ", "-")}">{said}</span> <small>line {row["line"]}</small> '
    head += f"{visible(row['text'], 90)} {tags}"
    return f'<details class="prompt"><summary>{head}</summary>{"".join(parts)}</details>'


def _evidence(row: Mapping[str, Any]) -> list[str]:
    parts = [f'<h3>Answer</h3><pre dir="auto">{visible(row["answer"]) or "(empty)"}</pre>']
    when = "not settled" if row["decided_at"] is None else f"from step {row['decided_at'] + 1} on"
    parts.append(f"<p>{row['steps']} steps; the verdict is that of the end {when}.</p>")
    for one in row["reversals"]:
        parts.append(
            f"<p>Step {one['step'] + 1} turned {one['from']} into {one['to']}: gone {visible(' '.join(one['gone']))}; "
            f"came {visible(' '.join(one['came']))}; margin {_signed(one.get('margin_before'))} to "
            f"{_signed(one.get('margin_after'))}.</p>"
        )
    if told := row.get("saliency"):
        most = max([abs(e) for e in told["effects"]] + [1e-9])
        words = " ".join(
            f'<mark class="{"up" if e > 0 else "down"}" style="--w:{abs(e) / most:.2f}">'
            f"{visible(w, 200)}<sub>{e:+.1f}±{s:.1f}</sub></mark>"
            for w, e, s in zip(told["words"], told["effects"], told["errors"], strict=True)
        )  # fmt: skip
        parts.append(f'<h3>Words for refusal, nats</h3><p class="words">{words}</p>')
    parts.append("<h3>Over the steps</h3>" + curves({"refusal margin": row["margins"]})
                 + (curves({"feature": row["activations"]}) if row.get("activations") else ""))  # fmt: skip
    if arms := row.get("arms"):
        names = {"inside": "without the feature", "outside": "without as much else", "added": "feature added"}
        cells = [[name, arms[arm]["verdict"], visible(arms[arm]["answer"], 300)] for arm, name in names.items()]
        parts.append(table(("intervention", "verdict", "answer"), cells))
    cells = [
        [one["kind"], one["verdict"] or visible(one["why_not"], 120), visible(one["text"], 200)]
        for one in row.get("variants", [])
    ]
    return [*parts, table(("rewritten", "verdict", "text"), cells)]


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.1f}"


def _problems(data: Mapping[str, Any]) -> str:
    rows = [[str(one["line"]), visible(one["problem"], 300), visible(one["start"], 120)] for one in data["problems"]]
    return _section("Lines that could not be read", table(("line", "problem", "begins"), rows), is_open=True)


def _methods(data: Mapping[str, Any]) -> str:
    items = "".join(f"<li>{visible(told)}</li>" for told in limits(data))
    manifest = html.escape(json.dumps(data["manifest"] | {"model": data["model"]}, indent=1, ensure_ascii=True))
    return _section(
        "Methods and limits: what was not shown", f"<ul>{items}</ul>",
        f"<h3>Manifest</h3><pre>{manifest}</pre><p>All numbers are in audit.json, the prompts in prompts.csv.</p>",
        is_open=True,
    )  # fmt: skip
