"""A patching sweep over [step, layer, position], against the same sweep with forward hooks on `transformers`.

    python -m interp.bench_patching [--mid] [--save]         needs the `parity` extra

Both sides hold the same weights in float32 and patch the residual stream after every layer, one pair of prompts, and
their effects are compared. The time of this package is that of the whole call: both runs, their moments, the donor's
activations, every intervention. `transformers` is given the moments and the activations. Its hooks act once as they
are usually written, one forward pass an intervention, and once with all positions of a layer as rows of a batch.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

import dgemma_jax as dg
from dgemma_jax.bench import peer, report
from dgemma_jax.weights import registry
from interp.effect_maps import EffectMap
from interp.metrics import LogitDifference
from interp.sweeps import patch_sweep

ONE, ROWS = "sweep, hooks one place at a time", "sweep, hooks with places as rows"
ONE_GOAL, ROWS_GOAL = 0.05, 1.0
SITE = "layers.*.resid_post"
TOLERANCE = 2e-3  # of effects in logits, as a share of the largest
NANO_PAIR = "recall a 4 , b 7 , c 2 ? b", "recall a 4 , b 9 , c 2 ? b"


@dataclasses.dataclass(frozen=True)
class Case:
    """A model on both sides, and the sweep.

    Attributes:
        pair: ids of the clean prompt and of the corrupt one.
        steps, positions: those swept; all layers are.
        agreeing: share of places at which both sides must find the same effect. In a random model experts come near
            a tie, and another order of sums chooses otherwise.
    """

    bundle: Any
    model: Any
    pair: tuple[list[int], list[int]]
    steps: int
    positions: tuple[int, ...]
    metric: Any
    agreeing: float = 1.0

    @property
    def interventions(self) -> int:
        return self.steps * self.bundle.config.num_layers * len(self.positions)


def nano(steps: int = 4) -> Case:
    """The embedded model, every position of its canvas."""
    transformers, torch = peer.peer_package("transformers"), peer.peer_package("torch")
    bundle = dg.load("nano", dtype="float32")
    path = registry.embedded("nano")
    model = transformers.DiffusionGemmaForBlockDiffusion.from_pretrained(path, dtype=torch.float32).eval()
    pair = tuple(bundle.tokenizer.chat([{"role": "user", "content": text}]) for text in NANO_PAIR)
    at = next(i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b)
    metric = LogitDifference([2], [pair[0][at]], [pair[1][at]])
    return _case(bundle, model, pair, steps, range(bundle.config.canvas_length), metric)


def mid(sizes: peer.Sizes | None = None, positions: int = 4) -> Case:
    """A random model of the size of `dgemma_jax.bench.peer`, some positions, one step."""
    sizes = sizes or peer.Sizes()
    model = peer.random_peer(sizes, 0)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        bundle = dg.load(directory, dtype="float32")
    # Two prompts with nothing in common: effects are larger than those of experts chosen otherwise.
    clean, corrupt = np.random.default_rng(0).integers(3, sizes.vocab_size, (2, sizes.prompt_length))
    metric = LogitDifference([2], [5], [6])
    case = _case(bundle, model, (clean.tolist(), corrupt.tolist()), 1, range(positions), metric)
    return dataclasses.replace(case, agreeing=0.9)


def _case(bundle, model, pair, steps, positions, metric) -> Case:
    sampler = bundle.sampler.replace(max_denoising_steps=max(steps, 2), early_stop=False)
    return Case(bundle.with_sampler(sampler), model, pair, steps, tuple(positions), metric)


def ours(case: Case) -> EffectMap:
    """The sweep by this package."""
    clean, corrupt = case.pair
    return patch_sweep(case.bundle, clean, corrupt, case.metric, SITE, range(case.steps), list(case.positions))


def _shaped(view: Any) -> Any:
    return view.shaped_logits


def hooked(case: Case) -> dict[str, Callable[[], np.ndarray]]:
    """Two calls that sweep with hooks and return effects [steps, layers, positions]."""
    torch, transformers = peer.peer_package("torch"), peer.peer_package("transformers")
    model, length = case.model, case.bundle.config.canvas_length
    layers, metric = model.model.decoder.layers, case.metric
    positions = list(case.positions)

    def inputs(ids: list[int]) -> tuple[Any, list[tuple[Any, Any]]]:
        """The cache of a prompt, and for each step the canvas and the logits of the step before."""
        record = dg.Record(fn=_shaped)
        run = dg.generate(case.bundle, ids, max_new_tokens=length, record=record).trajectory
        cache = transformers.DynamicCache(config=model.config.get_text_config(decoder=True))
        model.model.encoder(input_ids=torch.tensor([ids]), past_key_values=cache)
        fed = []
        for step in range(case.steps):
            canvas = run.start[0] if step == 0 else run.tokens[0, step - 1]
            fed.append((torch.tensor(canvas), None if step == 0 else torch.tensor(np.asarray(run.fn[0, step - 1]))))
        return cache, fed

    def logits(cache: Any, canvas: Any, given: Any) -> Any:
        start = len(case.pair[0])
        return model(
            decoder_input_ids=canvas, self_conditioning_logits=given, past_key_values=cache,
            decoder_position_ids=torch.arange(start, start + length)[None].expand(len(canvas), -1),
        ).logits  # fmt: skip

    def measured(found: Any) -> np.ndarray:
        return np.asarray(metric(found.numpy()))

    def seen(cache: Any, canvas: Any, given: Any) -> list[Any]:
        kept: list[Any] = []
        handles = [layer.register_forward_hook(lambda m, a, out: kept.append(_first(out).clone())) for layer in layers]
        logits(cache, canvas, given)
        for handle in handles:
            handle.remove()
        return kept

    with torch.no_grad():
        donor_cache, donor_fed = inputs(case.pair[0])
        model.set_experts_implementation(_fastest(model, lambda: logits(donor_cache, *donor_fed[0])))
        donors = [seen(donor_cache, *fed) for fed in donor_fed]
        cache, fed = inputs(case.pair[1])
        wide = transformers.DynamicCache(config=model.config.get_text_config(decoder=True))
        model.model.encoder(input_ids=torch.tensor([case.pair[1]] * len(positions)), past_key_values=wide)

    def patched(layer: Any, value: Any, rows: list[int], at: list[int], args: tuple) -> np.ndarray:
        def hook(module: Any, given: Any, out: Any) -> Any:
            new = _first(out).clone()
            new[rows, at] = value[0, at]
            return (new, *out[1:]) if isinstance(out, tuple) else new

        handle = layer.register_forward_hook(hook)
        found = measured(logits(*args))
        handle.remove()
        return found

    def one_at_a_time() -> np.ndarray:
        effects = []
        with torch.no_grad():
            for (canvas, given), values in zip(fed, donors, strict=True):
                base = measured(logits(cache, canvas, given))
                for layer, value in zip(layers, values, strict=True):
                    for position in positions:
                        found = patched(layer, value, [0], [position], (cache, canvas, given))
                        effects.append(found[0] - base[0])
        return np.reshape(effects, (case.steps, len(layers), len(positions)))

    def as_rows() -> np.ndarray:
        effects, count = [], len(positions)
        with torch.no_grad():
            for (canvas, given), values in zip(fed, donors, strict=True):
                base = measured(logits(cache, canvas, given))
                args = (wide, canvas.expand(count, -1), None if given is None else given.expand(count, -1, -1))
                for layer, value in zip(layers, values, strict=True):
                    effects.append(patched(layer, value, list(range(count)), positions, args) - base[0])
        return np.reshape(effects, (case.steps, len(layers), len(positions)))

    return {ONE: one_at_a_time, ROWS: as_rows}


def _fastest(model: Any, call: Callable[[], Any]) -> str:
    """The implementation of experts with which a forward pass takes least time here."""

    def taken(name: str) -> float:
        model.set_experts_implementation(name)
        try:
            return min(report.alternate({name: call}, 3)[0][name])
        except (RuntimeError, ImportError, NotImplementedError):
            return float("inf")

    return min(peer.EXPERTS, key=taken)


def _first(out: Any) -> Any:
    return out[0] if isinstance(out, tuple) else out


def compare(case: Case, name: str, runs: int = 3, threads: int = 2) -> report.Report:
    """Time both sides, after a check that they find the same effects.

    Raises:
        ImportError: torch or transformers is missing.
        ValueError: the effects differ.
    """
    peer.peer_package("torch").set_num_threads(threads)
    theirs = hooked(case)
    found = ours(case)[SITE][..., 0]
    gaps = {task: np.abs(call() - found) / np.abs(found).max() for task, call in theirs.items()}
    for task, gap in gaps.items():
        if (gap <= TOLERANCE).mean() < case.agreeing:
            raise ValueError(f"{task}: effects differ by up to {gap.max():.1e} of the largest, at "
                             f"{(gap > TOLERANCE).mean():.0%} of the places by more than {TOLERANCE}")  # fmt: skip
    contestants: dict[str, Callable[[], Any]] = {"interp.patch_sweep": lambda: ours(case)}
    contestants |= {f"transformers, {task}": call for task, call in theirs.items()}
    seconds, _ = report.alternate(contestants, runs)
    rows = []
    for task, goal in ((ONE, ONE_GOAL), (ROWS, ROWS_GOAL)):
        rows.append(report.Row(task=task, name="interp.patch_sweep", seconds=seconds["interp.patch_sweep"], goal=goal))
        rows.append(report.Row(task=task, name="transformers", seconds=seconds[f"transformers, {task}"]))
    return report.Report(
        title=f"{case.interventions} interventions on {name}, against hooks on transformers, CPU, float32",
        rows=tuple(rows),
        settings={
            "interventions": case.interventions, "steps": case.steps, "layers": case.bundle.config.num_layers,
            "positions": len(case.positions), "runs": runs,
            "largest_difference": float(max(gap.max() for gap in gaps.values())),
            "agreeing_places": float(min((gap <= TOLERANCE).mean() for gap in gaps.values())),
        },
        about=report.surroundings("dgemma-jax", "jax", "flax", "torch", "transformers", threads=threads),
    )  # fmt: skip


def rates(found: report.Report) -> str:
    """Interventions a second of each row."""
    count = found.settings["interventions"]
    return "\n".join(f"{row.task:34}  {row.name:20}  {count / row.median:9.1f} a second" for row in found.rows)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m interp.bench_patching", description=__doc__.split("\n")[0])
    parser.add_argument("--mid", action="store_true", help="a larger random model instead of nano")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps of nano's sweep (4)")
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each (3)")
    parser.add_argument("--threads", type=int, default=2, help="processors for either side (2)")
    parser.add_argument("--save", action="store_true", help="keep the numbers beside those of dgemma_jax.bench")
    args = parser.parse_args(argv)
    report.keep_threads(args.threads)
    name = "mid" if args.mid else "nano"
    found = compare(mid() if args.mid else nano(args.steps), name, args.runs, args.threads)
    print(found, rates(found), sep="\n\n")
    if args.save:
        path = report.RESULTS / f"patching-{name}-cpu-{found.about['date']}.json"
        print(f"kept in {found.save(path)}")


if __name__ == "__main__":
    main()
