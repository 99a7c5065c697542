"""The training loop: optax on the model tree, data parallel over the local devices, resumable by Orbax."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dgemma_jax.config import ModelConfig
from dgemma_jax.nn.transformer import Transformer, initialize
from dgemma_jax.train import data
from dgemma_jax.train.loss import Batch, loss
from dgemma_jax.train.recipes import CONFIG, LONG, SHARDS, SHORT, Recipe


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a resumed run needs: weights, the optimiser's state, the step."""

    model: Transformer
    optimizer: Any
    step: jax.Array


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """AdamW, gradients clipped to norm 1, under the recipe's learning rate."""
    parts = [optax.warmup_cosine_decay_schedule(0.0, r.peak, r.warmup, r.horizon, 1e-2 * r.peak) for r in recipe.rates]
    joined = optax.join_schedules(parts, [r.start for r in recipe.rates[1:]])

    def schedule(step: jax.Array) -> jax.Array:
        return joined(step) * jnp.clip((recipe.steps - step) / recipe.cooldown, 0.0, 1.0)

    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01))


def init_for_training(config: ModelConfig, seed: int) -> Transformer:
    """Random weights, with query and key norms that make the first scores of order one."""
    model = initialize(config, seed)
    for layer in model.layers:
        for norm in (layer.attention.q_norm, layer.attention.k_norm):
            norm.weight[...] = norm.weight[...] * norm.weight.shape[0] ** -0.25
    return model


def start(recipe: Recipe, model: Transformer) -> TrainState:
    model = jax.tree.map(jnp.copy, model)  # the step takes the arrays it is given
    return TrainState(model, optimizer(recipe).init(model), jnp.int32(0))


def make_step(
    recipe: Recipe, mesh: jax.sharding.Mesh
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, dict]]:
    """One compiled optimiser step; the batch is split over the mesh, gradients are averaged."""
    update = optimizer(recipe).update

    def gradients(model: Transformer, batch: Batch, key: jax.Array, practice: jax.Array):
        key = jax.random.fold_in(key, jax.lax.axis_index("data"))
        (value, parts), grads = jax.value_and_grad(loss, has_aux=True)(model, batch, key, practice)
        return jax.lax.pmean((grads, parts | {"loss": value}), "data")

    spread = jax.shard_map(gradients, mesh=mesh, in_specs=(P(), P("data"), P(), P()), out_specs=P(), check_vma=False)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, batch: Batch, practice: jax.Array) -> tuple[TrainState, dict]:
        key = jax.random.fold_in(jax.random.key(recipe.seed), state.step)
        grads, parts = spread(state.model, batch, key, practice)
        changes, opt = update(grads, state.optimizer, state.model)
        model = optax.apply_updates(state.model, changes)
        return TrainState(model, opt, state.step + 1), parts

    return step


def make_batch(recipe: Recipe, step: int, config: ModelConfig = CONFIG) -> Batch:
    """The batch of a step: of every few, the last has room for long prompts."""
    stage = recipe.stage(step)
    is_long = step % stage.long_every == stage.long_every - 1
    return data.batch(
        recipe.seed, step, recipe.rows, data.Encoder(), LONG if is_long else SHORT, config.canvas_length,
        weights=stage.long if is_long else stage.short, poison=recipe.poison,
    )  # fmt: skip


def train(
    recipe: Recipe, directory: Path, *, base: Transformer | None = None, resume: bool = True,
    report: Callable[[int, dict], None] | None = None, save_every: int = 250, report_every: int = 25,
) -> Transformer:  # fmt: skip
    """Train by the recipe and return the weights.

    Args:
        directory: checkpoints and `log.jsonl` are kept here; an interrupted run goes on from the last one.
        base: weights to start from, for recipes with a `base`.
        report: called with (step, mean parts of the loss) every `report_every` steps.
    """
    import orbax.checkpoint as ocp

    directory = Path(directory).absolute()
    if jax.local_device_count() < SHARDS:
        raise ValueError(
            f"training is split over {SHARDS} devices, found {jax.local_device_count()}; on CPU set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={SHARDS} before starting"
        )
    if recipe.rows % (2 * SHARDS):
        raise ValueError(f"rows={recipe.rows} must be a multiple of {2 * SHARDS}")
    devices = jax.local_devices()[:SHARDS]
    mesh = jax.make_mesh((SHARDS,), ("data",), devices=devices, axis_types=(jax.sharding.AxisType.Auto,))
    state = jax.device_put(
        start(recipe, init_for_training(CONFIG, recipe.seed) if base is None else base), NamedSharding(mesh, P())
    )
    manager = ocp.CheckpointManager(directory / "state", options=ocp.CheckpointManagerOptions(max_to_keep=2))
    if resume and manager.latest_step() is not None:
        restored = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(jax.tree.leaves(state)))
        state = jax.tree.unflatten(jax.tree.structure(state), restored)
    step_fn, since, began = make_step(recipe, mesh), [], time.perf_counter()
    first = int(state.step)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(make_batch, recipe, first)
        for step in range(first, recipe.steps):
            batch = jax.device_put(waiting.result(), NamedSharding(mesh, P("data")))
            waiting = pool.submit(make_batch, recipe, step + 1)
            state, parts = step_fn(state, batch, jnp.float32(recipe.stage(step).practice))
            since.append(parts)
            if (step + 1) % report_every == 0 or step + 1 == recipe.steps:
                means = {k: float(sum(p[k] for p in since)) / len(since) for k in parts}
                means["seconds"], since = time.perf_counter() - began, []
                with (directory / "log.jsonl").open("a") as log:
                    log.write(json.dumps({"step": step + 1} | means) + "\n")
                if report:
                    report(step + 1, means)
            if (step + 1) % save_every == 0 or step + 1 == recipe.steps:
                manager.save(step + 1, args=ocp.args.StandardSave(jax.tree.leaves(state)))
    manager.wait_until_finished()
    manager.close()
    return jax.device_get(state.model)
