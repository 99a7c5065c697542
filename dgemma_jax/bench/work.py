"""How much is timed, for each size of model, and random models of these sizes."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from dgemma_jax.config import FULL, SLIDING, ModelConfig
from dgemma_jax.nn import transformer

SIZES = ("tiny", "medium", "release")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """A model and the sizes of what is done with it.

    Attributes:
        config: of the model.
        dtype: of weights and products.
        expert_tokens: tokens that go through one layer's experts.
        contexts: tokens in the cache; the first is that of all items but those that vary it.
        batches: rows of a step.
        prefills: tokens of a prompt.
        steps: denoising steps of a block, for generations.
        loop: denoising steps of a timed call.
        ceiling: (bytes copied, side of the squares multiplied) for the ceilings.
    """

    config: ModelConfig
    dtype: str
    expert_tokens: tuple[int, ...]
    contexts: tuple[int, ...]
    batches: tuple[int, ...] = (1, 2, 4, 8)
    prefills: tuple[int, ...] = (1024, 4096)
    steps: tuple[int, ...] = (16, 48)
    loop: int = 16
    ceiling: tuple[int, int] = (1 << 30, 8192)

    @classmethod
    def of(cls, size: str, config: ModelConfig | None = None, dtype: str | None = None) -> Work:
        """The work for "tiny", "medium" or "release", with another model's configuration if one is given.

        Raises:
            ValueError: no such size.
        """
        if size not in SIZES:
            raise ValueError(f"unknown size {size!r}; known are {', '.join(SIZES)}")
        work = {"tiny": _tiny, "medium": _medium, "release": _release}[size]()
        work = dataclasses.replace(work, config=config or work.config, dtype=dtype or work.dtype)
        room = work.config.max_position_embeddings - work.config.canvas_length
        fitting = {name: tuple(n for n in getattr(work, name) if n <= room) for name in ("contexts", "prefills")}
        return dataclasses.replace(work, **{k: v or (room,) for k, v in fitting.items()})


def _release() -> Work:
    return Work(
        config=ModelConfig(), dtype="bfloat16", expert_tokens=(256, 512, 2048, 4096), contexts=(4096, 1024, 32_768)
    )


def _medium() -> Work:
    """A model of the architecture's shape that a laptop takes: that of `peer`, with half its layers."""
    config = ModelConfig(
        vocab_size=32_768, embed_dim=512, hidden_dim=1024, num_heads=8, num_kv_heads=4, num_global_kv_heads=2,
        head_dim=64, global_head_dim=128, layer_types=(SLIDING,) * 5 + (FULL,), sliding_window=512,
        num_experts=32, experts_per_token=4, expert_dim=256,
    )  # fmt: skip
    return Work(
        config=config, dtype="float32", expert_tokens=(256, 512, 2048), contexts=(256, 1024, 4096),
        prefills=(256, 1024), loop=2, ceiling=(1 << 28, 2048),
    )  # fmt: skip


def _tiny() -> Work:
    """Shows that it runs, and says nothing of speed."""
    config = ModelConfig.tiny(layer_types=(SLIDING, FULL), canvas_length=8, num_experts=4, max_position_embeddings=64)
    return Work(
        config=config, dtype="float32", expert_tokens=(8,), contexts=(16, 32), batches=(1, 2), prefills=(16,),
        steps=(1, 2), loop=2, ceiling=(1 << 24, 512),
    )  # fmt: skip


def random_model(config: ModelConfig, dtype: str, seed: int = 0) -> transformer.Transformer:
    """A model with random weights of the usual size, made leaf by leaf on the device in their own dtype.

    Nothing larger than a leaf and its random bits is held beside the model. Bits are of XLA's own generator: other
    weights on another platform.
    """
    key = jax.random.key(seed, impl="rbg")
    leaves, structure = jax.tree_util.tree_flatten_with_path(transformer.abstract(config, jnp.dtype(dtype)))
    made = []
    for number, (path, leaf) in enumerate(leaves):
        names = [str(getattr(part, "name", "")) for part in path]
        made.append(_leaf(jax.random.fold_in(key, number), leaf.shape, leaf.dtype, _deviation(names, leaf.shape)))
    return jax.tree.unflatten(structure, made)


def _deviation(names: list[str], shape: tuple[int, ...]) -> float:
    """1 / sqrt(inputs that a product with this weight sums); 0 for scales, which are one."""
    if len(shape) == 1:
        return 0.0
    if "o" in names:
        return math.prod(shape[1:]) ** -0.5
    if "experts" in names and "down" in names:
        return shape[1] ** -0.5
    return 1.0 if "router" in names else shape[-1] ** -0.5


def _leaf(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype, deviation: float) -> jax.Array:
    return _normal(key, jnp.asarray(deviation, dtype), shape, dtype) if deviation else jnp.ones(shape, dtype)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _normal(key: jax.Array, deviation: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return jax.random.normal(key, shape, dtype) * deviation
