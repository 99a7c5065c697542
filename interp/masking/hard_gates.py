"""The fewest units that keep the target: hard-concrete gates (Louizos et al. 2018) under a constraint, as in DiffMask.

    s = sigmoid((logit(u) + a) / b);   m = clip(s (r - l) + l, 0, 1);   P(m > 0) = sigmoid(a - b log(-l / r))

Minimise the expected number of open gates subject to E f(m) >= f(all on) - margin, by gradient descent on a and ascent
on the multiplier (De Cao et al. 2020). The order of the gates is then tried out on hard masks: the shortest list of
units whose mean over the draws is within the margin is kept.
"""

from __future__ import annotations

import numpy as np

from interp.masking.game import Found, Game, ends

TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1  # b, l and r of Louizos et al.
START = 2.0  # of a: gates begin open
RATE, MULTIPLIER_RATE = 0.1, 0.5


def gates(
    game: Game, *, budget: int = 1024, tolerance: float | None = None, seed: int = 0, margin: float = 1.0,
    samples: int = 8,
) -> Found:  # fmt: skip
    """P(unit is needed), and the units kept.

    Args:
        budget: evaluations at most; what the trial of the hard masks leaves goes to training.
        tolerance: not used: gates have no standard error, and theirs is NaN.
        margin: how much of the target may be lost, in its own units.
        samples: gates drawn for one step of training.

    Raises:
        ValueError: a margin that is not above 0; a budget below ten steps of training.
    """
    count, draws = len(game.names), np.arange(min(game.draws, samples))
    if not margin > 0:
        raise ValueError(f"margin must be above 0, in units of the target; got {margin}")
    trial = (count - 1) * len(draws)
    steps = (budget - trial - len(draws) - 1) // samples
    if steps < 10:
        needed = trial + len(draws) + 1 + 10 * samples
        raise ValueError(f"budget={budget}: ten steps of training and the trial of {count} units take {needed}")
    rng = np.random.default_rng(seed)
    on, offs = ends(game, draws)
    logits, multiplier = np.full(count, START), 1.0
    moments = np.zeros((2, count))
    for step in range(1, steps + 1):
        slope, value = _slope(game, logits, rng, samples, step)
        is_open = _sigmoid(logits - TEMPERATURE * np.log(-LOW / HIGH))
        grad = is_open * (1 - is_open) - multiplier * slope
        moments = _adam(moments, grad)
        mean, square = moments[0] / (1 - 0.9**step), moments[1] / (1 - 0.999**step)
        logits = logits - RATE * mean / (np.sqrt(square) + 1e-8)
        multiplier = float(np.clip(multiplier + MULTIPLIER_RATE * ((on - margin) - value), 0, 100))
    scores = _sigmoid(logits - TEMPERATURE * np.log(-LOW / HIGH))
    kept = _shortest(game, scores, on, offs, draws, margin)
    return Found(scores, np.full(count, np.nan), on, float(offs.mean()), kept=kept)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _adam(moments: np.ndarray, grad: np.ndarray) -> np.ndarray:
    return np.stack([0.9 * moments[0] + 0.1 * grad, 0.999 * moments[1] + 0.001 * grad**2])


def _slope(game, logits, rng, samples, step) -> tuple[np.ndarray, float]:
    """d E f(m) / d logits [U], and E f(m)."""
    noise = rng.uniform(1e-6, 1 - 1e-6, (samples, len(logits)))
    soft = _sigmoid((np.log(noise) - np.log1p(-noise) + logits) / TEMPERATURE)
    wide = soft * (HIGH - LOW) + LOW
    values, grads = game.gradients(np.clip(wide, 0, 1).astype(np.float32), (step + np.arange(samples)) % game.draws)
    inside = (wide > 0) & (wide < 1)
    chain = inside * soft * (1 - soft) / TEMPERATURE * (HIGH - LOW)
    return (grads * chain).mean(0), float(values.mean())


def _shortest(game, scores, on, offs, draws, margin) -> np.ndarray:
    """[U] bool: the shortest head of the ranking within the margin; all units if no shorter one is."""
    count = len(scores)
    rank = np.argsort(np.argsort(-scores, kind="stable"), kind="stable")
    levels = np.arange(1, count)
    masks = (rank < levels[:, None]).astype(np.float32)
    values = game.values(np.repeat(masks, len(draws), 0), np.tile(draws, count - 1)) if count > 1 else np.zeros(0)
    means = np.concatenate([[offs.mean()], values.reshape(count - 1, len(draws)).mean(1), [on]])
    return rank < int(np.argmax(means >= on - margin))
