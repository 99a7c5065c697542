"""One generation, step by step, as a page to look at and as JSON to compute with.

    explanation = interp.explain(bundle, "sort : d b a c")
    explanation.save("report.html")        # and report.json beside it
    explanation                            # in a notebook: the page itself

It runs the model once and shows what the sampler did; the panel "lens" makes the run once more, to read every layer,
and the panel "saliency" some hundred steps, with parts of the prompt masked.
With another prompt to compare with, `against`, it also patches that prompt's run into this one. `Explanation.data` is
the content of the JSON file:

| key | content |
|---|---|
| schema, schema_version | "dgemma.explain" and an integer, raised when a key changes its meaning |
| created | UTC, ISO 8601 |
| model | name, vocab_size, canvas_length, num_layers, num_parameters, max_entropy (ln V, nats) |
| prompt | text (as given; a chat as "role: text"), ids fed to the model |
| answer | text, ids up to and without the end token, ended (whether an end token was reached) |
| run | seed, num_steps, max_new_tokens, stop_reason, stop_sentence, tokens_per_forward |
| sampler | every field of `SamplerConfig` |
| versions | packages, python, device |
| vocabulary | token text by id (a string key), for every id that occurs below or above |
| special_ids | ids to be shown as special: padding, end tokens, the tokenizer's special tokens |
| blocks | one object per block that was run, see below |
| panels | name, title, place and data of each panel |

A block has n steps over C positions. Steps count from 1; entry 0 of a list is step 1.

| key | shape | content |
|---|---|---|
| index, num_steps, stop, stop_sentence | | `stop` is the name of a `StopReason` |
| answer_length | | positions of this block that belong to the answer; the rest follows the end token |
| start | [C] | the uniformly random canvas, "step 0" |
| tokens, argmax | [n, C] | ids: the canvas after the step; the most likely tokens |
| accepted | [n, C] | 1 where the sampler kept its sample at this step, else 0 (a random token) |
| entropy | [n, C] | nats, of the distribution after temperature; 5 decimals |
| top_ids, top_probs | [n, C, U] | candidates after temperature, best first; null if not recorded |
| committed | [C] | what the block left behind, before padding |
| temperature, mean_entropy | [n] | |
| accepted_count, newly_accepted, unaccepted | [n] | positions |
| argmax_changed | [n] | positions whose argmax differs from the step before (null at step 1) |
| argmax_final | [n] | positions whose argmax is already that of the last step |
| settled | [C] | first step from which on the argmax equals that of the last step |
| first_accepted | [C] | first step that accepted the position, or null. Not a freeze |
| unaccepts | [C] | how often it was accepted at one step and not at the next |
| entropy_at_commit | [C] | entropy at `first_accepted`, or null |
| entropy_at_end | [C] | entropy at the last step |
"""

from __future__ import annotations

import dataclasses
import datetime
import html
import importlib.metadata
import json
import math
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import dgemma_jax as dg

from .panels import Panel, choose, render

SCHEMA, SCHEMA_VERSION = "dgemma.explain", 1
_STEPS_PER_REPORT = 4  # denoising steps between two calls of `progress`
_PACKAGES = ("dgemma-jax", "jax", "jaxlib", "flax", "numpy", "tokenizers")
_STOP_SENTENCES = {
    "eos": "the answer ended with an end token",
    "max_new_tokens": "max_new_tokens was reached before an end token; raise it for a longer answer",
}


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` found: `data` is plain JSON, and it can be shown as a page.

    Attributes:
        data: see the module's tables.
        panels: what draws `data["panels"]`, in the same order.
    """

    data: Mapping[str, Any] = dataclasses.field(repr=False)
    panels: tuple[Panel, ...] = dataclasses.field(repr=False)

    def html(self) -> str:
        """The whole page: no network, no other files."""
        return render(self.data, self.panels)

    def save(self, path: str | Path) -> tuple[Path, Path]:
        """Writes the page and, beside it, the JSON of the same stem; returns both paths."""
        path = Path(path)
        if path.suffix.lower() not in (".html", ".htm"):
            raise ValueError(f"the report is a page: its name must end in .html, got {str(path)!r}")
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".json")
        path.write_text(self.html(), encoding="utf-8")
        beside.write_text(json.dumps(self.data, separators=(",", ":"), allow_nan=False) + "\n", encoding="utf-8")
        return path, beside

    def _repr_html_(self) -> str:
        # A frame keeps the page's style and scripts apart from the notebook's.
        return (
            '<iframe sandbox="allow-scripts" title="How the model wrote this answer" '
            'style="width:100%;height:900px;border:0;resize:vertical" '
            f'srcdoc="{html.escape(self.html())}"></iframe>'
        )


def explain(
    bundle: Any,
    prompt: str | Sequence[Mapping[str, Any]] | Sequence[int],
    *,
    seed: int = 0,
    sampler: dg.SamplerConfig | None = None,
    max_new_tokens: int = 256,
    record: dg.Record | None = None,
    panels: Iterable[str | Panel] | None = None,
    against: Any = None,
    target: Any = None,
    progress: Callable[[str], None] | None = None,
) -> Explanation:
    """Generates the answer to one prompt and explains how it came about.

    Args:
        bundle: from `dg.load`, possibly with an edited model; or a model, then the prompt must be ids.
        prompt: a text, a chat (messages with role and content) or token ids. One prompt.
        seed, sampler, max_new_tokens: as for `dg.generate`.
        record: what to keep of every step; must keep tokens, argmax, accepted and entropy.
            The default also keeps the 8 most likely tokens.
        panels: names in `interp.panels.PANELS` or `Panel`s of your own; None shows all of the table.
        against: another prompt of as many tokens; adds a map of where patching its run into this one changes the
            answer. That intervenes at some hundred places.
        target: what the panel "saliency" explains: a text that the first block of the answer holds, or a metric of
            logits; by default the answer itself.
        progress: is called with one line of text as the work goes on.
    """
    record = dg.Record(top_k=8) if record is None else record
    missing = [name for name in ("tokens", "argmax", "accepted", "entropy") if not getattr(record, name)]
    if missing:
        raise ValueError(f"explain needs {', '.join(missing)} in the record; got {record}")
    panels = choose(panels)
    if target is not None:
        from interp.saliency_panel import saliency_panel

        panels = tuple(p for p in panels if p.name != "saliency")
        panels = (*panels[:1], saliency_panel(target), *panels[1:])
    if against is not None:
        from interp.patch_panel import patch_panel

        panels = (*panels, patch_panel(against))
    tell = progress or (lambda line: None)

    tell("generating")
    watch = {}
    if progress is not None:
        watch["callback"] = lambda draft: tell(f"block {draft.block + 1}, step {draft.step + 1}")
        watch["callback_every"] = _STEPS_PER_REPORT
    generation = dg.generate(
        bundle,
        [prompt],
        seed=seed,
        sampler=sampler,
        max_new_tokens=max_new_tokens,
        record=record,
        **watch,
    )
    tell("reading the trajectory")
    data = describe(bundle, generation, prompt=prompt, max_new_tokens=max_new_tokens)
    drawn = []
    for panel in panels:
        tell(f"panel: {panel.title}")
        content = panel.data(bundle, generation)
        drawn.append({"name": panel.name, "title": panel.title, "place": panel.place, "data": content})
    return Explanation({**data, "panels": drawn}, panels)


def describe(
    bundle: Any,
    generation: Any,
    *,
    prompt: str | Sequence[Any] | None = None,
    max_new_tokens: int | None = None,
) -> dict[str, Any]:
    """The JSON data of a generation of one prompt, without panels.

    Args:
        bundle: for the tokenizer, sizes and name.
        generation: what `dg.generate` returned.
        prompt: as it was given; None decodes the prompt's tokens.
        max_new_tokens: the limit, if known.
    """
    if len(generation.texts) != 1:
        raise ValueError(f"a page shows one prompt, got a generation of {len(generation.texts)}")
    config, sampler = bundle.config, generation.sampler
    tokenizer = getattr(bundle, "tokenizer", None)
    token = (lambda id: f"#{id}") if tokenizer is None else tokenizer.token
    prompt_ids = [int(i) for i in generation.prompt_tokens[0]]
    answer_ids, ended = _until_end(generation.tokens[0], sampler.eos_token_ids)
    blocks = _blocks(generation.trajectory, len(answer_ids) + ended)
    special = {*getattr(tokenizer, "special_ids", ()), *sampler.eos_token_ids, sampler.pad_token_id}
    ids = _ids_in(blocks) | {*prompt_ids, *answer_ids}
    stop = str(generation.stop_reason[0])
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": {
            "name": _model_name(getattr(bundle, "source", None)),
            "vocab_size": config.vocab_size,
            "canvas_length": config.canvas_length,
            "num_layers": config.num_layers,
            "num_parameters": config.num_parameters,
            "max_entropy": round(math.log(config.vocab_size), 5),
        },
        "prompt": {"text": _prompt_text(prompt, prompt_ids, tokenizer), "ids": prompt_ids},
        "answer": {"text": _decoded(generation.texts[0], answer_ids), "ids": answer_ids, "ended": ended},
        "run": {
            "seed": int(generation.seeds[0]),
            "num_steps": int(generation.num_steps[0]),
            "max_new_tokens": max_new_tokens,
            "stop_reason": stop,
            "stop_sentence": _STOP_SENTENCES.get(stop, stop),
            "tokens_per_forward": round(float(generation.tokens_per_forward[0]), 4),
        },
        "sampler": {name: _plain(value) for name, value in dataclasses.asdict(sampler).items()},
        "versions": _versions(),
        "vocabulary": {str(i): token(i) for i in sorted(ids)},
        "special_ids": sorted(int(i) for i in special & ids),
        "blocks": blocks,
    }


def settled_step(argmax: np.ndarray) -> np.ndarray:
    """[C] first step (from 1) from which on the argmax equals that of the last step; argmax [n, C]."""
    final_from_here = np.logical_and.accumulate((argmax == argmax[-1])[::-1])
    return len(argmax) - final_from_here.sum(0) + 1


def _blocks(trajectory: dg.Trajectory, answer_length: int) -> list[dict[str, Any]]:
    blocks = []
    canvas_length = trajectory.start.shape[-1]
    for index, num_steps in enumerate(trajectory.num_steps[:, 0]):
        taken = int(trajectory.valid[index, :, 0].sum())
        if taken != num_steps:
            raise ValueError(
                f"block {index} has {num_steps} steps, of which {taken} are in the trajectory: the run was "
                "resumed. Explain the whole run, or panels would count steps from the wrong one"
            )
        if num_steps:
            inside = min(max(answer_length - index * canvas_length, 0), canvas_length)
            blocks.append(_block(trajectory, index, int(num_steps), inside))
    return blocks


def _block(trajectory: dg.Trajectory, index: int, num_steps: int, answer_length: int) -> dict[str, Any]:
    """One block of row 0 and the quantities derived from it; the module docstring defines them."""

    def steps(array: np.ndarray) -> np.ndarray:
        return np.asarray(array)[index, :num_steps, 0]

    argmax, accepted = steps(trajectory.argmax), steps(trajectory.accepted).astype(bool)
    entropy = steps(trajectory.entropy).astype(np.float64)
    before = np.concatenate([np.zeros_like(accepted[:1]), accepted[:-1]])
    ever, first = accepted.any(0), accepted.argmax(0)
    at_commit = np.take_along_axis(entropy, first[None], 0)[0]
    changed = (argmax[1:] != argmax[:-1]).sum(1)
    top = trajectory.top_ids is not None and trajectory.top_ids.shape[-1] > 0
    stop = dg.StopReason(int(trajectory.stop[index, 0]))
    return {
        "index": index,
        "num_steps": num_steps,
        "stop": stop.name,
        "stop_sentence": stop.sentence,
        "answer_length": answer_length,
        "start": np.asarray(trajectory.start)[index, 0].tolist(),
        "tokens": steps(trajectory.tokens).tolist(),
        "argmax": argmax.tolist(),
        "accepted": accepted.astype(int).tolist(),
        "entropy": _rounded(entropy),
        "top_ids": steps(trajectory.top_ids).tolist() if top else None,
        "top_probs": _rounded(steps(trajectory.top_probs)) if top else None,
        "committed": np.asarray(trajectory.committed)[index, 0].tolist(),
        "temperature": _rounded(steps(trajectory.temperature)),
        "mean_entropy": _rounded(entropy.mean(1), 7),
        "accepted_count": accepted.sum(1).tolist(),
        "newly_accepted": (accepted & ~before).sum(1).tolist(),
        "unaccepted": (before & ~accepted).sum(1).tolist(),
        "argmax_changed": [None, *changed.tolist()],
        "argmax_final": (argmax == argmax[-1]).sum(1).tolist(),
        "settled": settled_step(argmax).tolist(),
        "first_accepted": [int(s) + 1 if yes else None for s, yes in zip(first, ever, strict=True)],
        "unaccepts": (before & ~accepted).sum(0).tolist(),
        "entropy_at_commit": [h if yes else None for h, yes in zip(_rounded(at_commit), ever, strict=True)],
        "entropy_at_end": _rounded(entropy[-1]),
    }


def _rounded(array: np.ndarray, decimals: int = 5) -> list[Any]:
    return (np.round(np.asarray(array, np.float64), decimals) + 0.0).tolist()  # no -0.0


def _until_end(tokens: Iterable[int], eos_ids: Iterable[int]) -> tuple[list[int], bool]:
    ids, ends = [int(i) for i in tokens], set(eos_ids)
    end = next((at for at, i in enumerate(ids) if i in ends), None)
    return (ids, False) if end is None else (ids[:end], True)


def _ids_in(blocks: Iterable[Mapping[str, Any]]) -> set[int]:
    names = ("start", "tokens", "argmax", "committed", "top_ids")
    arrays = [block[name] for block in blocks for name in names if block[name] is not None]
    return {int(i) for array in arrays for i in np.unique(array)}


def _model_name(source: Any) -> str:
    """The name to show: of a local directory its last part, of a downloaded snapshot its hub id."""
    if source is None:
        return "a model without a name"
    parts = Path(str(source)).parts
    snapshots = [part for part in parts if part.startswith("models--")]
    if snapshots:
        return snapshots[-1].removeprefix("models--").replace("--", "/")
    return parts[-1] if Path(str(source)).is_absolute() else str(source)


def _prompt_text(prompt: Any, ids: list[int], tokenizer: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    if prompt is not None and len(prompt) and all(isinstance(turn, Mapping) for turn in prompt):
        return "\n".join(f"{turn['role']}: {_message_text(turn['content'])}" for turn in prompt)
    return _decoded(None if tokenizer is None else tokenizer.decode(ids, skip_special=False), ids)


def _decoded(text: str | None, ids: list[int]) -> str:
    """The text, or the ids in words where there is no tokenizer."""
    return " ".join(f"#{i}" for i in ids) if text is None else text


def _message_text(content: str | Sequence[Mapping[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text", f"[{part.get('type')}]")) for part in content)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    return value.item() if isinstance(value, np.generic) else value


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions | {"device": jax.devices()[0].device_kind}
