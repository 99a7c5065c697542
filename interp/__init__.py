"""Interpretability of DiffusionGemma: every site of the model read, replaced and explained.

Start with `interp.sites(model)`, which lists what can be touched; `interp.at(model, pattern)` selects it;
`interp.explain(bundle, prompt)` shows a whole generation on one page.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# At once, not when first used: the module `interp.explain`, loaded later, would hide the function.
from interp.explain import Explanation, explain

if TYPE_CHECKING:
    from interp.surgery import at, sites

__dist__ = "dgemma-jax"  # tells this package from a folder `interp` of the user's own

_HOME_OF = {"at": "surgery", "sites": "surgery"}

__all__ = ["Explanation", "at", "explain", "sites"]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
