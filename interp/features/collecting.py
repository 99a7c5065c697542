"""Collect activations of many prompts: from real runs over all steps, or from answers with noise of chosen levels.

Runs: every sample is one position of one canvas at one step, or of the prompt. Chosen levels: each prompt's answer
is corrupted as in training, x_i uniform with probability t, and one step is taken with S = 0. A "balanced" mix draws
equally from all steps and from accepted and fluid positions; a "natural" mix as often as they occur.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import dgemma_jax as dg
from dgemma_jax import progress
from dgemma_jax.config import SamplerConfig
from dgemma_jax.diffusion import noise
from dgemma_jax.diffusion import prompts as inputs
from dgemma_jax.nn.functional import of
from interp.captures import capture_prompt, capture_size
from interp.editing import rewrapped
from interp.features.activation_sets import CANVAS, COLUMNS, MANIFEST, PROMPT, ActivationSet, write_shard
from interp.fingerprint import fingerprint
from interp.gates import table
from interp.taps import tapped

MIXES = ("balanced", "natural")
PLACES = ("canvas", "prompt")


def collect_activations(
    bundle: Any, prompts: Any, sites: str | Sequence[str], directory: str | Path, *, samples: int = 64,
    mix: str = "balanced", places: Sequence[str] = ("canvas",), steps: Any = None,
    levels: Sequence[float] | None = None, answers: Any = None, batch: int | None = None, seed: int = 0,
    sampler: SamplerConfig | None = None, show: bool | None = None,
) -> ActivationSet:  # fmt: skip
    """Activations of many prompts, streamed to a directory shard by shard. Call again to go on after a kill.

    Args:
        bundle: a bundle or a model, edited or not.
        prompts: as for `dg.generate`.
        sites: patterns of sites with one value a position ([B, T, ...]; not attention scores).
        directory: of the set; empty, or with a part of this very set.
        samples: a prompt and place, drawn without replacement; fewer where there are fewer positions.
        mix: "balanced" or "natural", see above. Positions of the prompt are drawn evenly.
        places: "canvas", "prompt", or both. The prompt is read by the causal pass.
        steps: of the first block; None for all that are taken.
        levels: shares of noise in 0..1, in place of runs; every prompt is taken at each of them.
        answers: [B, C] ids of the answers to corrupt; by default those that the model itself gives.
        batch: prompts a shard; by default what memory allows, 64 at most.
        seed: of runs, noise and draws; each prompt has its own from this and its number.

    Raises:
        ValueError: no such site, mix, place, step or level; a directory that holds another set.
    """
    model, tokenizer, default = inputs.parts(bundle)
    sampler = default if sampler is None else sampler
    ids = inputs.to_ids(prompts, tokenizer, model.config.vocab_size)
    _check(mix, places, samples, levels, steps)
    canvas_sites = tapped(model, sites)[1] if "canvas" in places else []
    prompt_sites = tapped(model, sites, phase="prefill")[1] if "prompt" in places else []
    infos = {info.name: info for info in [*canvas_sites, *prompt_sites]}
    for info in infos.values():
        if info.axes[:2] not in ("BT", "BC") or "V" in info.axes:
            raise ValueError(f"{info.name} has axes {info.axes}; a set holds values of positions, [B, T, ...]")
    if answers is not None and np.shape(answers) != (len(ids), model.config.canvas_length):
        raise ValueError(f"answers has shape {np.shape(answers)}; needed is {(len(ids), model.config.canvas_length)}")
    one_step = sampler.replace(max_denoising_steps=1, early_stop=False)
    batch = batch or min(64, _rows_that_fit(bundle, ids, sites, steps, levels, sampler, canvas_sites))
    if batch < 1:
        raise ValueError(f"batch must be at least 1 prompt, got {batch}")
    groups = [list(range(first, min(first + batch, len(ids)))) for first in range(0, len(ids), batch)]
    directory = Path(directory)
    given = None if answers is None else np.asarray(answers).tolist()
    settings = (ids, sorted(infos), samples, mix, tuple(places), repr(steps), levels, given, batch, seed, sampler)
    about = {
        "set": fingerprint(bundle, *settings), "shards": len(groups), "prompts": len(ids), "mix": mix, "seed": seed,
        "levels": None if levels is None else list(levels),
        "sites": {name: (_sizes(info), str(np.dtype(info.dtype))) for name, info in infos.items()},
    }  # fmt: skip
    _begin(directory, about)
    with progress.bar("activations", len(ids), show, "prompts") as done:
        for number, rows in enumerate(groups):
            path = directory / f"shard-{number:05d}"
            if not path.exists():
                padded = [*rows, *[rows[-1]] * (batch - len(rows))]  # one compiled shape
                job = _Job(bundle, ids, padded, sites, steps, sampler, one_step, seed, len(rows))
                drawn: list[dict[str, Any]] = []
                if "canvas" in places:
                    found = job.run() if levels is None else job.corrupted(levels, answers)
                    drawn += [_draw(part, samples, mix, seed) for part in found]
                if "prompt" in places:
                    drawn.append(_draw(job.prompt(), samples, "natural", seed))
                write_shard(path, *_joined(drawn, about["sites"]))
            done(len(rows))
    return ActivationSet.load(directory)


def _check(mix: str, places: Sequence[str], samples: int, levels: Any, steps: Any) -> None:
    if mix not in MIXES:
        raise ValueError(f"mix must be one of {', '.join(MIXES)}, got {mix!r}")
    if isinstance(places, str) or not places or not set(places) <= set(PLACES):
        raise ValueError(f"places must be a list of {', '.join(PLACES)}, got {places!r}")
    if not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples must be an integer of at least 1, got {samples!r}")
    if levels is not None and (not len(levels) or not all(0 <= level <= 1 for level in levels) or steps is not None):
        raise ValueError(f"levels must be shares of noise in 0..1, without steps; got {levels!r} and steps={steps!r}")


def _rows_that_fit(bundle, ids, sites, steps, levels, sampler, on_canvas) -> int:
    if not on_canvas:
        return 64
    only = [0] if levels is not None else steps
    return capture_size(bundle, ids, [info.name for info in on_canvas], only, sampler=sampler).rows_at_once


def _sizes(info: Any) -> list[int]:
    return [size for size in info.shape if isinstance(size, int)] if info.axes[1] == "T" else list(info.shape[2:])


def _begin(directory: Path, about: dict[str, Any]) -> None:
    path = directory / MANIFEST
    if path.exists():
        if json.loads(path.read_text("utf-8"))["set"] != about["set"]:
            raise ValueError(f"{directory} holds another set (other weights, prompts or settings); give an empty one")
        return
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"{directory} is not empty and holds no set of activations; give an empty directory")
    directory.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(about, indent=1), "utf-8")
    part.rename(path)


@dataclasses.dataclass(frozen=True)
class _Job:
    """The prompts of one shard. Each method gives {"values": by site [S, B, T, ...], columns [S, B, T], "is": bool}."""

    bundle: Any
    ids: list[list[int]]
    rows: list[int]
    sites: Any
    steps: Any
    sampler: SamplerConfig
    one_step: SamplerConfig
    seed: int
    fresh: int  # rows that are not there to fill up the batch

    def run(self) -> list[dict[str, Any]]:
        chosen = np.flatnonzero(np.asarray(table(self.steps, self.sampler.max_denoising_steps, "steps")))
        out = self._generate(self.sampler, site_steps=tuple(map(int, chosen)))
        run = out.trajectory
        kept = run.accepted[0]  # [R, B, C]
        before = np.concatenate([np.zeros_like(kept[:1]), kept[:-1]])
        fed = np.concatenate([run.start[:1], run.tokens[0, :-1]])
        return [self._part(out, chosen, kept[chosen], 1 - before[chosen].mean(-1), fed[chosen], run.valid[0, chosen])]

    def corrupted(self, levels: Sequence[float], answers: Any) -> list[dict[str, Any]]:
        if answers is None:
            clean = self._generate(self.sampler, taps=False).tokens[:, : of(self.bundle).config.canvas_length]
        else:
            clean = np.asarray(answers)[self.rows]
        found = []
        for number, level in enumerate(levels):
            keys = noise.row_keys(np.asarray([_mixed(self.seed, row, number) for row in self.rows]))
            canvas = np.asarray(_corrupted(keys, clean, np.float32(level), of(self.bundle).config.vocab_size))
            out = self._generate(self.one_step, canvas=canvas, site_steps=(0,))
            is_clean = (canvas == clean)[None]
            taken = np.ones((1, len(canvas)), bool)
            part = self._part(out, np.zeros(1, int), is_clean, 1 - is_clean.mean(-1), canvas[None], taken)
            found.append(part | {"answer": np.broadcast_to(clean, part["token"].shape), "draw": number + 1})
        return found

    def prompt(self) -> dict[str, Any]:
        acts = capture_prompt(self.bundle, [self.ids[row] for row in self.rows], self.sites)
        shape = (1, *acts.tokens.shape)
        columns = {
            "step": np.full(shape, -1), "token": acts.tokens[None], "answer": np.full(shape, -1),
            "accepted": np.ones(shape, bool), "noise": np.zeros(shape), "place": np.full(shape, PROMPT),
        }  # fmt: skip
        return self._with_rows({n: a[None] for n, a in acts.arrays.items()}, columns, acts.valid[None], 0)

    def _generate(self, sampler: SamplerConfig, *, taps: bool = True, canvas: Any = None, site_steps: Any = None):
        bundle = rewrapped(self.bundle, tapped(of(self.bundle), self.sites)[0]) if taps else self.bundle
        record = dataclasses.replace(dg.Record.nothing(), tokens=True, accepted=True, site_steps=site_steps)
        return dg.generate(
            bundle, [self.ids[row] for row in self.rows], [_mixed(self.seed, row, 0) for row in self.rows], sampler,
            of(self.bundle).config.canvas_length, record, canvas=canvas,
        )  # fmt: skip

    def _part(self, out, steps, accepted_SBC, noise_SB, fed_SBC, taken_SB) -> dict[str, Any]:
        shape = accepted_SBC.shape
        columns = {
            "step": np.broadcast_to(steps[:, None, None], shape), "token": fed_SBC, "accepted": accepted_SBC,
            "answer": np.broadcast_to(out.tokens[:, : shape[2]], shape), "place": np.full(shape, CANVAS),
            "noise": np.broadcast_to(noise_SB[..., None], shape),
        }  # fmt: skip
        values = {name: array[0] for name, array in out.trajectory.sites.items()}
        return self._with_rows(values, columns, np.broadcast_to(taken_SB[..., None], shape), 0)

    def _with_rows(self, values, columns, there, draw) -> dict[str, Any]:
        shape = there.shape
        is_fresh = np.arange(shape[1])[None, :, None] < self.fresh
        columns["row"] = np.broadcast_to(np.asarray(self.rows)[None, :, None], shape)
        columns["position"] = np.broadcast_to(np.arange(shape[2]), shape)
        return columns | {"values": values, "is": there & is_fresh, "draw": draw}


@jax.jit(static_argnums=3)
def _corrupted(keys, clean_BC, level, vocab_size):
    one = jax.vmap(lambda key, row: noise.corrupt(key, row[None], level[None], vocab_size)[0])
    return one(keys, clean_BC)


def _mixed(*numbers: int) -> int:
    """One seed of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _draw(part: dict[str, Any], samples: int, mix: str, seed: int) -> dict[str, Any]:
    """At most `samples` places of each row, by the mix."""
    chosen = []
    for column, row in enumerate(part["row"][0, :, 0]):
        places = np.argwhere(part["is"][:, column])  # [n, 2] of step and position
        if not len(places):
            continue
        rng = np.random.default_rng([seed, int(row), int(part["place"][0, 0, 0]), part["draw"]])
        cells = 2 * places[:, 0] + part["accepted"][places[:, 0], column, places[:, 1]]
        _, cell, size = np.unique(cells, return_inverse=True, return_counts=True)
        weight = 1 / size[cell] if mix == "balanced" else np.ones(len(places))
        # Gumbel's trick: the largest keys are a weighted draw without replacement.
        order = np.argsort(-(np.log(weight) + rng.gumbel(size=len(places))))[: min(samples, len(places))]
        own = places[np.sort(order)]
        chosen.append(np.stack([own[:, 0], np.full(len(own), column), own[:, 1]]))
    index = tuple(np.concatenate(chosen, 1)) if chosen else tuple(np.zeros((3, 0), int))
    picked = {name: part[name][index] for name in COLUMNS}
    return picked | {"values": {name: array[index] for name, array in part["values"].items()}}


def _joined(drawn: list[dict[str, Any]], sites: dict[str, Any]) -> tuple[dict, dict]:
    columns = {name: np.concatenate([part[name] for part in drawn]) for name in COLUMNS}
    missing = {name for part in drawn for name in sites if name not in part["values"]}
    if missing:
        raise ValueError(f"{sorted(missing)[0]} is not there in both passes; collect it in a set of its own")
    return {name: np.concatenate([part["values"][name] for part in drawn]) for name in sites}, columns
