"""The explain page's saliency panel: which words of the prompt drove the answer, at some steps of the first block."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

MOST_UNITS, MOST_STEPS, ORDERS, DRAWS = 48, 4, 16, 8  # for the time it takes
LARGE = 200_000_000  # parameters; beyond, it is only made of a target that the user asks about


def saliency_panel(target: Any) -> Any:
    """The panel about a target of the user's own: a text that the answer holds, or a metric of logits."""
    from interp.panels import PANELS

    return dataclasses.replace(PANELS["saliency"], data=functools.partial(saliency_data, target=target))


def saliency_data(bundle: Any, generation: Any, *, target: Any = None) -> dict[str, Any] | None:
    """Maps by unmasking paths under noise; None for a run that cannot be made once more, or of a large model unasked.

    `target` in words, `units` [U] texts, `places` [U] their first tokens, `prompt_ids` [T], `token_units` [T] the unit
    of each or -1, `steps` [n] (from 1), `scores` and `stderr` [n, U] in nats, `on` and `off` [n] the target with all
    units on and off, `evaluations`.

    Args:
        target: a text that the answer holds, or a metric; by default the answer, as far as the first block holds it.

    Raises:
        ValueError: the answer does not hold the text.
    """
    run = generation.trajectory
    if run.replay is None or (target is None and bundle.config.num_parameters > LARGE):
        return None
    from interp.masking.masked_diffusion import saliency  # here: who only wants a page need not load surgery
    from interp.masking.targets import said
    from interp.masking.units import groups_of
    from interp.metrics import answer

    ids, sampler = [int(i) for i in generation.prompt_tokens[0]], generation.sampler
    tokens = np.asarray(generation.tokens[0, : bundle.config.canvas_length])
    ends = np.isin(tokens, sampler.eos_token_ids)
    tokens = tokens[: max(1, int(np.argmax(ends)) if ends.any() else len(tokens))]
    if target is None:
        words, metric = "the answer", answer(tokens)
    elif isinstance(target, str):
        words, metric = target, said(bundle, target, tokens)
    else:
        words, metric = getattr(target, "__name__", type(target).__name__), target
    known = ("tokens", "words", "sentences") if getattr(bundle, "tokenizer", None) is not None else ("tokens",)
    kinds = {kind: len(groups_of(bundle, ids, kind)) for kind in known}
    kind = next((kind for kind, count in kinds.items() if 0 < count <= MOST_UNITS), list(kinds)[-1])
    if not kinds[kind]:
        return None
    method, budget = "path", 1 + ORDERS * (2 * kinds[kind] - 1)
    if kinds[kind] > MOST_UNITS:
        method, budget = "gradient", None
    taken = int(run.num_steps[0, 0])
    steps = np.unique(np.linspace(0, taken - 1, min(taken, MOST_STEPS)).round().astype(int)).tolist()
    seed = int(generation.seeds[0])
    maps = [saliency(bundle, ids, metric, method, units=kind, step=run.moment(0, step), budget=budget, draws=DRAWS,
                     seed=seed, progress=False) for step in steps]  # fmt: skip
    return {
        "target": words,
        "units": [name.rsplit(" @", 1)[0] for name in maps[0].units],
        "places": maps[0].places[:, 1].tolist(),
        "token_units": maps[0].token_units.tolist(),
        "prompt_ids": ids,
        "steps": [step + 1 for step in steps],
        "scores": [np.round(found.scores, 4).tolist() for found in maps],
        "stderr": [[None if np.isnan(e) else round(float(e), 4) for e in found.stderr] for found in maps],
        "on": [round(found.on, 4) for found in maps],
        "off": [round(found.off, 4) for found in maps],
        "evaluations": sum(found.evaluations for found in maps),
    }
