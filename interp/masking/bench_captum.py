"""Evaluations a second of a saliency map, against Captum on `transformers` with the same weights.

    python -m interp.masking.bench_captum [--save]         needs the `parity` extra; Captum too, where it can be had

An evaluation is one prompt in which some tokens are replaced: its causal pass, the first denoising step, the
log-probability of a token of the answer. Both sides hold the weights of `nano` in float32, see the same noise in place
of tokens that are off and the same canvas, and their numbers are compared. Captum runs occlusion (`FeatureAblation`)
and `ShapleyValueSampling` as it comes, one evaluation at a time, and with 64 as rows of a batch. Where Captum cannot be
imported, a plain loop makes the calls that it would make, and the table says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import dgemma_jax as dg
from dgemma_jax.bench import peer, report
from dgemma_jax.weights import registry
from interp.bench_patching import _fastest
from interp.masking import paths
from interp.masking.masked_diffusion import masked_game
from interp.masking.masked_game import MaskedGame
from interp.masking.single_masks import occlusion
from interp.metrics import LogProb

PROMPT, ANSWER, AT = "recall a 4 , b 7 , c 2 , d 9 , e 1 ? b", "7", 2
GOAL = 0.1  # of the time of a peer's evaluation
TOLERANCE = 2e-3  # of what is compared, in nats
ORDERS, ROWS = 8, 64


@dataclasses.dataclass(frozen=True)
class Case:
    """One target on both sides.

    Attributes:
        game: of this package.
        model: of `transformers`.
        ids: [T] of the prompt.
        at: [U] positions of the units.
        noise: [T] ids that stand in.
        canvas: [C] ids.
        token, row: whose log-probability.
    """

    game: MaskedGame
    model: Any
    ids: np.ndarray
    at: np.ndarray
    noise: np.ndarray
    canvas: np.ndarray
    token: int
    row: int


def nano() -> Case:
    """The embedded model."""
    transformers, torch = peer.peer_package("transformers"), peer.peer_package("torch")
    bundle = dg.load("nano", dtype="float32")
    model = transformers.DiffusionGemmaForBlockDiffusion.from_pretrained(
        registry.embedded("nano"), dtype=torch.float32
    ).eval()
    return case_of(bundle, model, bundle.tokenizer.chat([{"role": "user", "content": PROMPT}]),
                   bundle.tokenizer.encode(ANSWER)[-1], AT)  # fmt: skip


def case_of(bundle: Any, model: Any, ids: list[int], token: int, row: int, rows: int | None = None) -> Case:
    """A prompt and a token of its answer, with one noise in place of what is off."""
    game = masked_game(bundle, ids, LogProb([row], [token]), draws=1, rows_at_once=rows)
    cells = np.asarray(game.given.cells["token_embed"])[: len(ids)]
    at = np.array([int(np.flatnonzero(cells == unit)[0]) for unit in range(len(game.units))])
    return Case(game, model, np.asarray(ids), at, np.asarray(game.given.pool["token_embed"])[0, : len(ids)],
                np.asarray(game.given.starts)[0], token, row)  # fmt: skip


def forward(case: Case, counted: list[int] | None = None) -> Callable[[Any], Any]:
    """What Captum is given: prompts [n, T] -> the target [n], on `transformers`. `counted` is told every n."""
    torch, transformers = peer.peer_package("torch"), peer.peer_package("transformers")
    model, length = case.model, len(case.canvas)

    def target(ids: Any) -> Any:
        ids, count = ids.long(), len(ids)
        if counted is not None:
            counted.append(count)
        with torch.no_grad():
            cache = transformers.DynamicCache(config=model.config.get_text_config(decoder=True))
            model.model.encoder(input_ids=ids, past_key_values=cache)
            start = ids.shape[1]
            logits = model(
                decoder_input_ids=torch.tensor(case.canvas)[None].expand(count, -1), past_key_values=cache,
                decoder_position_ids=torch.arange(start, start + length)[None].expand(count, -1),
            ).logits  # fmt: skip
        return torch.log_softmax(logits[:, case.row].float(), -1)[:, case.token]

    return target


def captum_of() -> Any:
    """`captum.attr`, or None."""
    try:
        return importlib.import_module("captum.attr")
    except ImportError:
        return None


def peers(
    case: Case, orders: int = ORDERS, counted: list[int] | None = None
) -> tuple[dict[str, dict[int, Callable[[], np.ndarray]]], str]:
    """Calls that score all units, by task and evaluations at a time; and who makes them."""
    torch, attr, target = peer.peer_package("torch"), captum_of(), forward(case, counted)
    ids, noise = (torch.tensor(x, dtype=torch.float32)[None] for x in (case.ids, case.noise))
    features = torch.zeros(1, len(case.ids), dtype=torch.long)  # all of the template is feature 0, equal on both sides
    features[0, case.at] = torch.arange(1, len(case.at) + 1)
    noise = torch.where(features > 0, noise, ids)

    def by_captum(kind: str, at_once: int) -> np.ndarray:
        torch.manual_seed(0)
        options = {"n_samples": orders} if kind == "ShapleyValueSampling" else {}
        found = getattr(attr, kind)(target).attribute(
            ids, baselines=noise, feature_mask=features, perturbations_per_eval=at_once, **options
        )
        return found[0, case.at].numpy().astype(np.float64)

    def by_loop(kind: str, at_once: int) -> np.ndarray:
        count, rng = len(case.at), np.random.default_rng(0)

        def values(masks: np.ndarray) -> np.ndarray:
            rows = np.tile(case.ids, (len(masks), 1))
            rows[:, case.at] = np.where(masks, case.ids[case.at], case.noise[case.at])
            parts = [target(torch.tensor(rows[i : i + at_once])) for i in range(0, len(rows), at_once)]
            return torch.cat(parts).numpy().astype(np.float64)

        if kind == "FeatureAblation":
            found = values(np.concatenate([np.ones((1, count), bool), ~np.eye(count, dtype=bool)]))
            return found[0] - found[1:]
        gains = np.zeros(count)
        for _ in range(orders):
            order = rng.permutation(count)
            masks = np.argsort(order) < np.arange(count + 1)[:, None]
            gains[order] += np.diff(values(masks))
        return gains / orders

    call = by_captum if attr is not None else by_loop
    kinds = {"occlusion": "FeatureAblation", "Shapley values": "ShapleyValueSampling"}
    made = {task: {n: (lambda kind=kind, n=n: call(kind, n)) for n in (1, ROWS)} for task, kind in kinds.items()}
    return made, "captum" if attr is not None else "plain loop (no captum)"


def compare(case: Case, name: str, runs: int = 3, threads: int = 2, orders: int = ORDERS) -> report.Report:
    """Time both sides, after a check that they say the same. Rows are seconds of one evaluation.

    Raises:
        ImportError: torch or transformers is missing.
        ValueError: the scores differ.
    """
    torch = peer.peer_package("torch")
    torch.set_num_threads(threads)
    target, ids = forward(case), torch.tensor(case.ids)[None]
    case.model.set_experts_implementation(_fastest(case.model, lambda: target(ids.expand(ROWS, -1))))
    counted: list[int] = []
    theirs, who = peers(case, orders, counted)
    count = len(case.at)
    ours = {
        "occlusion": lambda: occlusion(case.game),
        "Shapley values": lambda: paths.path(case.game, budget=1 + orders * (2 * count - 1)),
    }
    gap = float(np.abs(ours["occlusion"]().scores - theirs["occlusion"][ROWS]()).max())
    if gap > TOLERANCE:
        raise ValueError(f"occlusion differs by {gap:.1e} nats between the two sides")
    asked = {}
    for task, calls in theirs.items():
        counted.clear()
        calls[ROWS]()
        asked[task] = sum(counted)
    contestants: dict[str, Callable[[], Any]] = {f"{task}, ours": call for task, call in ours.items()}
    contestants |= {f"{task}, {n}": call for task, calls in theirs.items() for n, call in calls.items()}
    start = time.perf_counter()
    seconds, _ = report.alternate(contestants, runs)
    rows = []
    for task in ours:
        own = (count + 2) if task == "occlusion" else 1 + orders * (2 * count - 1)
        for n in (1, ROWS):
            label = f"{task}, peer {n} at a time"
            rows.append(report.Row(task=label, name="interp.saliency", goal=GOAL,
                                   seconds=tuple(s / own for s in seconds[f"{task}, ours"])))  # fmt: skip
            rows.append(report.Row(task=label, name=f"{who} on transformers",
                                   seconds=tuple(s / asked[task] for s in seconds[f"{task}, {n}"])))  # fmt: skip
    return report.Report(
        title=f"One evaluation of a map of {count} units on {name}, against {who} on transformers, CPU, float32",
        rows=tuple(rows),
        settings={"units": count, "orders": orders, "runs": runs, "rows_at_once": case.game.rows_at_once,
                  "largest_difference": gap, "seconds_in_all": round(time.perf_counter() - start, 1)},
        about=report.surroundings("dgemma-jax", "jax", "torch", "transformers", "captum", threads=threads),
    )  # fmt: skip


def rates(found: report.Report) -> str:
    """Evaluations a second of each row."""
    return "\n".join(f"{row.task:36}  {row.name:26}  {1 / row.median:9.1f} a second" for row in found.rows)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m interp.masking.bench_captum", description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each (3)")
    parser.add_argument("--orders", type=int, default=ORDERS, help=f"orders of units for Shapley values ({ORDERS})")
    parser.add_argument("--threads", type=int, default=2, help="processors for either side (2)")
    parser.add_argument("--save", action="store_true", help="keep the numbers beside those of dgemma_jax.bench")
    args = parser.parse_args(argv)
    report.keep_threads(args.threads)
    found = compare(nano(), "nano", args.runs, args.threads, args.orders)
    print(found, rates(found), sep="\n\n")
    if args.save:
        path = report.RESULTS / f"saliency-nano-cpu-{found.about['date']}.json"
        print(f"kept in {found.save(path)}")


if __name__ == "__main__":
    main()
