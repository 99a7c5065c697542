"""The explain page's patch panel: which places carry what makes the answer differ from another prompt's.

Only made when there is another prompt to compare with, since it intervenes: every place costs a step.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

import dgemma_jax as dg
from dgemma_jax.diffusion import prompts as inputs
from interp.panels import Panel

MOST_LAYERS, MOST_STEPS, MOST_POSITIONS = 10, 6, 32  # more are thinned out or left out, for the time it takes


def patch_panel(against: Any) -> Panel:
    """The panel that patches the run of the prompt `against` into the run that the page shows."""
    data = functools.partial(patch_data, against=against)
    return Panel(name="patch", title="Patched from another prompt", script="patch.js", data=data)


def patch_data(bundle: Any, generation: Any, *, against: Any) -> dict[str, Any]:
    """Denoising patches of the residual stream, of the prompt's pass and of the canvas, in the first block.

    `recovery` of "prompt" [n, L, P] and of "canvas" [n, L, T], in percent of the way from the run shown to the donor's
    in logit(donor's token) - logit(own token), averaged over the positions where the two answers differ. `steps` [n]
    count from 1.

    Raises:
        ValueError: prompts of unequal length, or with the same answer.
    """
    from interp.metrics import LogitDifference  # here: who only wants a page need not load surgery
    from interp.sweeps import patch_sweep

    _, tokenizer, _ = inputs.parts(bundle)
    own, sampler = list(generation.prompt_tokens[0]), generation.sampler
    other = inputs.to_ids([against], tokenizer, bundle.config.vocab_size)[0]
    if len(other) != len(own):
        raise ValueError(f"the prompts have {len(own)} and {len(other)} tokens; patching needs equally many")
    length = bundle.config.canvas_length
    seed = int(generation.seeds[0])
    donor = dg.generate(
        bundle, [other], seed=seed, sampler=sampler, max_new_tokens=length, record=dg.Record.nothing()
    )  # fmt: skip
    ours, theirs = np.asarray(generation.tokens[0, :length]), np.asarray(donor.tokens[0, :length])
    ends = np.isin(ours, sampler.eos_token_ids) | np.isin(theirs, sampler.eos_token_ids)
    size = min(int(np.argmax(ends)) if ends.any() else length, MOST_POSITIONS)
    differ = np.flatnonzero(ours[:size] != theirs[:size])
    if not len(differ):
        raise ValueError("both prompts have the same answer: there is nothing to patch over; choose another one")

    metric = LogitDifference(differ, theirs[differ], ours[differ])
    steps = _thinned(min(int(generation.trajectory.num_steps[0, 0]), int(donor.num_steps[0])), MOST_STEPS)
    layers = _thinned(bundle.config.num_layers, MOST_LAYERS)
    first = next(i for i, (a, b) in enumerate(zip(own, other, strict=True)) if a != b)  # before it the runs are equal
    places = {"prompt": list(range(first, len(own)))[-MOST_POSITIONS:], "canvas": list(range(size))}
    sweep = functools.partial(
        patch_sweep, bundle, [other], [own], metric, [f"layers.{i}.resid_post" for i in layers], steps, seed=seed,
        sampler=sampler, show_progress=False,
    )  # fmt: skip
    maps = {
        "prompt": sweep(phase="prefill", prompt_positions=places["prompt"]),
        "canvas": sweep(positions=places["canvas"]),
    }
    words = {str(i): _word(tokenizer, i) for i in {*own, *other, *map(int, theirs[:size])}}
    return {
        "against": against if isinstance(against, str) else _word(tokenizer, *other),
        "answer": donor.texts[0] or " ".join(words[str(i)] for i in theirs[:size]),
        "steps": [step + 1 for step in steps],
        "layers": layers,
        "places": places,
        "recovery": {name: _percent(found.recovery("layers.*.resid_post")[..., 0]) for name, found in maps.items()},
        "differ": differ.tolist(),
        "prompt_ids": [[own[i], other[i]] for i in places["prompt"]],
        "donor_ids": theirs[:size].tolist(),
        "vocabulary": words,
    }


def _thinned(count: int, most: int) -> list[int]:
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()


def _word(tokenizer: Any, *ids: int) -> str:
    return " ".join(f"#{i}" if tokenizer is None else tokenizer.token(i) for i in ids)


def _percent(shares: np.ndarray) -> list[Any]:
    """Whole percent, at most 999 either way; what could not be compared is 0."""
    return np.rint(np.clip(100 * np.nan_to_num(shares), -999, 999)).astype(int).tolist()
