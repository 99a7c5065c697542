"""Whether maps can be believed: `faithfulness` puts all methods of saliency to the same tests.

| column of the table | what it says, mean over cases that tell something (`Faithfulness.tells`) |
|---|---|
| planted | share of cases with the known cause where it belongs |
| insertion, deletion | area under the normalised target as units come on, or off, in its order; high, low is good |
| > random | share of cases with a better difference of the two than the mean of random rankings |
| reverse | the difference for the reverse ranking: as far below zero as that of the map is above |
| compr., suff. | share of the change lost without the top 1 to 50 % of units; lost with nothing but them |
| patching | rank correlation with the exact effect of each unit alone |
| gap | abs(sum of scores - change of the target), as a share of the change; median |
| weights, target | rank correlation with the map of the shuffled model; of a target about other words |
| seeds | rank correlation with the map under another seed: the noise floor |

Where the target falls as units come on, as the margin of a refusal does under a jailbreak, rankings of signed scores
are taken from the end: what made it fall is what lowers it most.

Units that are off are replaced by noise, which is in distribution for canvas rows alone, and beside it by the mean, by
words of the other cases' prompts, and by the prompts that a case brings for contrast. Replacements are drawn anew: no
method is tested on the very baselines that it used.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgemma_jax.nn.functional import of
from dgemma_jax.progress import bar
from interp.kept_chunks import Chunks, words
from interp.masking.faithfulness_cases import FaithfulnessCase, as_cases, planted_cases, resampled
from interp.masking.faithfulness_tables import GRID, Faithfulness
from interp.masking.game import Found
from interp.masking.masked_diffusion import BASELINES, METHODS, estimate, masked_game
from interp.masking.masked_game import MaskedGame
from interp.masking.ranking_curves import curves, order_of, untested
from interp.masking.saliency_maps import rank_correlation
from interp.masking.sanity_checks import other_target, randomized
from interp.masking.targets import TextEnergy

REPLACEMENTS = ("noise", "mean", "resample", "contrast")
OURS = ("path", "gradient", "regression")  # "gates" chooses units and does not rank them
BUDGETED = (*OURS, "expected_gradients", "occlusion", "rise", "gates")  # the others take what they take
APART = 10_000  # between seeds of maps and of tests


def faithfulness(
    bundle: Any, cases: Iterable[Any] | int = 20, methods: Sequence[str] | None = None, *,
    replacements: Sequence[str] = REPLACEMENTS, rankings: int = 20, budget: int = 256, draws: int = 8,
    test_draws: int = 2, sanity_cases: int = 2, layers: Sequence[int] | None = None, seed: int = 0,
    rows_at_once: int | None = None, keep: str | Path | None = None, progress: bool | None = None, **options: Any,
) -> Faithfulness:  # fmt: skip
    """Test methods of saliency against the model, against chance, and against each other.

    >>> import dgemma_jax as dg, interp
    >>> found = interp.faithfulness(dg.load("nano"), cases=5)  # doctest: +SKIP

    Args:
        bundle: a bundle or a model, edited or not.
        cases: pairs (prompt, target) or `FaithfulnessCase`s; or a number, so many of each planted task of an embedded
            model.
        methods: names in `METHODS`; by default all that rank units.
        replacements: of `REPLACEMENTS`: what stands in for units that a test takes away. With units of "canvas" choose
            "noise" and "mean".
        rankings: random ones beside each map; at least 20 to say anything.
        budget: evaluations of a map, for methods whose maps get better with more.
        draws, test_draws: of the baseline of the maps, of each replacement.
        sanity_cases: of these also the maps of shuffled weights, another target and another seed are made.
        layers: how many top layers are shuffled, rising; by default one, half, and all.
        keep: a directory for finished cases; the same call made again goes on after them.
        **options: of `masked_game` (`step`, `positions`, `sampler`, `thinking`, ...).

    Raises:
        ValueError: no cases, an unknown method or replacement.
    """
    methods = [*OURS, *BASELINES] if methods is None else list(methods)
    unknown = [m for m in methods if m not in METHODS] + [r for r in replacements if r not in REPLACEMENTS]
    if unknown or not methods or not replacements:
        raise ValueError(
            f"needed are one or more methods of {', '.join(METHODS)} and replacements of {', '.join(REPLACEMENTS)}; "
            f"got {unknown or 'none'}"
        )
    if rankings < 2:
        raise ValueError(f"rankings must be at least 2, got {rankings}")
    cases = as_cases(bundle, planted_cases(bundle, cases) if isinstance(cases, int) else cases,
                     options.get("thinking", False))  # fmt: skip
    total = of(bundle).config.num_layers
    layers = sorted({1, -(-total // 2), total}) if layers is None else list(layers)
    options = options | {"rows_at_once": rows_at_once}
    checked = np.linspace(0, len(cases) - 1, min(sanity_cases, len(cases))).round().astype(int)
    settings = [
        methods, replacements, rankings, budget, draws, test_draws, layers, seed, sorted(map(repr, options.items())),
        [(case.prompt, repr(case.target) if isinstance(case.target, str | TextEnergy) else words(case.target),
          repr(case.units), repr(case.baseline)) for case in cases],
    ]  # fmt: skip
    store, rows, checks = Chunks(keep, bundle, *settings), [], []
    with bar("faithfulness", len(cases) + len(checked), progress, "cases") as done:
        for number, case in enumerate(cases):
            tested = _Tested(bundle, cases, number, methods, replacements, budget, draws, test_draws, seed, options)
            rows.append(store.all_kept(number, "case", lambda tested=tested: tested.row(rankings)))
            done(1, case.task)
            if number in checked:
                checks.append(store.kept(number, "sanity", lambda tested=tested: tested.checks(layers)))
                done(1, "sanity")
    arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    checks = np.reshape(checks, (len(checks), len(layers) + 2, len(methods)))
    return Faithfulness(
        **arrays, weights=checks[:, :-2], target=checks[:, -2], seeds=checks[:, -1], methods=tuple(methods),
        replacements=tuple(replacements), layers=tuple(layers), tasks=tuple(case.task for case in cases),
        about={"budget": budget, "draws": draws, "test_draws": test_draws, "rankings": rankings, "seed": seed,
               "model": str(getattr(bundle, "source", None) or "a model").rsplit("/", 1)[-1]},
    )  # fmt: skip


@dataclasses.dataclass
class _Tested:
    """One case: its game and maps, made when first asked for."""

    bundle: Any
    cases: Sequence[FaithfulnessCase]
    number: int
    methods: Sequence[str]
    replacements: Sequence[str]
    budget: int
    draws: int
    test_draws: int
    base_seed: int
    options: dict[str, Any]

    @property
    def case(self) -> FaithfulnessCase:
        return self.cases[self.number]

    @property
    def seed(self) -> int:
        return self.base_seed + self.number

    @functools.cached_property
    def baselines(self) -> tuple[Any, Any]:
        """What the maps use, and the contrast prompts left to tests."""
        given = self.case.baseline
        if isinstance(given, str):
            return given, None
        own = given[::2]  # as many as of noise: one program
        return [own[i % len(own)] for i in range(self.draws)], given[1::2][: self.test_draws]

    @functools.cached_property
    def game(self) -> MaskedGame:
        case = self.case
        return masked_game(
            self.bundle, case.prompt, case.target, units=case.units, baseline=self.baselines[0], draws=self.draws,
            seed=self.seed, **self.options,
        )  # fmt: skip

    @functools.cached_property
    def maps(self) -> tuple[list[Found], dict[str, np.ndarray]]:
        return maps_of(self.game, self.methods, self.budget, self.seed)

    def other(self, baseline: Any, draws: int) -> MaskedGame:
        """The game under another baseline and seed; its target is that of the first run, whatever others answer."""
        target = self.case.target if isinstance(self.case.target, TextEnergy) else self.game.metric
        return masked_game(
            self.bundle, self.case.prompt, target, baseline=baseline, draws=draws, seed=self.seed + APART,
            **self.options | {"units": self.case.units, "step": int(np.argmax(np.asarray(self.game.given.first)))},
        )  # fmt: skip

    def row(self, rankings: int) -> dict[str, np.ndarray]:
        drawn = resampled(self.bundle, self.cases, self.number, self.test_draws, self.seed + APART)
        instead = {"noise": "noise", "mean": "mean", "contrast": self.baselines[1], "resample": drawn}
        tests = [
            None if instead[name] is None
            else on_the_run_of(self.game, self.other(instead[name], self.test_draws))
            for name in self.replacements
        ]  # fmt: skip
        maps, spent = self.maps
        return _measured(self.case, maps, tests, rankings, self.seed) | spent

    def checks(self, layers: Sequence[int]) -> np.ndarray:
        """[len(layers) + 2, M] rank correlations with the maps of shuffled weights, another target, another seed."""
        again = self.other(self.baselines[0], self.draws)
        others = [dataclasses.replace(self.game, bundle=randomized(self.bundle, n, self.base_seed)) for n in layers]
        others += [other_target(self.game, self.base_seed), again]
        return np.array([
            [rank_correlation(a.scores, b.scores) for a, b in zip(self.maps[0], found, strict=True)]
            for found in (maps_of(g, self.methods, self.budget, self.seed + (g is again) * APART)[0] for g in others)
        ])  # fmt: skip


def maps_of(
    game: MaskedGame, methods: Sequence[str], budget: int, seed: int
) -> tuple[list[Found], dict[str, np.ndarray]]:
    """What each method finds of a game; evaluations and seconds [M]."""
    found, evaluations, seconds = [], [], []
    for name in methods:
        start = time.perf_counter()
        settings = {"budget": budget} if name in BUDGETED else {}
        one, count = estimate(game, name, seed=seed, progress=False, **settings)
        found.append(one)
        evaluations.append(count)
        seconds.append(time.perf_counter() - start)
    return found, {"evaluations": np.array(evaluations), "seconds": np.array(seconds)}


def on_the_run_of(game: MaskedGame, test: MaskedGame) -> MaskedGame:
    """The test's replacements in the run of the game, for its target."""

    def alike(own: jax.Array, like: jax.Array) -> jax.Array:
        """Rows repeated to as many as the game has: one program for both."""
        same = own.shape[1:] == like.shape[1:] and own.dtype == like.dtype
        return own[jnp.arange(len(like)) % len(own)] if same and len(own) < len(like) else own

    pool = jax.tree.map(alike, test.given.pool, game.given.pool)
    given = dataclasses.replace(test.given, pool=pool, run=game.given.run, starts=game.given.starts)
    return dataclasses.replace(test, given=given, metric=game.metric)


def _measured(case, maps, tests, rankings, seed) -> dict[str, np.ndarray]:
    """The numbers of one case; axes are replacements R, methods M, random rankings K."""
    count, rng = len(maps[0].scores), np.random.default_rng(seed)
    ranked = [order_of(found.scores) for found in maps]
    orders = np.stack([*ranked, *(rng.permutation(count) for _ in range(rankings))])
    own = len(maps)
    # A map without a negative score does not tell what raises from what lowers.
    signed = np.array([(found.scores < 0).any() for found in maps] + [False] * rankings)
    found = [untested(len(orders), count) if test is None else curves(test, orders).facing(signed) for test in tests]
    areas = np.stack([one.areas for one in found])
    grids = [one.on_grid(GRID) for one in found]
    changes = np.array([one.on - one.off for one in maps])
    gaps = np.abs(np.array([one.scores.sum() for one in maps]) - changes)
    with np.errstate(divide="ignore", invalid="ignore"):
        gaps = gaps / np.abs(changes)
    return {
        "areas": areas[:, :own], "random": areas[:, own:, :2],
        "curves": np.stack([np.concatenate([g[:own], g[own:].mean(0, keepdims=True)]) for g in grids]),
        "comprehensiveness": np.stack([one.comprehensiveness[:own] for one in found]),
        "sufficiency": np.stack([one.sufficiency[:own] for one in found]),
        "patching": np.array([[np.nan if np.isnan(one.on) else rank_correlation(m.scores, one.alone) for m in maps]
                              for one in found]),
        "gap": gaps,
        "planted": np.array([np.nan if case.planted is None else float(case.planted(m)) for m in maps]),
        "change": np.array([one.on - one.off for one in found]),
    }  # fmt: skip
