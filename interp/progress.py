"""The progress bar of long work, as `dgemma_jax` has it."""

from dgemma_jax.progress import bar

__all__ = ["bar"]
