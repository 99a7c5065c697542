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
    from interp.depth.marks import mark
    from interp.depth.programs import ModelDepth, model_depth
    from interp.depth.results import SerialDepth
    from interp.depth.serial import serial_depth
    from interp.edge_attribution import edge_attribution_patching
    from interp.edge_maps import EdgeMap
    from interp.edit_files import load_edits, save_edits
    from interp.edit_list import describe
    from interp.editing import edit, remove
    from interp.edits import Add, Edit, Mean, Patch, ProjectOut, Renoise, Replace, Resample, Scale, Zero
    from interp.effect_maps import EffectMap
    from interp.features.activation_sets import ActivationSet
    from interp.features.collecting import collect_activations
    from interp.features.directions import Directions, find_directions, select_directions
    from interp.features.feature_edits import ablate_features, splice_sae, steer_features
    from interp.features.lifetimes import FeatureLife, feature_life, top_contexts
    from interp.features.pooling import Pooled, pool_residuals
    from interp.features.probe_results import Probes
    from interp.features.probes import fit_probes, fit_time_probes, probe_transfer
    from interp.features.projection import ablate_directions, ablate_writes, orthogonalized, resting_components
    from interp.features.sae import SAE, explained_variance
    from interp.features.sae_lens_files import load_sae, save_sae
    from interp.features.sae_training import TrainedSAE, train_sae
    from interp.features.score_field import DenoisingField, denoising_field
    from interp.features.splicing_loss import SplicedLoss, spliced_loss
    from interp.flow.acceptance import settled_fraction, transitions
    from interp.flow.carriers_taken import CarrierSplit, carrier_split
    from interp.flow.identity_classes import TokenIdentity, nearest_tokens, token_identity
    from interp.flow.injection import Injections, inject, parallel_response
    from interp.flow.kill_arms import Kills, token_kills
    from interp.flow.recorded import Specials, content
    from interp.flow.routing_flow import ExpertFlow, expert_flow
    from interp.flow.sinks import Sinks, attention_sinks
    from interp.flow.step_curves import StepCurves
    from interp.flow.step_divergences import divergences
    from interp.flow.token_watch import TokenWatch
    from interp.jacobian_lens import fit_jacobian_lens
    from interp.knockout import knock_out
    from interp.lens_readings import LensReadings
    from interp.lenses import logit_lens
    from interp.masking.faithfulness_cases import FaithfulnessCase
    from interp.masking.faithfulness_suite import faithfulness
    from interp.masking.faithfulness_tables import Faithfulness
    from interp.masking.masked_diffusion import saliency
    from interp.masking.saliency_maps import Saliency
    from interp.masking.step_maps import saliency_by_step, step_heat_map
    from interp.masking.targets import TextEnergy, refusal_margin
    from interp.metrics import Divergence, LogitDifference, LogProb, Says, SetLogProb, answer
    from interp.monitor.load_bearing import LoadBearing, load_bearing
    from interp.monitor.measure import Monitorability, monitorability
    from interp.monitor.monitors import AskMonitor, ProbeMonitor
    from interp.monitor.rollouts import MonitorCase, Rollouts, monitor_rollouts
    from interp.order.answer_locks import AnswerLock, answer_lock
    from interp.order.canvas_dependence import Dependence, dependence
    from interp.order.cloze_tests import Circulation, Cloze, circulation, cloze
    from interp.order.commit_steps import Commits, commits
    from interp.order.confidence_auroc import Confidence, confidence
    from interp.order.degenerate_loops import Loops, find_loops
    from interp.order.energies import Energy, energy
    from interp.order.intermediate import Intermediate, Necessity, intermediate_tokens, necessity
    from interp.order.lengths import LengthForesight, length_estimate, length_foresight, watch_length
    from interp.order.order_measures import CommitOrder, commit_order
    from interp.order.sequence_smears import SequenceSmear, sequence_smear
    from interp.order.thought_anchors import Anchors, thought_anchors
    from interp.order.token_smears import smeared_tokens, token_smear
    from interp.patching import Patched, patch
    from interp.path_patching import Receiver, path_patch
    from interp.questions import Questions
    from interp.routing import Reroute, reroute
    from interp.safety.audit_report import AuditReport
    from interp.safety.audits import audit
    from interp.safety.hardening import harden, training_pairs
    from interp.safety.model_diff import ModelDiff, compare_models
    from interp.safety.trigger_search import Triggers, find_triggers
    from interp.safety.withheld import Withheld, withheld_ability
    from interp.steering import SteeringVector, steer, steering_vector
    from interp.studies.prompt_files import StudyPrompts
    from interp.studies.reproducing import Reproduction, reproduce
    from interp.studies.results import Study
    from interp.studies.running import study
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
    "depth.marks": ("mark",),
    "depth.programs": ("ModelDepth", "model_depth"),
    "depth.results": ("SerialDepth",),
    "depth.serial": ("serial_depth",),
    "edge_attribution": ("edge_attribution_patching",),
    "edge_maps": ("EdgeMap",),
    "edit_files": ("load_edits", "save_edits"),
    "edit_list": ("describe",),
    "editing": ("edit", "remove"),
    "edits": ("Add", "Edit", "Mean", "Patch", "ProjectOut", "Renoise", "Replace", "Resample", "Scale", "Zero"),
    "effect_maps": ("EffectMap",),
    "features.activation_sets": ("ActivationSet",),
    "features.collecting": ("collect_activations",),
    "features.directions": ("Directions", "find_directions", "select_directions"),
    "features.feature_edits": ("ablate_features", "splice_sae", "steer_features"),
    "features.lifetimes": ("FeatureLife", "feature_life", "top_contexts"),
    "features.pooling": ("Pooled", "pool_residuals"),
    "features.probe_results": ("Probes",),
    "features.probes": ("fit_probes", "fit_time_probes", "probe_transfer"),
    "features.projection": ("ablate_directions", "ablate_writes", "orthogonalized", "resting_components"),
    "features.sae": ("SAE", "explained_variance"),
    "features.sae_lens_files": ("load_sae", "save_sae"),
    "features.sae_training": ("TrainedSAE", "train_sae"),
    "features.score_field": ("DenoisingField", "denoising_field"),
    "features.splicing_loss": ("SplicedLoss", "spliced_loss"),
    "flow.acceptance": ("settled_fraction", "transitions"),
    "flow.carriers_taken": ("CarrierSplit", "carrier_split"),
    "flow.identity_classes": ("TokenIdentity", "nearest_tokens", "token_identity"),
    "flow.injection": ("Injections", "inject", "parallel_response"),
    "flow.kill_arms": ("Kills", "token_kills"),
    "flow.recorded": ("Specials", "content"),
    "flow.routing_flow": ("ExpertFlow", "expert_flow"),
    "flow.sinks": ("Sinks", "attention_sinks"),
    "flow.step_curves": ("StepCurves",),
    "flow.step_divergences": ("divergences",),
    "flow.token_watch": ("TokenWatch",),
    "jacobian_lens": ("fit_jacobian_lens",),
    "knockout": ("knock_out",),
    "lens_readings": ("LensReadings",),
    "lenses": ("logit_lens",),
    "masking.faithfulness_cases": ("FaithfulnessCase",),
    "masking.faithfulness_suite": ("faithfulness",),
    "masking.faithfulness_tables": ("Faithfulness",),
    "masking.masked_diffusion": ("saliency",),
    "masking.saliency_maps": ("Saliency",),
    "masking.step_maps": ("saliency_by_step", "step_heat_map"),
    "masking.targets": ("TextEnergy", "refusal_margin"),
    "metrics": ("Divergence", "LogProb", "LogitDifference", "Says", "SetLogProb", "answer"),
    "monitor.load_bearing": ("LoadBearing", "load_bearing"),
    "monitor.measure": ("Monitorability", "monitorability"),
    "monitor.monitors": ("AskMonitor", "ProbeMonitor"),
    "monitor.rollouts": ("MonitorCase", "Rollouts", "monitor_rollouts"),
    "order.answer_locks": ("AnswerLock", "answer_lock"),
    "order.canvas_dependence": ("Dependence", "dependence"),
    "order.cloze_tests": ("Circulation", "Cloze", "circulation", "cloze"),
    "order.commit_steps": ("Commits", "commits"),
    "order.confidence_auroc": ("Confidence", "confidence"),
    "order.degenerate_loops": ("Loops", "find_loops"),
    "order.energies": ("Energy", "energy"),
    "order.intermediate": ("Intermediate", "Necessity", "intermediate_tokens", "necessity"),
    "order.lengths": ("LengthForesight", "length_estimate", "length_foresight", "watch_length"),
    "order.order_measures": ("CommitOrder", "commit_order"),
    "order.sequence_smears": ("SequenceSmear", "sequence_smear"),
    "order.thought_anchors": ("Anchors", "thought_anchors"),
    "order.token_smears": ("smeared_tokens", "token_smear"),
    "patching": ("Patched", "patch"),
    "path_patching": ("Receiver", "path_patch"),
    "questions": ("Questions",),
    "routing": ("Reroute", "reroute"),
    "safety.audit_report": ("AuditReport",),
    "safety.audits": ("audit",),
    "safety.hardening": ("harden", "training_pairs"),
    "safety.model_diff": ("ModelDiff", "compare_models"),
    "safety.trigger_search": ("Triggers", "find_triggers"),
    "safety.withheld": ("Withheld", "withheld_ability"),
    "steering": ("SteeringVector", "steer", "steering_vector"),
    "studies.prompt_files": ("StudyPrompts",),
    "studies.reproducing": ("Reproduction", "reproduce"),
    "studies.results": ("Study",),
    "studies.running": ("study",),
    "surgery": ("at", "sites"),
    "sweeps": ("patch_sweep",),
    "taps": ("capture_step",),
    "tuned_lens": ("fit_tuned_lens",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [  # noqa: RUF022 (plain order, `SAE` among the names)
    "ActivationSet",
    "Activations",
    "Add",
    "AffineLens",
    "Anchors",
    "AnswerLock",
    "AskMonitor",
    "AuditReport",
    "BottleneckStudy",
    "Bump",
    "CarrierSplit",
    "Circulation",
    "Cloze",
    "CommitOrder",
    "Commits",
    "Confidence",
    "DenoisingField",
    "Dependence",
    "Directions",
    "Divergence",
    "DropRank",
    "Echo",
    "EdgeMap",
    "Edit",
    "EffectMap",
    "Energy",
    "ExpertFlow",
    "Explanation",
    "Faithfulness",
    "FaithfulnessCase",
    "FeatureLife",
    "Flat",
    "Inject",
    "Injections",
    "Intermediate",
    "Kill",
    "Kills",
    "LengthForesight",
    "LensReadings",
    "LoadBearing",
    "LogProb",
    "LogitDifference",
    "Loops",
    "Mean",
    "Mix",
    "ModelDepth",
    "ModelDiff",
    "MonitorCase",
    "Monitorability",
    "Necessity",
    "Patch",
    "Patched",
    "Pooled",
    "ProbeMonitor",
    "Probes",
    "ProjectOut",
    "Questions",
    "Receiver",
    "Renoise",
    "Replace",
    "Reproduction",
    "Reroute",
    "Resample",
    "Rollouts",
    "SAE",
    "Saliency",
    "Says",
    "Scale",
    "SequenceSmear",
    "SerialDepth",
    "SetLogProb",
    "Sinks",
    "Smooth",
    "Specials",
    "SplicedLoss",
    "SteeringVector",
    "StepCurves",
    "Study",
    "StudyPrompts",
    "SwapRanks",
    "TextEnergy",
    "TokenIdentity",
    "TokenWatch",
    "TrainedSAE",
    "Triggers",
    "Withheld",
    "Zero",
    "ablate_directions",
    "ablate_features",
    "ablate_writes",
    "answer",
    "answer_lock",
    "at",
    "attention_knock_out",
    "attention_sinks",
    "attribution_patching",
    "audit",
    "bottleneck_study",
    "capture",
    "capture_prompt",
    "capture_size",
    "capture_step",
    "carrier_split",
    "circulation",
    "cloze",
    "collect_activations",
    "commit_order",
    "commits",
    "compare_models",
    "confidence",
    "content",
    "cut_attention",
    "denoising_field",
    "dependence",
    "describe",
    "divergences",
    "edge_attribution_patching",
    "edit",
    "edit_cache",
    "energy",
    "expert_flow",
    "explain",
    "explained_variance",
    "faithfulness",
    "feature_life",
    "find_directions",
    "find_loops",
    "find_triggers",
    "fit_jacobian_lens",
    "fit_probes",
    "fit_time_probes",
    "fit_tuned_lens",
    "harden",
    "inject",
    "intermediate_tokens",
    "knock_out",
    "length_estimate",
    "length_foresight",
    "load_bearing",
    "load_edits",
    "load_sae",
    "logit_lens",
    "mark",
    "model_depth",
    "monitor_rollouts",
    "monitorability",
    "nearest_tokens",
    "necessity",
    "orthogonalized",
    "parallel_response",
    "patch",
    "patch_sweep",
    "path_patch",
    "pool_residuals",
    "probe_transfer",
    "refusal_margin",
    "remove",
    "reproduce",
    "reroute",
    "resting_components",
    "saliency",
    "saliency_by_step",
    "samplers_of",
    "save_edits",
    "save_sae",
    "select_directions",
    "sequence_smear",
    "serial_depth",
    "settled_fraction",
    "sites",
    "smeared_tokens",
    "splice_sae",
    "spliced_loss",
    "steer",
    "steer_features",
    "steering_vector",
    "step_heat_map",
    "study",
    "thought_anchors",
    "token_bottleneck",
    "token_identity",
    "token_kills",
    "token_smear",
    "top_contexts",
    "train_sae",
    "training_pairs",
    "transitions",
    "watch_length",
    "withheld_ability",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
