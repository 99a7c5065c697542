"""The tuned lens: an affine map a layer, trained so that each layer says what the last one will say.

    minimise over M_l, b_l:  E KL(p_last || softmax(cap tanh(W norm(M_l h_l + b_l) / cap)))

p_last is the model's own distribution at the same step and position, before temperature. Residuals come from real
generations, at steps drawn over the whole run: all noise levels that the model meets. Belrose et al. 2023, arXiv
2303.08112, whose maps also start at the identity.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dgemma_jax as dg
from dgemma_jax import progress
from dgemma_jax.config import SamplerConfig
from dgemma_jax.diffusion import prompts as inputs
from dgemma_jax.nn.functional import of
from interp.affine_lens import AffineLens, chosen_layers, identity_lens
from interp.editing import rewrapped
from interp.lenses import divergence, lens_logits
from interp.taps import tapped


def fit_tuned_lens(
    bundle: Any, prompts: Any, layers: Any = None, *, start: AffineLens | None = None, updates: int = 400,
    places: int = 256, rate: float | None = None, batch: int = 8, steps: int = 4, updates_a_run: int = 10,
    seed: int = 0, sampler: SamplerConfig | None = None, max_new_tokens: int | None = None, show: bool | None = None,
) -> AffineLens:  # fmt: skip
    """Train a tuned lens on the model's own generations. `interp.logit_lens(..., lens=...)` reads through it.

    >>> import dgemma_jax as dg, interp
    >>> model = dg.nn.transformer.initialize(dg.ModelConfig.tiny())
    >>> interp.fit_tuned_lens(model, [[5, 6]], updates=0)
    tuned (0 updates) lens of 3 layers, width 32

    Args:
        bundle: a bundle or a model; it is not trained.
        prompts: as for `dg.generate`; drawn from at random.
        layers: an integer, slice, list or mask; None for all. The last layer keeps the identity.
        start: goes on from this lens; None from the identity.
        updates: of Adam; the learning rate falls to 0 along them.
        places: positions an update, [places, V] float32 logits at a time.
        rate: learning rate at the start; by default 1 / (8 D), relative to residuals of unit mean square.
        batch: prompts a generation.
        steps: denoising steps whose residuals are kept of a generation.
        updates_a_run: updates on one generation, before the next is made; many of them learn its few places by heart.
        max_new_tokens: of a generation; by default one block.
        show: draw a progress bar; None draws it on a terminal.

    Raises:
        ValueError: no such layer, a number below its least, a start of other layers.
    """
    model, tokenizer, default = inputs.parts(bundle)
    sampler = default if sampler is None else sampler
    for name, number, least in (
        ("updates", updates, 0), ("places", places, 1), ("batch", batch, 1), ("steps", steps, 1),
        ("updates_a_run", updates_a_run, 1),
    ):  # fmt: skip
        if not isinstance(number, int) or number < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {number!r}")
    layers, last = chosen_layers(model, layers), model.config.num_layers - 1
    lens = identity_lens(model, layers) if start is None else start.fitting(model, layers)
    lens = dataclasses.replace(lens, method=f"tuned ({updates} updates)")
    learning = tuple(layer for layer in layers if layer != last)
    ids = inputs.to_ids(prompts, tokenizer, model.config.vocab_size)
    if not updates or not learning:
        return lens
    rng = np.random.default_rng(seed)
    source = _Source(rewrapped(bundle, _tapped(model, learning)), ids, learning, sampler, batch, steps, max_new_tokens)
    rate = jnp.float32(1 / (8 * model.config.embed_dim) if rate is None else rate)
    fit = None
    with progress.bar("training the lens", updates, show) as done:
        for first in range(0, updates, updates_a_run):
            x_LND = source.draw(rng)
            fit = _begin(lens.of_layers(learning), x_LND) if fit is None else fit
            for update in range(first, min(first + updates_a_run, updates)):
                some = rng.integers(x_LND.shape[1], size=places)
                fit = _update(
                    fit, x_LND[:, some], model.embedder, model.final_norm.weight[...], model.config.rms_norm_eps,
                    rate * (1 - update / updates),
                )  # fmt: skip
                done(1)
    trained = [layers.index(layer) for layer in learning]
    return dataclasses.replace(
        lens, matrix=lens.matrix.at[jnp.asarray(trained)].set(fit.matrix),
        bias=lens.bias.at[jnp.asarray(trained)].set(fit.shift * fit.unit[:, None]),
    )  # fmt: skip


def _tapped(model: Any, layers: tuple[int, ...]) -> Any:
    return tapped(of(model), [_site(layer) for layer in (*layers, model.config.num_layers - 1)])[0]


def _site(layer: int) -> str:
    return f"layers.{layer}.resid_post"


@dataclasses.dataclass
class _Source:
    """Residuals of generations, of a few steps each."""

    bundle: Any  # with taps
    ids: list[list[int]]
    layers: tuple[int, ...]
    sampler: SamplerConfig
    batch: int
    steps: int
    max_new_tokens: int | None
    longest: int = 0  # steps of the longest run so far: later ones need not be asked for

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """[L + 1, N, D] residuals of N places of one generation, those of the last layer at the end."""
        config, cap = of(self.bundle).config, self.sampler.max_denoising_steps
        kept = min(self.steps, cap)
        chosen = sorted(rng.choice(max(self.longest, kept), kept, replace=False).tolist())
        rows = rng.choice(len(self.ids), self.batch, replace=self.batch > len(self.ids))
        record = dataclasses.replace(dg.Record.nothing(), site_steps=tuple(chosen))
        run = dg.generate(
            self.bundle, [self.ids[r] for r in rows], rng.integers(2**32, size=self.batch), self.sampler,
            self.max_new_tokens or config.canvas_length, record,
        ).trajectory  # fmt: skip
        self.longest = max(self.longest, int(run.num_steps.max()))
        taken = run.valid[:, chosen]
        if not taken.any():  # all rows had ended before these steps
            return self.draw(rng)
        names = [_site(layer) for layer in (*self.layers, config.num_layers - 1)]
        return np.stack([run.sites[name][taken].reshape(-1, config.embed_dim) for name in names])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Fit:
    """What is trained, and where the optimiser stands.

    Attributes:
        matrix: [L, D, D].
        shift: [L, D], the bias in units of `unit`, so that one learning rate suits both.
        unit: [L], root mean square of the residuals.
        adam: state of the optimiser.
    """

    matrix: jax.Array
    shift: jax.Array
    unit: jax.Array
    adam: Any


_ADAM = optax.scale_by_adam(b2=0.98)


def _begin(lens: AffineLens, x_LND: np.ndarray) -> _Fit:
    unit = jnp.sqrt(jnp.mean(jnp.asarray(x_LND[:-1], jnp.float32) ** 2, (1, 2)))
    shift = lens.bias / unit[:, None]
    return _Fit(lens.matrix, shift, unit, _ADAM.init((lens.matrix, shift)))


@functools.partial(jax.jit, donate_argnums=0)
def _update(fit: _Fit, x_LND, embedder, norm, eps, rate) -> _Fit:
    """One step of Adam on all layers; they do not depend on each other."""
    target_NV = jax.nn.log_softmax(lens_logits(x_LND[-1:], None, norm, eps, embedder)[0], -1)

    def gradient(given):
        x_ND, matrix, shift, unit = given

        def loss(params):
            lens = AffineLens(params[0], params[1] * unit, ())
            logits_NV = lens_logits(x_ND[None], lens, norm, eps, embedder)[0]
            return jnp.mean(divergence(target_NV, jax.nn.log_softmax(logits_NV, -1)))

        return jax.grad(loss)((matrix, shift))

    grads = jax.lax.map(gradient, (x_LND[:-1], fit.matrix, fit.shift, fit.unit))
    changes, adam = _ADAM.update(grads, fit.adam)
    matrix, shift = jax.tree.map(lambda p, change: p - rate * change, (fit.matrix, fit.shift), changes)
    return dataclasses.replace(fit, matrix=matrix, shift=shift, adam=adam)
