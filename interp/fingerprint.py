"""A short text that tells models apart: for the names of files that hold what a model did."""

from __future__ import annotations

import hashlib
from typing import Any

from dgemma_jax.nn.functional import of
from dgemma_jax.weight_sums import weight_sums
from interp.edit_list import describe


def fingerprint(model: Any, *more: Any) -> str:
    """16 hexadecimal digits of a model's weights, its edits, and the `repr` of whatever else is given.

    Weights enter by sums of their bits, in integers: exact on every device and in any order of summation.
    """
    transformer = of(model)
    parts = weight_sums(transformer)
    return hashlib.sha256(repr((parts, repr(describe(transformer)), *more)).encode()).hexdigest()[:16]
