"""What a map must not survive (Adebayo et al. 2018): other weights, and another target."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgemma_jax.nn.functional import of
from interp.editing import rewrapped
from interp.masking.masked_game import MaskedGame

_RELABELLED = ("tokens", "others")  # fields of metrics that hold token ids


def randomized(bundle: Any, layers: int, seed: int = 0) -> Any:
    """The bundle, or model, with the entries of every tensor of its top layers permuted, the final norm's too.

    Args:
        layers: how many, from the last one down; as many as there are also permutes all other weights.
    """
    model = of(bundle)
    total = model.config.num_layers
    if not 0 <= layers <= total:
        raise ValueError(f"layers must be in 0..{total}, got {layers}")

    def permuted(path: Any, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path)
        number = next((i for i in range(total) if name.startswith((f".layers[{i}]", f"['layers'][{i}]"))), None)
        own = layers == total if number is None and "final_norm" not in name else (
            layers > 0 if number is None else number >= total - layers
        )  # fmt: skip
        if not own:
            return leaf
        order = np.random.default_rng([seed, *name.encode()]).permutation(leaf.size)
        mixed = np.asarray(leaf).ravel()[order].reshape(leaf.shape)  # on the host: nothing is compiled
        return jax.device_put(mixed, leaf.sharding) if leaf.committed else jnp.asarray(mixed)

    return rewrapped(bundle, jax.tree_util.tree_map_with_path(permuted, model))


def other_target(game: MaskedGame, seed: int = 0) -> MaskedGame:
    """The game with the vocabulary of its target permuted: as likely a question, about other words.

    Raises:
        ValueError: the metric holds no token ids.
    """
    own = [name for name in _RELABELLED if getattr(game.metric, name, None) is not None]
    if not own:
        raise ValueError("only a metric that holds token ids (LogProb, LogitDifference, SetLogProb) can be relabelled")
    size = of(game.bundle).config.vocab_size
    words = np.random.default_rng(seed).permutation(size)
    changed = {name: words[np.asarray(getattr(game.metric, name))] for name in own}
    return dataclasses.replace(game, metric=dataclasses.replace(game.metric, **changed))
