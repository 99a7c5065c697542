"""Linear probes by layer, step and class of positions: what can be read where, and when, on prompts not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from dgemma_jax import progress
from interp.features.linear_fits import METHODS, fit_cells, score_cells
from interp.features.pooling import CLASSES, Pooled
from interp.features.probe_results import Probes

L2 = {"ridge": 0.1, "logistic": 0.1}
LEAST = 4  # prompts of each label that a probe needs, to train on and to test on


def fit_probes(
    pooled: Pooled, labels: Sequence[Any], *, method: str = "ridge", classes: Sequence[str] = CLASSES,
    test: Any = 0.3, l2: float | None = None, controls: int = 5, seed: int = 0, show: bool | None = None,
) -> Probes:  # fmt: skip
    """Fit one probe at each layer, step and class of positions, and one a layer at the end of the prompt.

    Args:
        pooled: what `interp.pool_residuals` gives.
        labels: one a prompt, of any kind; as many classes as there are values.
        method: "ridge" or "logistic".
        classes: of positions: "all", "accepted", "fluid".
        test: share of the prompts held out, drawn within each label; or a mask [N]. The split is by prompt: equal
            prompts must not stand on both sides, so give a mask where there are any.
        l2: penalty in units of standardised features; 0.1 by default.
        controls: probes of shuffled labels, and of random directions, that the real ones are compared with.
        seed: of the split and the controls.

    Raises:
        ValueError: one label alone, too few prompts of one, no such method or class.
    """
    names, y_N = np.unique(np.asarray(labels), return_inverse=True)
    count = pooled.prompt.shape[1]
    if len(y_N) != count:
        raise ValueError(f"labels has {len(y_N)} entries, there are {count} prompts")
    if controls < 1:
        raise ValueError(f"controls must be at least 1, got {controls}: an accuracy alone says little")
    if method not in METHODS or not set(classes) <= set(CLASSES) or not classes:
        raise ValueError(f"method must be one of {METHODS} and classes of {CLASSES}; got {method!r} and {classes!r}")
    test_N = _split(test, y_N, names, seed)
    chosen = [CLASSES.index(name) for name in classes]
    layers, steps, _, _, width = pooled.canvas.shape
    x_LCND = np.concatenate(  # cells: steps x classes, then the prompt
        [pooled.canvas[:, :, chosen].reshape(layers, -1, count, width), pooled.prompt[:, None]], 1
    )
    valid_CN = np.concatenate([pooled.valid[:, chosen].reshape(-1, count), np.ones((1, count), bool)])
    l2 = jnp.float32(L2[method] if l2 is None else l2)
    rng = np.random.default_rng([seed, 1])
    one_hot = np.eye(len(names), dtype=np.float32)
    # The real labels, then shuffled ones, as one long list of cells a layer. Shuffled within each side of the split.
    orders = [np.arange(count), *(_shuffled(test_N, rng) for _ in range(controls))]
    random_DM = rng.standard_normal((width, controls)).astype(np.float32)
    train_CN = (valid_CN & ~test_N).astype(np.float32)
    scores, weights, biases, of_controls, of_random = [], [], [], [], []
    with progress.bar("probes", layers * (len(orders) + controls), show) as done:
        for x_CND in x_LCND:
            x_CND = jnp.asarray(x_CND, jnp.float32)
            for number, order in enumerate(orders):
                y_CNK = np.broadcast_to(one_hot[y_N[order]], (*valid_CN.shape, len(names)))
                w, b = fit_cells(x_CND, y_CNK, train_CN, l2, method)
                found = np.einsum("cnd,cdk->cnk", x_CND, w) + np.asarray(b)[:, None]
                if number == 0:
                    scores.append(found)
                    weights.append(np.asarray(w))
                    biases.append(np.asarray(b))
                else:
                    of_controls.append(_accuracy(found, y_N[order], valid_CN & test_N))
                done(1)
            y_CNK = np.broadcast_to(one_hot[y_N], (*valid_CN.shape, len(names)))
            for direction_D in random_DM.T:
                line = (x_CND @ direction_D)[..., None]
                w, b = fit_cells(line, y_CNK, train_CN, l2, method)
                of_random.append(_accuracy(np.asarray(line @ w + b[:, None]), y_N, valid_CN & test_N))
                done(1)
    shape = (layers, controls, len(valid_CN))
    return Probes(
        labels=tuple(names.tolist()), layers=pooled.layers, steps=steps, classes=tuple(classes), method=method,
        truth=y_N, test=test_N, valid=valid_CN, scores=np.stack(scores).astype(np.float32),
        weights=np.stack(weights), biases=np.stack(biases), shuffled=np.reshape(of_controls, shape).sum(1) / controls,
        random=np.reshape(of_random, shape).sum(1) / controls,
    )  # fmt: skip


def probe_transfer(probes: Probes, pooled: Pooled, kind: str = "all") -> np.ndarray:
    """[L, R + 1, R + 1] held-out accuracy of the probe of one step on residuals of another; the last is the prompt.

    Entry [l, s, t]: trained at s, tested at t, positions of class `kind`. The last row is the way from the causal
    encoder to the canvas. NaN where no held-out prompt took the step.

    Raises:
        ValueError: the probes have no such class, or were fitted on other prompts.
    """
    if kind not in probes.classes:
        raise ValueError(f"these probes have the classes {probes.classes}, not {kind!r}")
    if pooled.prompt.shape[1] != len(probes.truth) or pooled.layers != probes.layers:
        raise ValueError("these residuals are of other prompts or layers than the probes")
    at = CLASSES.index(kind)
    cells = [*(step * len(probes.classes) + probes.classes.index(kind) for step in range(probes.steps)), -1]
    found = []
    for layer in range(len(probes.layers)):
        x_CND = np.concatenate([pooled.canvas[layer, : probes.steps, at], pooled.prompt[layer, None]])
        scores = score_cells(x_CND, probes.weights[layer][cells], probes.biases[layer][cells])
        valid = np.concatenate([pooled.valid[: probes.steps, at], np.ones((1, len(probes.truth)), bool)])
        found.append([_accuracy(row, probes.truth, valid & probes.test) for row in np.asarray(scores)])
    return np.asarray(found)


def fit_time_probes(
    pooled: Pooled, *, kind: str = "all", method: str = "logistic", test: Any = 0.3, l2: float | None = None,
    seed: int = 0,
) -> Probes:  # fmt: skip
    """Which step is it? One probe a layer, over the residuals of all steps; held out by prompt.

    Subliminal Clocks, arXiv 2607.01774. Logistic, as the regression of three classes in a row never names the middle
    one. The result has one step: `accuracy[:, 0, 0]` by layer; a guess is right
    once in as many as there are steps.
    """
    layers, steps, _, count, width = pooled.canvas.shape
    if steps < 2:
        raise ValueError("all runs took one step: there is no time to read")
    if kind not in CLASSES:
        raise ValueError(f"kind must be one of {CLASSES}, got {kind!r}")
    rng = np.random.default_rng([seed, 2])
    drawn = rng.permutation(count) < (0 if np.ndim(test) else round(test * count))
    held = np.asarray(test, bool) if np.ndim(test) else drawn
    at = CLASSES.index(kind)
    flat = Pooled(
        canvas=pooled.canvas[:, :, at].reshape(layers, 1, 1, steps * count, width).repeat(3, 2),
        valid=pooled.valid[:, at].reshape(1, 1, -1).repeat(3, 1), layers=pooled.layers, texts=(),
        prompt=np.tile(pooled.prompt, (1, steps, 1)),
    )  # fmt: skip
    labels = np.repeat(np.arange(steps), count)
    return fit_probes(flat, labels, method=method, classes=("all",), test=np.tile(held, steps), l2=l2, seed=seed)


def _split(test: Any, y_N: np.ndarray, names: np.ndarray, seed: int) -> np.ndarray:
    """[N] bool, the prompts held out."""
    if len(names) < 2:
        raise ValueError(f"all labels are {names.tolist()}: a probe needs two kinds of prompts at least")
    if np.ndim(test):
        test_N = np.asarray(test, bool)
        if test_N.shape != y_N.shape:
            raise ValueError(f"test has shape {test_N.shape}, there are {len(y_N)} prompts")
    else:
        if not 0 < test < 1:
            raise ValueError(f"test must be a share between 0 and 1, or a mask; got {test}")
        rng = np.random.default_rng([seed, 0])
        test_N = np.zeros(len(y_N), bool)
        for label in range(len(names)):
            own = np.flatnonzero(y_N == label)
            test_N[rng.permutation(own)[: max(1, round(test * len(own)))]] = True
    for side, what in ((~test_N, "train on"), (test_N, "test on")):
        counts = np.bincount(y_N[side], minlength=len(names))
        if counts.min() < LEAST:
            raise ValueError(
                f"{counts.min()} prompts labelled {names[counts.argmin()]} to {what}; {LEAST} are needed at least"
            )
    return test_N


def _shuffled(test_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    order = np.arange(len(test_N))
    for side in (test_N, ~test_N):
        order[side] = rng.permutation(order[side])
    return order


def _accuracy(scores_CNK: np.ndarray, y_N: np.ndarray, on_CN: np.ndarray) -> np.ndarray:
    """[C] share of right answers among the samples of each cell that count; NaN where there are none."""
    right = (np.asarray(scores_CNK).argmax(-1) == y_N) & on_CN
    counted = on_CN.sum(1)
    return np.where(counted, right.sum(1) / np.maximum(counted, 1), np.nan)
