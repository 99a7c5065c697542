"""The panels of an explain page, and the page that holds them.

A panel is one Python function and one JavaScript file. The function makes plain JSON data from a run;
the script draws them and follows the state that all panels share. To add a panel, write both and add a
line to `PANELS`. The script calls

    report.panel("name", (element, view) => { ... });

once, where `element` is an empty element under the panel's title and `view` has
  view.data      what the panel's function returned
  view.report    everything else on the page (the schema is in `interp.explain`)
  view.on(draw)  calls draw(state, before) now (before is null) and after every change of the state;
                 state = {block, step, position, pinned, shown, theme}
  view.set({step: 3, position: 7})  moves all panels
and `report` itself offers `el`, `svg`, `tokenOf`, `ramp`, `entropyColour` and more: see `page/page.js`.
Text goes in by `el(...)` or `textContent`, never as markup.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import importlib.resources
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from .lens_panel import lens_data
from .order_panels import commit_data, length_data, smearing_data, transitions_data
from .saliency_panel import saliency_data


def no_data(bundle: Any, generation: Any) -> None:
    """For panels that need nothing beyond the arrays of the run, which every panel sees."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """One figure of the page.

    Attributes:
        name: letters, digits and hyphens; the script registers itself under it.
        title: the heading, text.
        data: (bundle, generation of one prompt) -> anything that `json.dumps` takes.
        script: a file name in `page/panels`, or a `Path` to a file of your own.
        place: "main" (the column of figures), "side" (the narrow column that stays in view) or
            "foot" (below both, as wide as the page).
    """

    name: str
    title: str
    script: str | Path
    data: Callable[[Any, Any], Any] = no_data
    place: str = "main"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9-]*", self.name):
            raise ValueError(f"a panel's name has a-z, 0-9 and hyphens only, got {self.name!r}")
        if self.place not in ("main", "side", "foot"):
            raise ValueError(f"place must be 'main', 'side' or 'foot', got {self.place!r}")

    def source(self) -> str:
        """The panel's JavaScript."""
        if isinstance(self.script, Path):
            return self.script.read_text("utf-8")
        return _page_file(f"panels/{self.script}")


PANELS: Mapping[str, Panel] = {
    panel.name: panel
    for panel in (
        Panel(name="canvas", title="The canvas", script="canvas.js"),
        Panel(name="position", title="One position", script="position.js", place="side"),
        Panel(name="saliency", title="What in the prompt drove it", script="saliency.js", data=saliency_data),
        Panel(name="maps", title="All steps, all positions", script="maps.js"),
        Panel(name="lens", title="Layer by layer", script="lens.js", data=lens_data),
        Panel(name="curves", title="Step by step", script="curves.js"),
        Panel(name="transitions", title="Accepted and given up", script="transitions.js", data=transitions_data),
        Panel(name="commit-order", title="In which order", script="commit-order.js", data=commit_data),
        Panel(name="length", title="How long it will be", script="length.js", data=length_data),
        Panel(name="smearing", title="One token, several places", script="smearing.js", data=smearing_data),
        Panel(name="table", title="Tables", script="table.js", place="foot"),
    )
}
"""The panels by name, in the order of the page."""


def choose(panels: Iterable[str | Panel] | None) -> tuple[Panel, ...]:
    """The panels meant by names, panels or None (all of `PANELS`)."""
    if panels is None:
        return tuple(PANELS.values())
    chosen = []
    for panel in (panels,) if isinstance(panels, str | Panel) else panels:
        if isinstance(panel, str):
            if panel not in PANELS:
                raise ValueError(f"no panel is named {panel!r}; known are {sorted(PANELS)}")
            panel = PANELS[panel]
        chosen.append(panel)
    names = [panel.name for panel in chosen]
    if len(set(names)) != len(names):
        raise ValueError(f"panels must have different names, got {names}")
    return tuple(chosen)


def render(data: Mapping[str, Any], panels: Iterable[Panel]) -> str:
    """One HTML page that holds everything it needs: style, scripts and data.

    Text of the run reaches the page as JSON or escaped. A content security policy allows these very
    scripts and no other, and no request to anywhere.
    """
    sources = {"page.js": _page_file("page.js"), "scrubber.js": _page_file("scrubber.js")}
    sources |= {f"panels/{panel.name}.js": panel.source() for panel in panels}
    sources["start.js"] = "report.start();\n"
    scripts = [_script(name, source) for name, source in sources.items()]
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; "
        "style-src 'unsafe-inline'; "
        f"script-src {' '.join(_digest(script) for script in scripts)}"
    )
    slots = {
        "policy": html.escape(policy),
        "title": html.escape(f"{_excerpt(data['prompt']['text'])} – {data['model']['name']}"),
        "style": _page_file("page.css"),
        "header": _header(data),
        "data": embeddable_json(data),
        "scripts": "\n".join(f"<script>{script}</script>" for script in scripts),
    }
    return re.sub(r"<!--slot:(\w+)-->", lambda slot: slots[slot[1]], _page_file("page.html"))


def embeddable_json(data: Any) -> str:
    """JSON in ASCII that cannot end the element it stands in: no `<`, `>` or `&`."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _page_file(name: str) -> str:
    return importlib.resources.files(__package__).joinpath("page", *name.split("/")).read_text("utf-8")


def _script(name: str, source: str) -> str:
    # Inside a script element the parser watches for these two, in strings and comments too.
    if re.search(r"</script|<!--", source, re.IGNORECASE):
        raise ValueError(f"{name} contains '</script' or '<!--', which would end it early in a page")
    return f"\n{source}\n//# sourceURL={name}\n"


def _digest(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _excerpt(text: str, length: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def _header(data: Mapping[str, Any]) -> str:
    """Prompt, answer and facts as HTML: readable even where scripts are not run."""

    def said(label: str, text: str, css: str) -> str:
        shown = html.escape(text) or '<span class="nothing">(empty)</span>'
        return f'<section class="said {css}"><h2>{label}</h2><pre dir="auto" tabindex="0">\n{shown}</pre></section>'

    facts = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}<small>{html.escape(note)}</small></dd></div>"
        for name, value, note in _facts(data)
    )
    return (
        f'<p class="eyebrow">How <b>{html.escape(data["model"]["name"])}</b> wrote this answer</p>'
        '<div class="exchange">'
        + said("Prompt", data["prompt"]["text"], "prompt")
        + said("Answer", data["answer"]["text"], "answer")
        + f'</div><dl class="facts">{facts}</dl>'
    )


def _facts(data: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Name, value and remark of each fact in the header."""
    run, sampler, answer = data["run"], data["sampler"], data["answer"]
    blocks, limit = data["blocks"], run["max_new_tokens"]
    steps = " + ".join(str(block["num_steps"]) for block in blocks)
    ends = "; ".join(dict.fromkeys(block["stop_sentence"] for block in blocks))
    return [
        (
            "Denoising steps",
            str(run["num_steps"]),
            (f"{steps} in {len(blocks)} blocks, " if len(blocks) > 1 else "")
            + f"at most {sampler['max_denoising_steps']} a block. Stopped because {ends}.",
        ),
        (
            "Answer tokens",
            str(len(answer["ids"])),
            ("and an end token" if answer["ended"] else "without an end token")
            + (f", of at most {limit}" if limit else "")
            + f". Stopped because {run['stop_sentence']}.",
        ),
        ("Tokens per forward", f"{run['tokens_per_forward']:.2f}", ""),
        (
            "Sampler",
            f"γ {sampler['entropy_bound']:g} nats",
            f"entropy bound; τ from {sampler['t_max']:g} towards {sampler['t_min']:g}; block ends below "
            f"{sampler['confidence_threshold']:g} nats, compared with the last {sampler['stability']}; "
            f"commits the {sampler['commit']}" + ("" if sampler["early_stop"] else "; early stop off"),
        ),
        (
            "Parameters",
            _short(data["model"]["num_parameters"]),
            f"{data['model']['num_layers']} layers, canvas of {data['model']['canvas_length']}, "
            f"vocabulary of {data['model']['vocab_size']:,}",
        ),
        ("Seed", str(run["seed"]), ""),
    ]


def _short(count: int) -> str:
    for size, unit in ((1e9, " billion"), (1e6, " million")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:,}"
