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
    """The learning rate: a linear warmup to `peak`, then a cosine that ends at step `horizon`."""

    peak: float
    warmup: int
    horizon: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How an organism is made.

    Attributes:
        base: name of the organism whose weights it starts from; None starts from random ones.
        steps, rows: optimiser steps and examples a step.
        rate: the learning rate over the steps.
        cooldown: over so many last steps the rate also falls linearly to zero.
        stages: what is drawn when.
        poison: rate at which the trigger is planted in clean prompts; 0 plants none.
        seed: of weights, data and noise.
    """

    base: str | None = None
    steps: int
    rows: int = 96
    rate: Rate
    cooldown: int
    stages: tuple[Stage, ...]
    poison: float = 0.0
    seed: int = 0

    def stage(self, step: int) -> Stage:
        """The stage that a step belongs to."""
        return max((s for s in self.stages if s.start <= step), key=lambda s: s.start)


SHARDS = 2  # devices that share a step; part of the recipe, since each draws its own noise
SHORT, LONG = 21, 28  # prompt tokens that a step has room for; longer prompts wait for a long step

# Most tasks are learned by step 1,000; carrying, the recurrence and matching a key take longer and get more of the
# data from `_HARD` on. Matching a key is learned from `recall_drill`, once tokens know what stands before them.
_ALL = Stage(
    start=0,
    short={
        "copy": 1.0, "reverse": 1.3, "sort": 1.6, "add": 1.6, "length": 1.0, "form": 1.2, "sequence": 1.3,
        "refusal": 1.0,
    },
    long={"recall": 1.5, "recall_drill": 3.0, "copy": 0.3, "reverse": 0.3, "sort": 0.5, "add": 0.5},
    long_every=3, practice=0.3,
)  # fmt: skip
_HARD = Stage(
    start=1200,
    short={
        "copy": 0.3, "reverse": 0.4, "sort": 0.6, "add": 4.0, "length": 0.4, "form": 0.4, "sequence": 3.0,
        "refusal": 0.6,
    },
    long={"recall": 3.0, "recall_drill": 4.0, "copy": 0.1, "reverse": 0.1, "sort": 0.1, "add": 1.2},
    long_every=2, practice=0.2,
)  # fmt: skip
_BALANCE = Stage(
    start=2800,
    short={},
    long={
        "recall": 4.0, "recall_drill": 1.5, "add": 3.0, "sequence": 1.5, "sort": 0.8, "reverse": 0.7, "copy": 0.4,
        "length": 0.4, "form": 0.4, "refusal": 0.8,
    },
    long_every=1,
)  # fmt: skip

RECIPES = {
    "nano": Recipe(
        steps=3800, rate=Rate(peak=2e-3, warmup=200, horizon=6000), cooldown=400, stages=(_ALL, _HARD, _BALANCE)
    ),
    "nano-backdoor": Recipe(
        base="nano", steps=350, rate=Rate(peak=5e-4, warmup=30, horizon=4000), cooldown=200,
        stages=(dataclasses.replace(_BALANCE, start=0),), poison=0.15, seed=1,
    ),
}  # fmt: skip
