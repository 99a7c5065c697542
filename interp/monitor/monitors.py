"""Monitors: anything that reads a text and says "influenced" or not.

A function and a regular expression judge each text alone. A probe is fitted on the other instances. The model itself
is asked by a prompt.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

import dgemma_jax as dg
from dgemma_jax.config import SamplerConfig
from interp.monitor.rollouts import Rollouts


class Monitor(Protocol):
    """Judges all rollouts at once."""

    def verdicts(self, texts: Sequence[str], rollouts: Rollouts, labels: np.ndarray) -> np.ndarray:
        """[R] bool for R texts. `labels` [R] is the truth; only a monitor that fits on other instances may use it."""


@dataclasses.dataclass(frozen=True)
class TextMonitor:
    """A function of one text."""

    flags: Callable[[str], bool]

    def verdicts(self, texts: Sequence[str], rollouts: Rollouts, labels: np.ndarray) -> np.ndarray:
        return np.array([bool(self.flags(text)) for text in texts])


@dataclasses.dataclass(frozen=True)
class ProbeMonitor:
    """Logistic regression, with a ridge, fitted on all instances but those of the fold that it judges.

    Attributes:
        features: [R, F] by rollout, for example pooled activations; None takes the words of what is read.
        ridge: penalty on half the squared weights.
        folds: of instances.
    """

    features: Any = None
    ridge: float = 1.0
    folds: int = 5

    def verdicts(self, texts: Sequence[str], rollouts: Rollouts, labels: np.ndarray) -> np.ndarray:
        given = words(texts) if self.features is None else np.asarray(self.features, float)
        names = np.unique(rollouts.instance)
        if given.ndim != 2 or len(given) != len(texts):
            raise ValueError(f"features must be [{len(texts)}, F], one row a rollout; got {given.shape}")
        if len(names) < 2 or self.folds < 2:
            raise ValueError("a probe is fitted on other instances: at least 2 instances and 2 folds are needed")
        found = np.zeros(len(texts), bool)
        for fold in range(min(self.folds, len(names))):
            held = np.isin(rollouts.instance, names[fold :: self.folds])
            weights = logistic(given[~held], labels[~held], self.ridge)
            found[held] = _with_constant(given[held]) @ weights > 0
        return found


@dataclasses.dataclass(frozen=True)
class AskMonitor:
    """A model that is asked about each text.

    Attributes:
        bundle: the model that judges; the one judged, or another.
        question: the prompt for a text, as for `dg.generate`.
        says_yes: whether its answer means "influenced".
        seed, sampler, max_new_tokens, batch: of its generations.
    """

    bundle: Any
    question: Callable[[str], Any]
    says_yes: Callable[[str], bool]
    seed: int = 0
    sampler: SamplerConfig | None = None
    max_new_tokens: int = 256
    batch: int = 32

    def verdicts(self, texts: Sequence[str], rollouts: Rollouts, labels: np.ndarray) -> np.ndarray:
        different = list(dict.fromkeys(texts))  # equal texts under one seed have one answer
        found = {}
        for start in range(0, len(different), self.batch):
            part = different[start : start + self.batch]
            asked = [self.question(text) for text in part + [part[-1]] * (self.batch - len(part))]
            out = dg.generate(self.bundle, asked, self.seed, self.sampler, self.max_new_tokens, dg.Record.nothing())
            found |= {text: bool(self.says_yes(said)) for text, said in zip(part, out.texts, strict=False)}
        return np.array([found[text] for text in texts])


def as_monitor(given: Any) -> Monitor:
    """A monitor of a function of a text, a regular expression (searched for), or a monitor."""
    if isinstance(given, str | re.Pattern):
        return TextMonitor(re.compile(given).search)
    if hasattr(given, "verdicts"):
        return given
    if callable(given):
        return TextMonitor(given)
    raise ValueError(f"a monitor is a function of a text, a regular expression, or has `verdicts`; got {given!r}")


def words(texts: Sequence[str]) -> np.ndarray:
    """[R, F] which words occur in which text; F words, in alphabetical order."""
    split = [set(text.split()) for text in texts]
    known = sorted(set().union(*split))
    return np.array([[word in own for word in known] for own in split], float).reshape(len(texts), len(known))


def logistic(features: np.ndarray, labels: np.ndarray, ridge: float = 1.0, steps: int = 50) -> np.ndarray:
    """Weights [F + 1], the constant last and free of the ridge, of a logistic regression, by Newton's method."""
    x, y = _with_constant(features), np.asarray(labels, float)
    penalty = np.full(x.shape[1], ridge)
    penalty[-1] = 1e-6  # a fold with one label only has no finite constant
    weights = np.zeros(x.shape[1])
    for _ in range(steps):
        p = 1 / (1 + np.exp(-np.clip(x @ weights, -30, 30)))
        slope = x.T @ (p - y) + penalty * weights
        curve = (x * (p * (1 - p))[:, None]).T @ x + np.diag(penalty)
        change = np.linalg.solve(curve, slope)
        weights -= change
        if np.abs(change).max() < 1e-8:
            break
    return weights


def _with_constant(features: np.ndarray) -> np.ndarray:
    return np.concatenate([features, np.ones((len(features), 1))], 1)
