"""DiffusionGemma in JAX, with its inside open.

Reading order: `axes` (the letters of every shape), `nn.transformer` (the model), `diffusion.sampler` (one
denoising step), `diffusion.generate` (the loop over steps and blocks), `weights.hf_keys` (the checkpoint).

Names load when first used: importing the package loads neither JAX nor a device.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dgemma_jax import diffusion, nn, text, train, weights
    from dgemma_jax.bundle import Bundle, load, save
    from dgemma_jax.config import ModelConfig, SamplerConfig
    from dgemma_jax.diffusion.autoregressive import Autoregression, autoregress
    from dgemma_jax.diffusion.generate import Generation, generate, generate_python, resume
    from dgemma_jax.diffusion.moment import Moment
    from dgemma_jax.diffusion.stream import collected, generate_many, stream
    from dgemma_jax.diffusion.trajectory import Record, StopReason, Trajectory
    from dgemma_jax.exported import Exported, export, load_exported
    from dgemma_jax.nn.functional import denoise, prefill, soft_embed, unembed

_HOMES = {
    "bundle": ("Bundle", "load", "save"),
    "config": ("ModelConfig", "SamplerConfig"),
    "diffusion.autoregressive": ("Autoregression", "autoregress"),
    "diffusion.generate": ("Generation", "generate", "generate_python", "resume"),
    "diffusion.moment": ("Moment",),
    "diffusion.stream": ("collected", "generate_many", "stream"),
    "diffusion.trajectory": ("Record", "StopReason", "Trajectory"),
    "exported": ("Exported", "export", "load_exported"),
    "nn.functional": ("denoise", "prefill", "soft_embed", "unembed"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_MODULES = ("diffusion", "nn", "text", "train", "weights")

__all__ = [
    "Autoregression",
    "Bundle",
    "Exported",
    "Generation",
    "ModelConfig",
    "Moment",
    "Record",
    "SamplerConfig",
    "StopReason",
    "Trajectory",
    "autoregress",
    "collected",
    "denoise",
    "diffusion",
    "export",
    "generate",
    "generate_many",
    "generate_python",
    "load",
    "load_exported",
    "nn",
    "prefill",
    "resume",
    "save",
    "soft_embed",
    "stream",
    "text",
    "train",
    "unembed",
    "weights",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOME_OF:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    elif name == "__version__":
        value = _version()
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("dgemma-jax")
    except PackageNotFoundError:
        return "0+source"  # a source tree that was not installed


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
