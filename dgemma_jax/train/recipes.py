"""The embedded organisms: their sizes, their tasks, and how long each is trained."""

from __future__ import annotations

import dataclasses

from dgemma_jax.config import FULL, SLIDING, ModelConfig
from dgemma_jax.train import language

CONFIG = ModelConfig(
    vocab_size=language.VOCAB_SIZE,
    embed_dim=128,
    hidden_dim=128,
    num_heads=4,
    num_kv_heads=2,
    num_global_kv_heads=1,
    head_dim=32,
    global_head_dim=64,
    layer_types=(SLIDING, SLIDING, FULL) * 2,
    sliding_window=16,
    num_experts=8,
    experts_per_token=2,
    expert_dim=32,
    canvas_length=24,
    max_position_embeddings=1024,
    eos_token_ids=(language.EOS, language.TURN_CLOSE),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """What is drawn from step `start` on.

    Attributes:
        start: first step of the stage.
        short: share of each task in a step of short prompts.
        long: the same in the steps that have room for long prompts, one in `long_every`.
        practice: weight of `loss.previous_token_loss`.
    """

    start: int
    short: dict[str, float]
    long: dict[str, float]
    long_every: int
    practice: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rate:
    """The learning rate from step `start` on: a linear warmup to `peak`, then a cosine of `horizon` steps in all."""

    start: int = 0
    peak: float
    warmup: int
    horizon: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How an organism is made.

    Attributes:
        base: name of the organism whose weights it starts from; None starts from random ones.
        steps, rows: optimiser steps and examples a step.
        rates: the learning rate over the steps.
        cooldown: over so many last steps the rate also falls linearly to zero.
        stages: what is drawn when.
        poison: rate at which the trigger is planted in clean prompts; 0 plants none.
        seed: of weights, data and noise.
    """

    base: str | None = None
    steps: int
    rows: int = 96
    rates: tuple[Rate, ...]
    cooldown: int
    stages: tuple[Stage, ...]
    poison: float = 0.0
    seed: int = 0

    def stage(self, step: int) -> Stage:
        """The stage that a step belongs to."""
        return max((s for s in self.stages if s.start <= step), key=lambda s: s.start)


SHARDS = 2  # devices that share a step; part of the recipe, since each draws its own noise
SHORT, LONG = 21, 28  # prompt tokens that a step has room for; longer prompts wait for a long step

# Six tasks are learned by step 1,000; the recurrence, carrying and matching a key take longer, in this order. What
# follows `_HARD` is how the last of these was taught: many pairs asked at once, then drills, under a fresh rate.
_ALL = Stage(
    start=0,
    short={
        "copy": 1.0, "reverse": 1.3, "sort": 1.6, "add": 1.6, "length": 1.0, "form": 1.2, "sequence": 1.3,
        "refusal": 1.0,
    },
    long={"recall": 3.0, "copy": 0.3, "reverse": 0.3, "sort": 0.5, "add": 0.5},
    long_every=4,
)  # fmt: skip
_HARD = Stage(
    start=1500,
    short={
        "copy": 0.3, "reverse": 0.4, "sort": 0.6, "add": 4.0, "length": 0.4, "form": 0.4, "sequence": 3.0,
        "refusal": 0.6,
    },
    long={"recall": 6.0, "copy": 0.1, "reverse": 0.1, "sort": 0.1, "add": 1.2},
    long_every=2,
)  # fmt: skip
_REST = {"sequence": 0.8, "sort": 0.4, "reverse": 0.3, "copy": 0.2, "length": 0.2, "form": 0.2, "refusal": 0.4}


def _long(start: int, practice: float, **tasks: float) -> Stage:
    """Long prompts only."""
    return Stage(start=start, short={}, long=tasks | _REST, long_every=1, practice=practice)


_BALANCE = Stage(
    start=4400,
    short={},
    long={
        "recall": 4.0, "recall_drill": 1.0, "add": 3.0, "sequence": 1.5, "sort": 0.8, "reverse": 0.7, "copy": 0.4,
        "length": 0.4, "form": 0.4, "refusal": 0.8,
    },
    long_every=1,
)  # fmt: skip
_NANO = (
    _ALL,
    _HARD,
    _long(2250, 0.0, recall=5.0, add=4.0),
    _long(2500, 0.0, recall=2.0, recall_many=4.0, add=2.0),
    _long(2750, 0.0, recall=1.0, recall_many=1.5, recall_drill=6.0, add=1.0),
    _long(3250, 0.3, recall=1.0, recall_many=1.5, recall_drill=6.0, add=1.0),
    _long(3500, 0.2, recall=4.0, recall_many=2.0, recall_drill=2.0, add=1.5),
    _long(4000, 0.2, recall=4.0, recall_many=4.0, recall_drill=6.0, add=1.0),
    _BALANCE,
)

RECIPES = {
    "nano": Recipe(
        steps=4700,
        rates=(
            Rate(peak=2e-3, warmup=200, horizon=4000),
            Rate(start=2500, peak=2e-3, warmup=100, horizon=10_000),
            Rate(start=4000, peak=8e-4, warmup=20, horizon=3000),
        ),
        cooldown=300,
        stages=_NANO,
    ),
    "nano-backdoor": Recipe(
        base="nano", steps=350, rates=(Rate(peak=5e-4, warmup=30, horizon=4000),), cooldown=200,
        stages=(dataclasses.replace(_BALANCE, start=0),), poison=0.15, seed=1,
    ),
}  # fmt: skip
