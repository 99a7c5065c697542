"""Information-bottleneck attribution (Schulz et al. 2020): how many bits of each unit the target needs.

    z = l h + (1 - l) e,   e ~ N(mu, sigma^2),   l = sigmoid(a) for each entry of the unit's values h
    KL = -1/2 [1 + ln(1 - l)^2 - (l R)^2 - (1 - l)^2],   R = (h - mu) / sigma
    minimise  -E f(z) + beta * mean KL    over a, by Adam

mu and sigma are those of each channel, over the run's own values and its baselines. Scores are bits, never negative.
"""

from __future__ import annotations

import jax
import numpy as np

from dgemma_jax.nn.functional import of
from interp.masking.game import Found, Game, ends
from interp.masking.input_values import by_unit, gradients_at, of_model, own_values

START, BETA, RATE, SAMPLES, STEPS = 5.0, 10.0, 1.0, 10, 10
LEAST = 1e-4  # of sigma and of 1 - l


def information_bottleneck(
    game: Game, *, budget: int = STEPS * SAMPLES + 2, tolerance: float | None = None, seed: int = 0,
    beta: float = BETA, rate: float = RATE, samples: int = SAMPLES,
) -> Found:  # fmt: skip
    """Bits of each unit's values that pass, where every bit has its price.

    Args:
        budget: evaluations at most; a step of Adam takes `samples`.
        tolerance: not used.
        beta: the price of information, per nat of the mean over all entries.
        rate: of Adam.

    Raises:
        ValueError: the budget does not reach one step.
    """
    steps = (budget - 2) // samples
    if steps < 1 or beta < 0:
        raise ValueError(f"budget={budget}: a step takes {samples} evaluations and the ends 2; beta must be >= 0")
    rng = np.random.default_rng(seed)
    own, tree = jax.tree.flatten(own_values(game))
    centre = [_statistics(h, b) for h, b in zip(own, tree.flatten_up_to(_baselines(game)), strict=True)]
    scaled = [(h - mu) / sigma for h, (mu, sigma) in zip(own, centre, strict=True)]
    entries = sum(h[0].size for h in own)
    gate = [np.full_like(h[:1], START) for h in own]
    moments = [np.zeros((2, *a.shape)) for a in gate]
    for step in range(1, steps + 1):
        noise = [mu + sigma * rng.standard_normal((samples, *a.shape[1:]))
                 for a, (mu, sigma) in zip(gate, centre, strict=True)]  # fmt: skip
        apart = [h[np.arange(samples) % len(h)] - e for h, e in zip(own, noise, strict=True)]
        passed = [_sigmoid(a) for a in gate]
        mixed = [(e + share * d).astype(np.float32) for share, e, d in zip(passed, noise, apart, strict=True)]
        slopes = jax.tree.leaves(gradients_at(game, tree.unflatten(mixed), samples)[1])
        for i, share in enumerate(passed):
            of_target = (slopes[i] * apart[i]).mean(0, keepdims=True)
            left = np.maximum(1 - share, LEAST)
            of_bits = 1 / left + share * (scaled[i] ** 2).mean(0, keepdims=True) - left
            moments[i], move = _adam(moments[i], share * (1 - share) * (beta * of_bits / entries - of_target), step)
            gate[i] = gate[i] - rate * move
    bits = [_nats(_sigmoid(a), r) / np.log(2) for a, r in zip(gate, scaled, strict=True)]
    on, off = ends(game, [0])
    scores = by_unit(game, tree.unflatten(bits)).mean(0)
    return Found(scores, np.full(len(scores), np.nan), on, float(off.mean()))


def _nats(share: np.ndarray, scaled: np.ndarray) -> np.ndarray:
    left = np.maximum(1 - share, LEAST)
    return -0.5 * (1 + 2 * np.log(left) - (share * scaled) ** 2 - left**2)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _adam(moments: np.ndarray, slope: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
    moments = np.stack([0.9 * moments[0] + 0.1 * slope, 0.999 * moments[1] + 0.001 * slope**2])
    return moments, moments[0] / (1 - 0.9**step) / (np.sqrt(moments[1] / (1 - 0.999**step)) + 1e-8)


def _baselines(game: Game) -> dict:
    """What stands in at each place, as values."""
    inner = of_model(game)
    lookup = of(inner.bundle).embedder.lookup

    def values(place: str, pool):
        tokens = place in ("token_embed", "canvas") and np.issubdtype(pool.dtype, np.integer)
        return lookup(pool) if tokens else pool

    return jax.tree.map(lambda x: np.asarray(x, np.float32), {p: values(p, v) for p, v in inner.given.pool.items()})


def _statistics(own: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel."""
    both = np.concatenate([x.reshape(-1, x.shape[-1]) for x in (own, other)])
    return both.mean(0), np.maximum(both.std(0), LEAST)
