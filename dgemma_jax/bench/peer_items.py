"""The items of `dgemma bench` that compare with `transformers`, on the same weights in the same process."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import numpy as np

from dgemma_jax.bench import peer, roofline
from dgemma_jax.bench.items import Contestant, Item
from dgemma_jax.bench.work import Work

EXPERTS = ("eager", "grouped_mm")  # ways of `transformers` to run them
OURS = "dgemma_jax"


class PeerLab:
    """A random model of `transformers`, and ours on its weights; made when first asked for."""

    def __init__(self, work: Work) -> None:
        self.work = work

    @functools.cached_property
    def sizes(self) -> peer.Sizes:
        config, names = self.work.config, {field for field in peer.Sizes.__dataclass_fields__}
        own = {name: getattr(config, name) for name in names if hasattr(config, name)}
        return peer.Sizes(**own, prompt_length=config.canvas_length, steps=self.work.steps[0])

    @functools.cached_property
    def model(self) -> Any:
        torch = peer.peer_package("torch")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return peer.random_peer(self.sizes, 0, device, self.work.dtype)

    @functools.cached_property
    def bundle(self) -> Any:
        return peer.shared(self.model, self.sizes.steps)

    @property
    def prompt(self) -> np.ndarray:
        return np.random.default_rng(0).integers(3, self.sizes.vocab_size, self.sizes.prompt_length)

    def least(self, steps: int) -> list[roofline.Part]:
        config, length = self.work.config, self.work.config.canvas_length
        width = 4 if self.work.dtype == "float32" else 2
        before = roofline.prefill(config, 1, length, 0, width) if steps > 1 else []
        return before + roofline.step(config, 1, length, width) * steps


def items(work: Work) -> list[Item]:
    """The comparisons; none where torch and transformers are not installed."""
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        return []
    steps = work.steps[0]
    return [
        Item("against transformers, step", step),
        Item(f"against transformers, generation, {steps} steps", generation),
        Item(f"against transformers compiled, generation, {steps} steps", compiled),
    ]


def step(lab: PeerLab) -> list[Contestant]:
    """One self-conditioned step, sampler included."""
    calls = {OURS: peer.our_step(lab.bundle, lab.prompt)}
    calls |= {f"transformers, {e}": peer.peer_step(lab.model, lab.prompt, e) for e in EXPERTS}
    return [Contestant(name=name, call=call, work=lab.least(1)) for name, call in calls.items()]


def generation(lab: PeerLab, implementations: tuple[str, ...] = EXPERTS, compiled: bool = False) -> list[Contestant]:
    """One block, its prompt of a block's length included."""
    kind = ", static cache, compiled" if compiled else ""
    calls = {OURS: peer.our_generation(lab.bundle, lab.prompt, lab.sizes)}
    for experts in implementations:
        call = peer.peer_generation(lab.model, lab.prompt, experts, steps=lab.sizes.steps, compiled=compiled)
        calls[f"transformers, {experts}{kind}"] = call
    least, tokens = lab.least(lab.sizes.steps), lab.sizes.canvas_length
    return [Contestant(name=name, call=call, work=least, tokens=tokens) for name, call in calls.items()]


compiled = functools.partial(generation, implementations=("grouped_mm",), compiled=True)
