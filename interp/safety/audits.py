"""The audit of a model on a file of prompts: `audit`."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import dgemma_jax as dg
from dgemma_jax.diffusion import prompts as inputs
from interp.features.directions import Directions
from interp.features.sae import SAE
from interp.features.sae_lens_files import load_sae, site_of
from interp.fingerprint import fingerprint
from interp.kept_chunks import Chunks
from interp.safety import audit_stages as stages
from interp.safety import findings
from interp.safety.audit_report import SCHEMA, SCHEMA_VERSION, AuditReport
from interp.safety.jailbreaks import jailbreak_mechanisms
from interp.safety.model_diff import compare_models
from interp.safety.prompt_files import read_prompts
from interp.safety.shared_features import check_sae, shared_features
from interp.safety.step_detectors import step_detectors
from interp.safety.trigger_search import find_triggers
from interp.safety.verdicts import COMPLIANCE, Rule
from interp.safety.watched_runs import Watch
from interp.safety.withheld import withheld_by_group

PARTS = ("words", "variants", "jailbreaks", "detectors")
_PACKAGES = ("dgemma-jax", "jax", "jaxlib", "flax", "numpy")
_COMPARED = 24  # prompts that a reference is compared on
_LAYERS = 6  # whose residuals are kept over the steps, at most


def audit(
    bundle: Any, prompts: Any, out: str | Path | None = None, *, rule: Rule | None = None,
    directions: Directions | None = None, parts: Sequence[str] = PARTS, layers: Sequence[int] | None = None,
    reference: Any = None, sae: Any = None, sae_site: str | None = None,
    synonyms: Mapping[str, Sequence[str]] | None = None, strength: float = 0.5, most: int = 2, draws: int = 4,
    batch: int = 32, seed: int = 0, sampler: dg.SamplerConfig | None = None, max_new_tokens: int | None = None,
    show: bool | None = None,
) -> AuditReport:  # fmt: skip
    """Which words and which internal feature cause a model's refusals, and what gets around them.

    >>> import dgemma_jax as dg, interp
    >>> report = interp.audit(dg.load("nano"), "prompts.jsonl", "audit")  # doctest: +SKIP
    >>> report.data["origin"]["verdict"]  # doctest: +SKIP
    'conjunction'

    Args:
        bundle: a bundle, its model edited or not.
        prompts: a JSONL file or a list, see `interp.safety.prompt_files.read_prompts`.
        out: a directory: the report goes there (audit.html, audit.json, prompts.csv), and finished parts, so that the
            same call made again goes on after them. None keeps nothing.
        rule: what counts as a refusal; by default English phrases, `interp.safety.verdicts.ENGLISH`.
        directions: a refusal feature chosen before, or elsewhere; by default found on half of these prompts, and its
            effects are counted on the other half.
        parts: which of `PARTS` are done beside generations, feature and interventions.
        layers: whose residuals are watched; by default six at most, evenly spaced.
        reference: a trusted checkpoint of the same architecture: the two are compared, and the vocabulary is searched
            for a trigger that takes the answers over here and not there. Prompts that come with right answers are
            read by probes in both.
        sae: an autoencoder, or a directory of SAELens' with one: which of its features do refusals share?
        sae_site: the full name of the site that it reads; by default what the directory names.
        synonyms: word -> words of the same meaning, for the question whether a refusal survives them.
        strength: of adding the feature, in residual norms.
        most: directions that make up the feature, at most.
        draws: of replacement words, at least 2: the error bars of saliency.
        batch: prompts at a time.
        seed: prompt of line n runs under `seed + n`.
        sampler, max_new_tokens: as for `dg.generate`; by default one canvas.
        show: progress bars; None shows them in a terminal or notebook.

    Raises:
        ValueError: no tokenizer, no prompt that can be read, an unknown part, a directory with another audit in it.
    """
    began = time.time()
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise ValueError(f"unknown parts {unknown}; there are {', '.join(PARTS)}")
    if batch < 1 or draws < 2 or most < 1:
        raise ValueError(f"needed are batch >= 1, draws >= 2, most >= 1; got {batch}, {draws}, {most}")
    model, tokenizer, _ = inputs.parts(bundle)
    if tokenizer is None:
        raise ValueError("an audit reads texts: give a bundle, not a bare model")
    if hasattr(bundle, "check_finite"):
        bundle.check_finite()
    file, rule = read_prompts(prompts), rule or Rule()
    sae, sae_site = _autoencoder(bundle, sae, sae_site)
    length = model.config.canvas_length if max_new_tokens is None else max_new_tokens
    count = model.config.num_layers
    evenly = sorted({round(i) for i in np.linspace(0, count - 1, min(_LAYERS, count))})
    layers = tuple(evenly if layers is None else layers)
    watch = Watch(rule.openings(tokenizer, model.config.canvas_length), tuple(f"layers.{i}.resid_post" for i in layers))
    settings = dict(
        rule=rule.statement, opens=watch.openings, layers=layers, synonyms=dict(synonyms or {}), strength=strength,
        most=most, draws=draws, seed=seed, sampler=repr(sampler or bundle.sampler), max_new_tokens=length, batch=batch,
        directions=None if directions is None else hashlib.sha256(directions.best.tobytes()).hexdigest()[:16],
    )  # fmt: skip
    task = stages.Task(
        bundle=bundle, rule=rule, watch=watch, seed=seed, batch=batch, sampler=sampler, max_new_tokens=length,
        show=show, chunks=Chunks(None if out is None else Path(out) / "parts", bundle, file.prompts, settings),
    )  # fmt: skip
    rows = stages.admitted(bundle, file.prompts, length)
    ran = [row for row in rows if row["why_not"] is None]
    if not ran:
        raise ValueError(f"none of {len(rows)} prompts can be run; the first: {rows[0]['why_not']}")

    means = stages.generations(task, ran)
    shared, why_none = stages.feature(task, ran, directions, most)
    if shared is not None:
        stages.activations(task, ran, shared, means, layers)
        stages.interventions(task, ran, shared, strength)
    shares = None if sae is None else shared_features(task, ran, sae, sae_site)
    if "words" in parts:
        stages.words(task, ran, draws)
    if "variants" in parts:
        stages.variants(task, ran, synonyms)
    needed = findings.word_table(ran)
    single = stages.single_words(task, ran) if "words" in parts else []
    pairs = jailbreak_mechanisms(task, ran, shared) if "jailbreaks" in parts else None
    benign = np.array([row["verdict"] == COMPLIANCE and not row["phrase"] and row["label"] != "harmful" for row in ran])
    told = {row["line"]: row for row in ran}
    rows = [told.get(row["line"], row) for row in rows]
    data = {
        "schema": SCHEMA, "schema_version": SCHEMA_VERSION,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": {"name": Path(bundle.source or "a model").name, "layers": count, "fingerprint": fingerprint(bundle),
                  "canvas_length": model.config.canvas_length},
        "manifest": _manifest(prompts, settings, parts, began) | {"rule": rule.as_data},
        "problems": list(file.problems), "prompts": rows,
        "overview": findings.overview(rows), "labels": findings.by(rows, "label"), "groups": findings.by(rows, "group"),
        "feature": _of_feature(shared, why_none), "sae": shares, "words": needed,
        "origin": findings.origin(single, needed),
        "brittleness": findings.brittleness(ran) | {"paraphrases": findings.paraphrases(ran)}, "jailbreaks": pairs,
        "detectors": _detectors(ran, means, benign, seed) if "detectors" in parts else None,
        **_against(task, ran, benign, reference), "withheld": _withheld(task, ran, reference),
    }  # fmt: skip
    report = AuditReport(stages.plain(data))
    if out is not None:
        report.save(out)
    return report


def _against(task: stages.Task, rows: Sequence[Mapping[str, Any]], benign: np.ndarray, reference: Any) -> dict:
    """The comparison with a reference, on prompts that were answered: "diff" and "triggers", None without one."""
    alone = [row["text"] for row, is_benign in zip(rows, benign, strict=True) if is_benign and not row["before"]]
    asked = alone[:_COMPARED]
    if reference is None or len(asked) < 4:
        return {"diff": None, "triggers": None}

    def work() -> dict[str, Any]:
        options = dict(seed=task.seed, sampler=task.sampler)
        found = find_triggers(task.bundle, asked, reference=reference, show=task.show, **options)
        told = {"triggers": found.as_data() | {"tried": len(found.ids)}}
        return told | {"diff": compare_models(task.bundle, reference, asked, **options).as_data()}

    return task.kept(0, f"against {fingerprint(reference)}", work)


def _withheld(task: stages.Task, rows: Sequence[Mapping[str, Any]], reference: Any) -> list[dict[str, Any]] | None:
    """Whether probes know right answers that the texts do not give; None where the file tells none."""
    if all(row["right"] is None for row in rows):
        return None
    kind = "withheld" if reference is None else f"withheld {fingerprint(reference)}"
    options = dict(reference=reference, seed=task.seed, sampler=task.sampler)
    return task.kept(0, kind, lambda: withheld_by_group(task.bundle, rows, **options))


def _autoencoder(bundle: Any, given: Any, site: str | None) -> tuple[SAE | None, str | None]:
    """An autoencoder and its site, checked before any work."""
    if given is None:
        return None, None
    sae = given if isinstance(given, SAE) else load_sae(given)
    site = site or (None if isinstance(given, SAE) else site_of(given))
    if not site:
        raise ValueError("which site does the autoencoder read? Give sae_site, for instance layers.3.resid_post")
    check_sae(bundle, sae, site)
    return sae, site


def _of_feature(shared: Any, why_none: str) -> dict[str, Any]:
    if shared is None:
        return {"found": False, "why": why_none}
    found, layer = shared.found, shared.place[0]
    return {
        "found": True, "places": [found.places[k] for k in found.chosen], "read_in_layer": layer,
        "resting": shared.resting, "refusing": shared.refusing, "added_in_layers": shared.layers,
    }  # fmt: skip


def _detectors(rows: Sequence[Mapping[str, Any]], means: np.ndarray, benign: np.ndarray, seed: int) -> dict[str, Any]:
    """Of prompts with a phrase that were answered, and of refused ones, against ordinary answers."""
    steps = np.array([row["steps"] for row in rows])
    kinds = {
        "jailbreaks": np.array([bool(row["phrase"]) and row["verdict"] == COMPLIANCE for row in rows]),
        "refusals": np.array([row["verdict"] == "refusal" and not row["phrase"] for row in rows]),
    }  # fmt: skip
    return {kind: step_detectors(means, steps, benign, odd, seed=seed) for kind, odd in kinds.items()}


def _manifest(prompts: Any, settings: Mapping[str, Any], parts: Sequence[str], began: float) -> dict[str, Any]:
    is_path = isinstance(prompts, str | Path)
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    content = Path(prompts).read_bytes() if is_path else json.dumps(list(map(str, prompts))).encode()
    return {
        "prompts": Path(prompts).name if is_path else "a list", "sha256": hashlib.sha256(content).hexdigest(),
        "settings": dict(settings), "parts": list(parts), "seconds": round(time.time() - began, 1),
        "versions": versions | {"python": platform.python_version()},
    }  # fmt: skip
