"""Weights on disk: names (`hf_keys`), Hugging Face directories, Orbax, and where to find a model by name."""

from dgemma_jax.weights.hf import load_hf
from dgemma_jax.weights.hf_save import save_hf
from dgemma_jax.weights.orbax import load_orbax, save_orbax

__all__ = ["load_hf", "load_orbax", "save_hf", "save_orbax"]
