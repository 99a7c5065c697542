"""Text in and out of the model: tokens (`tokenizer`) and conversations (`chat`)."""

from dgemma_jax.text.chat import split_thinking
from dgemma_jax.text.tokenizer import Tokenizer

__all__ = ["Tokenizer", "split_thinking"]
