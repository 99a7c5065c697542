"""Which features of a given autoencoder refusals share, and whether refusals hang on them.

Features are read where all that decides comes from the prompt: at its last token in the causal pass, and on the canvas
at the first step, as a mean over positions. A feature is shared if it is higher in refusals by more than chance:

    t_f = (mean over refused - mean over answered) / (standard deviation over all)

beyond what the largest t of all features and both places reaches in 95 % of shuffles of the verdicts. Half of the
prompts say which features these are; on the other half they are taken out of both passes, against as many others that
are active there too. That a feature fires on refusals makes it no cause: only what its removal ends tells.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from interp import surgery
from interp.captures import capture, capture_prompt
from interp.features.feature_edits import ablate_features
from interp.features.sae import SAE
from interp.safety.findings import difference, share
from interp.safety.verdicts import COMPLIANCE, REFUSAL
from interp.safety.watched_runs import verdict_of

PLACES = ("the prompt's end", "the canvas, step 1")
MOST = 8  # features taken out together
TRIED = 48  # prompts of each kind that they are taken out of, at most
_FEWEST = 4  # prompts of each kind
_DRAWS = 3  # of other features
_SHUFFLES = 200

Row = Mapping[str, Any]


def shared_features(task: Any, rows: Sequence[Row], sae: SAE, site: str) -> dict[str, Any]:
    """What the refusals of an audit share in the features of an autoencoder.

    Args:
        task: of the audit, see `audit_stages.Task`.
        rows: prompts that ran; those marked "fit" say which features are shared, the others are what they are tried on.
        sae: reads and writes the site, see `check_sae`.

    Returns:
        {"site", "features", "alive", "shared": [{"feature", "place", "t", "in_refusals", "in_answers"}], "beyond": the
        t of chance, "number" of all that are shared, and shares: "ended", "ended_others", "explained" (their
        difference), "changed", "changed_others" (answers)}; or {"site", "why"} with too few prompts.
    """
    plain = [row for row in rows if not row["phrase"]]
    fit = [[row for row in plain if row["verdict"] == kind and row.get("fit")] for kind in (REFUSAL, COMPLIANCE)]
    held = [[row for row in plain if row["verdict"] == kind and not row.get("fit")] for kind in (REFUSAL, COMPLIANCE)]
    if min(map(len, [*fit, *held])) < _FEWEST:
        counts = ", ".join(str(len(side)) for side in [*fit, *held])
        why = f"at least {_FEWEST} refused and as many answered prompts are needed in both halves, there are {counts}"
        return {"site": site, "why": why}
    digest = hashlib.sha256(site.encode())
    for leaf in jax.tree.leaves(sae):
        digest.update(np.asarray(leaf).tobytes())
    held = [side[:TRIED] for side in held]
    return task.kept(
        0, f"shared features {digest.hexdigest()[:16]}", lambda: _measured(task, fit, held, sae, site)
    )  # fmt: skip


def check_sae(bundle: Any, sae: SAE, site: str) -> None:
    """Whether features can be read and taken out there, in both passes.

    Raises:
        ValueError: not one site that both passes have, another width, an autoencoder conditioned on the noise level.
    """
    infos = surgery.sites(bundle).matching(site)
    if len(infos) != 1 or infos[0].axes != "BTD" or infos[0].name == "token_embed":
        raise ValueError(f"{site!r} must be one site that both passes have, such as layers.3.resid_post")
    if sae.shift is not None:
        raise ValueError("this autoencoder is conditioned on the noise level: give sae.at_level(1.0), that of step 1")
    if not sae.w_enc.shape[0] == sae.w_dec.shape[1] == infos[0].shape[-1]:
        raise ValueError(f"{site} has width {infos[0].shape[-1]}; this is a {sae}: it must read and write the width")


def _measured(task: Any, fit: Sequence, held: Sequence, sae: SAE, site: str) -> dict[str, Any]:
    from interp.safety.audit_stages import said_in

    prompts = [said_in(row) for side in fit for row in side]
    seeds = [task.seed_of(row) for side in fit for row in side]
    z_NPF = read_features(task.bundle, sae, site, prompts, seeds, batch=task.batch, sampler=task.sampler)
    refused = np.arange(len(prompts)) < len(fit[0])
    t_PF, beyond = contrast(z_NPF, refused, seed=task.seed)
    best_F, place_F = t_PF.max(0), t_PF.argmax(0)
    order = np.argsort(-best_F, kind="stable")
    number = int((best_F > beyond).sum())
    chosen = order[: min(number, MOST)]
    alive = np.flatnonzero((z_NPF > 0).any((0, 1)))
    told: dict[str, Any] = {
        "site": site, "features": sae.num_features, "alive": len(alive), "beyond": beyond, "number": number,
        "shared": [
            {"feature": int(f), "place": PLACES[place_F[f]], "t": float(best_F[f]),
             "in_refusals": share(z_NPF[refused, place_F[f], f] > 0),
             "in_answers": share(z_NPF[~refused, place_F[f], f] > 0)}
            for f in chosen
        ],
    }  # fmt: skip
    others = np.setdiff1d(alive, order[:number])
    if not number or len(others) < len(chosen):
        return told
    rng = np.random.default_rng(task.seed)
    sets = [chosen, *(rng.choice(others, len(chosen), replace=False) for _ in range(_DRAWS))]
    tried = [row for side in held for row in side]
    watch = dataclasses.replace(task.watch, sites=())
    ended, changed = [], []
    for features in sets:
        edited = ablate_features(task.bundle, sae, site, features.tolist(), phase="both")
        found = task.runs(
            [said_in(row) for row in tried], [task.seed_of(row) for row in tried], drafts=False,
            watch=watch, edited=lambda _, edited=edited: edited,
        )  # fmt: skip
        runs = list(zip(tried, found, strict=True))
        ended.append([verdict_of(task.rule, run) != REFUSAL for row, run in runs if row["verdict"] == REFUSAL])
        changed.append([run.text != row["answer"] for row, run in runs if row["verdict"] == COMPLIANCE])
    random = [np.mean(side[1:], 0) for side in (ended, changed)]
    return told | {
        "ended": share(ended[0]), "ended_others": share(random[0]), "explained": difference(ended[0], random[0]),
        "changed": share(changed[0]), "changed_others": share(random[1]),
    }  # fmt: skip


def contrast(z_NPF: np.ndarray, refused: np.ndarray, *, seed: int = 0) -> tuple[np.ndarray, float]:
    """(t [P, F], what the largest t of all reaches by chance): higher in refusals, by features and places.

    Args:
        z_NPF: features of N prompts at P places.
        refused: [N] bool.
    """
    z_NPF = np.asarray(z_NPF, np.float64)
    spread = z_NPF.std(0)
    scaled_NPF = np.where(spread > 1e-9, (z_NPF - z_NPF.mean(0)) / np.maximum(spread, 1e-9), 0)
    rng = np.random.default_rng(seed)
    labels_SN = np.stack([refused, *(rng.permutation(refused) for _ in range(_SHUFFLES))]).astype(float)
    weights_SN = labels_SN / labels_SN.sum(1, keepdims=True) - (1 - labels_SN) / (1 - labels_SN).sum(1, keepdims=True)
    t_SX = weights_SN @ scaled_NPF.reshape(len(refused), -1)
    return t_SX[0].reshape(spread.shape), float(np.quantile(t_SX[1:].max(1), 0.95))


def read_features(
    bundle: Any, sae: SAE, site: str, prompts: Sequence[Any], seeds: Sequence[int], *, batch: int, sampler: Any
) -> np.ndarray:
    """[N, P, F] of prompts at `PLACES`."""
    sampler = (bundle.sampler if sampler is None else sampler).replace(max_denoising_steps=1)
    found = []
    for first in range(0, len(prompts), batch):
        rows = [min(i, len(prompts) - 1) for i in range(first, first + batch)]  # the last repeated: one program
        given = [prompts[i] for i in rows]
        acts = capture_prompt(bundle, given, site)
        last_BD = acts[site][np.arange(batch), acts.valid.sum(1) - 1]
        canvas_BCD = capture(bundle, given, site, [0], seed=[seeds[i] for i in rows], sampler=sampler)[site][0]
        both = np.stack([_encoded(sae, last_BD[:, None]), _encoded(sae, canvas_BCD)], 1)
        found.append(both[: len(prompts) - first])
    return np.concatenate(found)


@jax.jit
def _means(sae: SAE, x_BCD: jax.Array) -> jax.Array:
    return jax.lax.map(lambda x_CD: sae.encode(x_CD).mean(0), x_BCD)  # a row at a time: features are many


def _encoded(sae: SAE, x_BCD: np.ndarray) -> np.ndarray:
    return np.asarray(_means(sae, jnp.asarray(x_BCD)))
