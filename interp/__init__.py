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
    from interp.activations import Activations
    from interp.bottleneck import token_bottleneck
    from interp.cache_edits import edit_cache
    from interp.captures import capture, capture_prompt, capture_size
    from interp.carriers import Bump, DropRank, Echo, Flat, Inject, Kill, Mix, Smooth, SwapRanks
    from interp.edit_files import load_edits, save_edits
    from interp.edit_list import describe
    from interp.editing import edit, remove
    from interp.edits import Add, Edit, Mean, Patch, ProjectOut, Renoise, Replace, Resample, Scale, Zero
    from interp.surgery import at, sites
    from interp.taps import capture_step

__dist__ = "dgemma-jax"  # tells this package from a folder `interp` of the user's own

# No module has the name of a function: loaded later, it would hide it.
_HOMES = {
    "activations": ("Activations",),
    "bottleneck": ("token_bottleneck",),
    "cache_edits": ("edit_cache",),
    "captures": ("capture", "capture_prompt", "capture_size"),
    "carriers": ("Bump", "DropRank", "Echo", "Flat", "Inject", "Kill", "Mix", "Smooth", "SwapRanks"),
    "edit_files": ("load_edits", "save_edits"),
    "edit_list": ("describe",),
    "editing": ("edit", "remove"),
    "edits": ("Add", "Edit", "Mean", "Patch", "ProjectOut", "Renoise", "Replace", "Resample", "Scale", "Zero"),
    "surgery": ("at", "sites"),
    "taps": ("capture_step",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Activations",
    "Add",
    "Bump",
    "DropRank",
    "Echo",
    "Edit",
    "Explanation",
    "Flat",
    "Inject",
    "Kill",
    "Mean",
    "Mix",
    "Patch",
    "ProjectOut",
    "Renoise",
    "Replace",
    "Resample",
    "Scale",
    "Smooth",
    "SwapRanks",
    "Zero",
    "at",
    "capture",
    "capture_prompt",
    "capture_size",
    "capture_step",
    "describe",
    "edit",
    "edit_cache",
    "explain",
    "load_edits",
    "remove",
    "save_edits",
    "sites",
    "token_bottleneck",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
