"""The derivative of the target along smooth unmasking paths: the cheap map.

Masks are relaxed to [0, 1]. On a path from s = 0 to 1 unit i comes on from s = u_i / (1 + w) to (u_i + w) / (1 + w),
u_i uniform, so that at every s some units are off, some on and some between. A score is the line integral

    score_i = E_u int_0^1 df/dm_i (m(s)) dm_i/ds ds

whose sum over units is f(all on) - f(all off) up to the error of the quadrature: the completeness gap. Where f is
linear in every mask (Owen's multilinear extension, 1972) the score is the Shapley value, since units enter in random
order. A model is not linear between on and off; the gap and the comparison with `path` say what that costs.
"""

from __future__ import annotations

import numpy as np

from interp.masking.game import Found, Game, ends, standard_error

LEVELS = 8  # noise levels of a path


def gradient(
    game: Game, *, budget: int = 256, tolerance: float | None = None, seed: int = 0, levels: int = LEVELS,
    width: float = 0.5,
) -> Found:  # fmt: skip
    """The mean derivative over antithetic smooth paths.

    Args:
        budget: evaluations at most; a path and its mirror take 2 * `levels` gradients.
        tolerance: stop as soon as every standard error is at most this.
        levels: points of the quadrature on a path.
        width: w, how gently units come on; large is the straight line of integrated gradients, 0+ one at a time.

    Raises:
        ValueError: the budget does not reach two pairs of paths; the game has no gradients.
    """
    if width <= 0 or levels < 1:
        raise ValueError(f"width must be above 0 and levels at least 1, got {width} and {levels}")
    count, least = len(game.names), 4 * levels + 1 + min(2, game.draws)
    if budget < least:
        raise ValueError(f"budget={budget}: two pairs of paths of {levels} levels take {least} evaluations")
    pairs = max(2, (budget - 1 - game.draws) // (2 * levels))
    rng = np.random.default_rng(seed)
    found: list[np.ndarray] = []
    for number in range(pairs):
        start = rng.random(count)
        masks, moved = zip(*(_walk(u, levels, width) for u in (start, 1 - start)), strict=True)
        draw = np.full(2 * levels, number % game.draws)
        grads = game.gradients(np.concatenate(masks), draw)[1]
        found.append((grads * np.concatenate(moved)).sum(0) / 2)
        if tolerance is not None and number and standard_error(np.stack(found)).max() <= tolerance:
            break
    scores = np.stack(found)
    on, offs = ends(game, np.arange(min(len(found), game.draws)))
    return Found(scores.mean(0), standard_error(scores), on, float(np.mean(offs)))


def _walk(start: np.ndarray, levels: int, width: float) -> tuple[np.ndarray, np.ndarray]:
    """Masks [levels, U] at the middle of each level, and how far each moves within it."""

    def at(s: np.ndarray) -> np.ndarray:
        return np.clip((s[:, None] * (1 + width) - start) / width, 0, 1)

    edges = np.linspace(0, 1, levels + 1)
    masks = at((edges[1:] + edges[:-1]) / 2)
    return masks.astype(np.float32), np.diff(at(edges), axis=0)
