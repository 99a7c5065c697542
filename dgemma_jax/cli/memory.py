"""How much memory a model needs, calculated from shapes; nothing is allocated."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from dgemma_jax.config import ModelConfig
from dgemma_jax.nn import cache, quantized, transformer
from dgemma_jax.weights import tree

DTYPES = ("float32", "bfloat16")
CONTEXTS = {"4k": 4096, "32k": 32_768, "256k": 262_144}
# Memory of one device in GB of 1e9 bytes, as sold.
DEVICES = {
    "T4": 16,
    "TPU v5e": 16,
    "L4, RTX 4090": 24,
    "TPU v6e": 32,
    "A100 40 GB": 40,
    "A100, H100 80 GB": 80,
    "TPU v5p": 95,
    "H200": 141,
    "B200": 192,
}
USABLE = 0.92  # share of a device that a program gets
LOGITS_HELD = 3  # float32 arrays [C, V] alive at once in a denoising step, at most


@functools.cache
def parameters(config: ModelConfig) -> dict[str, int]:
    """Number of parameters by part of the model."""
    owners = {
        "embedder": "embedding",
        "self_conditioning": "self-conditioning",
        "attention": "attention",
        "mlp": "dense MLP",
        "router": "router",
        "experts": "experts",
    }
    found = dict.fromkeys([*owners.values(), "norms, scalars"], 0)
    for path, leaf in tree.leaves(transformer.abstract(config)).items():
        owner = path[2] if path[0] == "layers" else path[0]
        found[owners.get(owner, "norms, scalars")] += math.prod(leaf.shape)
    return found


def active_parameters(config: ModelConfig) -> int:
    """Parameters that one token meets: all but the experts not chosen."""
    idle = 1 - config.experts_per_token / config.num_experts
    return config.num_parameters - round(idle * parameters(config)["experts"])


@functools.cache
def weight_bytes(config: ModelConfig, kind: str) -> int:
    """Bytes of all weights in a dtype, or in a packed format with the rest in bfloat16."""
    model = transformer.abstract(config, jnp.dtype(kind if kind in DTYPES else "bfloat16"))
    if kind not in DTYPES:
        model = quantized.quantized(model, kind)
    return quantized.nbytes(model)


def cache_bytes(config: ModelConfig, tokens: int, dtype: str = "bfloat16") -> int:
    """Bytes of the key-value cache of one row that can hold `tokens`."""
    shapes = jax.eval_shape(lambda: cache.empty(config, 1, tokens, jnp.dtype(dtype)).layers)
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shapes))


def cache_bytes_per_token(config: ModelConfig, dtype: str = "bfloat16") -> int:
    """Bytes that one more token costs once the sliding layers are full."""
    full = config.sliding_window
    return cache_bytes(config, full + 1, dtype) - cache_bytes(config, full, dtype)


def logits_bytes(config: ModelConfig) -> int:
    """Bytes of one float32 array [C, V] of one row."""
    return config.canvas_length * config.vocab_size * 4


def needed(config: ModelConfig, dtype: str, tokens: int) -> int:
    """Bytes that one row of `tokens` needs in all: weights, cache and the logits of a step."""
    compute = "float32" if dtype == "float32" else "bfloat16"
    return weight_bytes(config, dtype) + cache_bytes(config, tokens, compute) + LOGITS_HELD * logits_bytes(config)


def devices_needed(config: ModelConfig, dtype: str, tokens: int) -> dict[str, int]:
    """How many of each accelerator hold it, the weights spread evenly."""
    total = needed(config, dtype, tokens)
    return {name: math.ceil(total / (size * 1e9 * USABLE)) for name, size in DEVICES.items()}
