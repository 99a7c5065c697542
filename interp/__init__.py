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
    from interp.affine_lens import AffineLens
    from interp.attention_cuts import attention_knock_out, cut_attention
    from interp.attribution import attribution_patching
    from interp.bottleneck import token_bottleneck
    from interp.bottleneck_arms import bottleneck_study, samplers_of
    from interp.bottleneck_results import BottleneckStudy
    from interp.cache_edits import edit_cache
    from interp.captures import capture, capture_prompt, capture_size
    from interp.carriers import Bump, DropRank, Echo, Flat, Inject, Kill, Mix, Smooth, SwapRanks
    from interp.edge_attribution import edge_attribution_patching
    from interp.edge_maps import EdgeMap
    from interp.edit_files import load_edits, save_edits
    from interp.edit_list import describe
    from interp.editing import edit, remove
    from interp.edits import Add, Edit, Mean, Patch, ProjectOut, Renoise, Replace, Resample, Scale, Zero
    from interp.effect_maps import EffectMap
    from interp.jacobian_lens import fit_jacobian_lens
    from interp.knockout import knock_out
    from interp.lens_readings import LensReadings
    from interp.lenses import logit_lens
    from interp.metrics import Divergence, LogitDifference, LogProb, Says, SetLogProb, answer
    from interp.patching import Patched, patch
    from interp.path_patching import Receiver, path_patch
    from interp.questions import Questions
    from interp.routing import Reroute, reroute
    from interp.steering import SteeringVector, steer, steering_vector
    from interp.surgery import at, sites
    from interp.sweeps import patch_sweep
    from interp.taps import capture_step
    from interp.tuned_lens import fit_tuned_lens

__dist__ = "dgemma-jax"  # tells this package from a folder `interp` of the user's own

# No module has the name of a function: loaded later, it would hide it.
_HOMES = {
    "activations": ("Activations",),
    "affine_lens": ("AffineLens",),
    "attention_cuts": ("attention_knock_out", "cut_attention"),
    "attribution": ("attribution_patching",),
    "bottleneck": ("token_bottleneck",),
    "bottleneck_arms": ("bottleneck_study", "samplers_of"),
    "bottleneck_results": ("BottleneckStudy",),
    "cache_edits": ("edit_cache",),
    "captures": ("capture", "capture_prompt", "capture_size"),
    "carriers": ("Bump", "DropRank", "Echo", "Flat", "Inject", "Kill", "Mix", "Smooth", "SwapRanks"),
    "edge_attribution": ("edge_attribution_patching",),
    "edge_maps": ("EdgeMap",),
    "edit_files": ("load_edits", "save_edits"),
    "edit_list": ("describe",),
    "editing": ("edit", "remove"),
    "edits": ("Add", "Edit", "Mean", "Patch", "ProjectOut", "Renoise", "Replace", "Resample", "Scale", "Zero"),
    "effect_maps": ("EffectMap",),
    "jacobian_lens": ("fit_jacobian_lens",),
    "knockout": ("knock_out",),
    "lens_readings": ("LensReadings",),
    "lenses": ("logit_lens",),
    "metrics": ("Divergence", "LogProb", "LogitDifference", "Says", "SetLogProb", "answer"),
    "patching": ("Patched", "patch"),
    "path_patching": ("Receiver", "path_patch"),
    "questions": ("Questions",),
    "routing": ("Reroute", "reroute"),
    "steering": ("SteeringVector", "steer", "steering_vector"),
    "surgery": ("at", "sites"),
    "sweeps": ("patch_sweep",),
    "taps": ("capture_step",),
    "tuned_lens": ("fit_tuned_lens",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Activations",
    "Add",
    "AffineLens",
    "BottleneckStudy",
    "Bump",
    "Divergence",
    "DropRank",
    "Echo",
    "EdgeMap",
    "Edit",
    "EffectMap",
    "Explanation",
    "Flat",
    "Inject",
    "Kill",
    "LensReadings",
    "LogProb",
    "LogitDifference",
    "Mean",
    "Mix",
    "Patch",
    "Patched",
    "ProjectOut",
    "Questions",
    "Receiver",
    "Renoise",
    "Replace",
    "Reroute",
    "Resample",
    "Says",
    "Scale",
    "SetLogProb",
    "Smooth",
    "SteeringVector",
    "SwapRanks",
    "Zero",
    "answer",
    "at",
    "attention_knock_out",
    "attribution_patching",
    "bottleneck_study",
    "capture",
    "capture_prompt",
    "capture_size",
    "capture_step",
    "cut_attention",
    "describe",
    "edge_attribution_patching",
    "edit",
    "edit_cache",
    "explain",
    "fit_jacobian_lens",
    "fit_tuned_lens",
    "knock_out",
    "load_edits",
    "logit_lens",
    "patch",
    "patch_sweep",
    "path_patch",
    "remove",
    "reroute",
    "samplers_of",
    "save_edits",
    "sites",
    "steer",
    "steering_vector",
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
