"""Directions taken out of a model: of its activations, or of its weights for good.

    h <- h - u (u . h - c)        u of length 1; c = 0 removes the direction, c = u . mean(h | harmless) resets it

Arditi et al. 2024, arXiv 2406.11717; with c, affine concept editing, arXiv 2411.09003.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dgemma_jax.nn.functional import of
from dgemma_jax.nn.quantized import check_plain
from interp.captures import capture, capture_prompt
from interp.editing import edit, rewrapped
from interp.edits import Edit

# Each resid_pre but the first is the resid_post before it.
STREAM = ("layers.0.resid_pre", "layers.*.resid_mid", "layers.*.resid_post")


@nnx.dataclass(eq=False)
class SetAlong(Edit):
    """Sets the component along `unit` to `target`. Both may differ by row: that is how a sweep over directions runs.

    Attributes:
        unit: [.., D], of length 1; zeros change nothing.
        target: [.., 1].
    """

    VALUES: ClassVar = {"unit": None, "target": None}
    unit: Any = nnx.data()
    target: Any = nnx.data()

    def apply(self, x: jax.Array) -> jax.Array:
        wide, unit = x.astype(jnp.float32), self.here(self.unit, x).astype(jnp.float32)
        missing = self.here(self.target, x).astype(jnp.float32) - jnp.sum(wide * unit, -1, keepdims=True)
        return (wide + missing * unit).astype(x.dtype)


def ablate_directions(
    bundle: Any, directions: Any, sites: Any = STREAM, *, targets: Any = 0.0, phase: str = "both",
    steps: Any = None, layers: Any = None, rows: Any = None, sampler: Any = None,
) -> Any:  # fmt: skip
    """The model, or bundle, without a direction at every site that matches, in the prompt and on the canvas.

    >>> import dgemma_jax as dg, interp, numpy as np
    >>> model = dg.nn.transformer.initialize(dg.ModelConfig.tiny())
    >>> interp.describe(interp.ablate_directions(model, np.ones(32)))  # doctest: +ELLIPSIS
    14 edits...

    Args:
        directions: [D]; [n, D], removed together, as a span; or [B, n, D], for each row of a batch its own. Any length.
        sites: patterns; by default the whole residual stream.
        targets: the component left behind: a number; [n]; [B, n], in the units of the activation, along the
            orthonormal basis that the directions make in their order; or what `resting_components` gives, for each
            pass and site its own. 0 removes it.
        phase: "both" passes, "prefill" (the prompt) or "denoise" (the canvas).
        steps, layers, rows: as for `interp.edit`.

    Raises:
        ValueError: a direction of another width, of no length, or not finite.
    """
    basis_BND = orthonormal_rows(bundle, directions)
    is_by_site = isinstance(targets, Mapping)
    targets_BN = np.broadcast_to(np.asarray(0 if is_by_site else targets, np.float32), basis_BND.shape[:2])
    patterns = [sites] if isinstance(sites, str) else list(sites)
    for phase_ in ("prefill", "denoise") if phase == "both" else (phase,):
        when = steps if phase_ == "denoise" else None
        for number in range(basis_BND.shape[1]):
            unit, target = basis_BND[:, number], targets_BN[:, number, None]
            if len(unit) > 1:
                unit, target = unit[:, None], target[:, None]  # [B, 1, D]: rows, all positions
            else:
                unit, target = unit[0], target[0]
            if is_by_site:
                rank = target.ndim
                target = {
                    name: own[number].reshape([1] * rank).astype(np.float32) for name, own in targets[phase_].items()
                }
            for pattern in patterns:
                bundle = edit(
                    bundle, pattern, SetAlong(unit, target), phase=phase_, steps=when, layers=layers, rows=rows,
                    per_layer=False, sampler=sampler,
                )  # fmt: skip
    return bundle


def resting_components(
    bundle: Any, directions: Any, prompts: Any, sites: Any = STREAM, *, seed: int = 0, sampler: Any = None
) -> dict[str, dict[str, np.ndarray]]:
    """The mean component along directions [n, D] where nothing is to be removed: targets for `ablate_directions`.

    Args:
        prompts: those that do not show the behaviour. The mean goes over all their positions, and over the positions
            of the canvas at the first step.

    Returns:
        {"prefill" or "denoise": {full site name: [n]}}.
    """
    basis_ND = orthonormal_rows(bundle, directions)[0]
    prompt = capture_prompt(bundle, prompts, sites)
    canvas = capture(bundle, prompts, sites, [0], seed=seed, sampler=sampler)
    share_BT = (prompt.valid / prompt.valid.sum())[..., None]
    return {
        "prefill": {name: basis_ND @ (x * share_BT).sum((0, 1)) for name, x in prompt.items()},
        "denoise": {name: basis_ND @ x.astype(np.float64).mean((0, 1, 2)) for name, x in canvas.items()},
    }


def orthonormal_rows(bundle: Any, directions: Any) -> np.ndarray:
    """[B or 1, n, D] orthonormal bases of the spans, in the order given."""
    given = np.asarray(directions, np.float64)
    width = of(bundle).config.embed_dim
    if given.ndim not in (1, 2, 3) or given.shape[-1] != width:
        raise ValueError(f"directions has shape {given.shape}; needed is [{width}], [n, {width}] or [B, n, {width}]")
    if not np.isfinite(given).all() or not np.linalg.norm(given, axis=-1).all():
        raise ValueError("a direction is zero or not finite: there is nothing to remove along it")
    stacked = given.reshape(-1, *given.shape[-2:]) if given.ndim > 1 else given[None, None]
    basis = np.zeros_like(stacked)
    for number in range(stacked.shape[1]):
        rest = stacked[:, number]
        length = np.linalg.norm(rest, axis=-1, keepdims=True)
        for _ in range(2):  # twice is enough for orthogonality to rounding
            rest = rest - np.einsum("bn,bnd->bd", np.einsum("bnd,bd->bn", basis[:, :number], rest), basis[:, :number])
        size = np.linalg.norm(rest, axis=-1, keepdims=True)
        basis[:, number] = np.where(size > 1e-5 * length, rest / np.maximum(size, 1e-30), 0)
    return basis.astype(np.float32)


def write_directions(bundle: Any, direction: Any) -> dict[str, np.ndarray]:
    """By full site name, the direction [D] whose removal there keeps u = `direction` out of the residual stream.

    What attention and feed-forwards write passes a norm with weights w first, and u . (w * y) = (w * u) . y: the
    direction to remove from y is w * u. The norm divides by a number, which moves nothing along u.
    """
    model = of(bundle)
    u_D = orthonormal_rows(bundle, direction)[0, 0].astype(np.float64)

    def through(u: np.ndarray, *norms: Any) -> np.ndarray:
        for norm in norms:
            u = u * np.asarray(norm.weight[...], np.float64)
        return u

    found = {"canvas_embed": u_D, "self_conditioning": u_D, "token_embed": u_D}
    for number, layer in enumerate(model.layers):
        at = f"layers.{number}."
        found[at + "attn_out"] = through(u_D, layer.post_attn_norm)
        found[at + "mlp_out"] = through(u_D, layer.post_ffw_norm, layer.post_mlp_norm)
        found[at + "moe_out"] = through(u_D, layer.post_ffw_norm, layer.post_moe_norm)
    return found


def ablate_writes(bundle: Any, direction: Any) -> Any:
    """The model whose parts do not write along a direction: the same function as `orthogonalized`, as edits.

    The embeddings of prompt and canvas tokens are left as they are.
    """
    for name, u_D in write_directions(bundle, direction).items():
        if name in ("canvas_embed", "token_embed"):
            continue
        for phase in ("denoise",) if name == "self_conditioning" else ("prefill", "denoise"):
            unit = u_D / np.linalg.norm(u_D)
            bundle = edit(bundle, name, SetAlong(unit.astype(np.float32), np.zeros(1, np.float32)), phase=phase)
    return bundle


def orthogonalized(bundle: Any, direction: Any) -> Any:
    """The model, or bundle, whose output matrices cannot write along a direction; weights change, nothing is edited.

        W <- (I - u u^T) W        u as `write_directions` gives it for the site that W writes to

    Attention, dense MLPs, experts and self-conditioning are projected. The table of embeddings is not: it is the
    matrix of the logits too, and without its part along u the model would read other words, and say others.

    Raises:
        ValueError: a direction of another width, of no length, or not finite; a model without weights, or with packed
            ones.
    """
    model = of(bundle)
    if isinstance(jax.tree.leaves(model)[0], jax.ShapeDtypeStruct):
        raise ValueError("this model has no weights to project; load it with dg.load")
    check_plain(model, "projected")
    model = jax.tree.map(lambda leaf: leaf, model)  # modules of our own; weights are shared

    def project(matrix: jax.Array, u_D: np.ndarray, axis: int) -> jax.Array:
        unit = jnp.asarray(u_D / np.linalg.norm(u_D), jnp.float32)
        wide = jnp.moveaxis(matrix.astype(jnp.float32), axis, -1)
        wide = wide - (wide @ unit)[..., None] * unit
        return jnp.moveaxis(wide, -1, axis).astype(matrix.dtype)

    along = write_directions(bundle, direction)
    conditioning = model.self_conditioning
    conditioning.down[...] = project(conditioning.down[...], along["self_conditioning"], 0)  # [D, F]
    for number, layer in enumerate(model.layers):
        at = f"layers.{number}."
        layer.attention.o[...] = project(layer.attention.o[...], along[at + "attn_out"], 0)  # [D, N, H]
        layer.mlp.down[...] = project(layer.mlp.down[...], along[at + "mlp_out"], 0)  # [D, F]
        layer.experts.down[...] = project(layer.experts.down[...], along[at + "moe_out"], 2)  # [E, F, D]
    return rewrapped(bundle, model)

