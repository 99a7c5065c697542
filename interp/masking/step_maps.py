"""The same question at several steps of one run: which units drive the target early, which late."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

import dgemma_jax as dg
from dgemma_jax.config import SamplerConfig
from dgemma_jax.diffusion import prompts as inputs
from interp.gates import table
from interp.masking.masked_diffusion import saliency
from interp.masking.saliency_maps import Saliency
from interp.masking.targets import said


def saliency_by_step(
    bundle: Any, prompt: Any, target: Any, steps: Any = None, *, seed: int = 0, sampler: SamplerConfig | None = None,
    thinking: bool = False, **options: Any,
) -> tuple[Saliency, ...]:  # fmt: skip
    """A map of every step of one run. `step_heat_map` draws them.

    Masks and baselines are the same at all steps (common random numbers), so what differs is the step; all share one
    program. Early, nearly all comes from the prompt; later, drafts and S carry part of it, which units of "canvas" and
    "soft" show.

    Args:
        prompt, target, seed, sampler, thinking: as for `saliency`. A text is looked for in the answer of this run.
        steps: an integer, slice, list or mask over the steps taken; None for all of them.
        **options: of `saliency` (units, baseline, method, budget, ...).

    Raises:
        ValueError: steps that were not taken; whatever `saliency` cannot explain.
    """
    model, tokenizer, default = inputs.parts(bundle)
    ids = inputs.to_ids(prompt, tokenizer, model.config.vocab_size, thinking)
    if len(ids) != 1:
        raise ValueError(f"a saliency explains one prompt, got {len(ids)}")
    run = dg.generate(
        bundle, ids, seed, default if sampler is None else sampler, max_new_tokens=1, record=dg.Record.nothing()
    )
    taken = int(run.trajectory.num_steps[0, 0])
    chosen = np.flatnonzero(np.asarray(table(steps, taken, "steps")))
    if not len(chosen):
        raise ValueError(f"steps={steps!r} chooses none of the {taken} steps taken")
    metric = said(bundle, target, run.tokens[0]) if isinstance(target, str) else target
    return tuple(
        saliency(bundle, ids[0], metric, step=run.trajectory.moment(0, int(step)), seed=seed, **options)
        for step in chosen
    )


def step_heat_map(maps: Iterable[Saliency], most: int = 40) -> Any:
    """Scores as a heat map: a row a step, a column a unit (a position, where units are positions).

    Args:
        maps: of the same units, as `saliency_by_step` gives them.
        most: columns; units with larger scores anywhere go first, the order stays that of the units.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: no maps, or of other units.
    """
    from matplotlib.figure import Figure

    maps = sorted(maps, key=lambda one: one.step)
    if not maps or any(one.units != maps[0].units for one in maps):
        raise ValueError("a heat map over steps needs at least one map, all of the same units")
    grid = np.stack([one.scores for one in maps])
    kept = np.sort(np.argsort(-np.abs(grid).max(0), kind="stable")[:most])
    return _drawn(Figure, grid[:, kept], maps, [maps[0].units[i] for i in kept])


def _drawn(figure_of: Any, grid: np.ndarray, maps: Sequence[Saliency], names: Sequence[str]) -> Any:
    figure = figure_of(figsize=(2.5 + 0.3 * grid.shape[1], 2 + 0.3 * len(grid)), layout="constrained")
    axes = figure.add_subplot()
    limit = float(np.abs(grid).max()) or 1.0
    image = axes.imshow(grid, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    axes.set_yticks(range(len(maps)), [one.step for one in maps])
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_ylabel("denoising step")
    axes.set_title(f"{maps[0].method}, {maps[0].scope}")
    figure.colorbar(image, label=f"score ({maps[0].target})")
    return figure
