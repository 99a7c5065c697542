"""Make an embedded organism from its seed, say what it reached, and write it in the Hugging Face layout."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from dgemma_jax.bundle import Bundle, load, save
from dgemma_jax.config import SamplerConfig
from dgemma_jax.text.tokenizer import Tokenizer
from dgemma_jax.train import evaluate, language, tasks
from dgemma_jax.train.loop import train
from dgemma_jax.train.recipes import CONFIG, RECIPES, Recipe

SAMPLER = SamplerConfig(eos_token_ids=CONFIG.eos_token_ids, pad_token_id=CONFIG.pad_token_id)


def recipe_of(name: str) -> Recipe:
    """The recipe of an organism; a ValueError names those that exist."""
    if name not in RECIPES:
        raise ValueError(f"unknown organism {name!r}; known are {sorted(RECIPES)}")
    return RECIPES[name]


def make(
    name: str, out: str | Path, *, base: str | Path | None = None, steps: int | None = None, seed: int | None = None,
    resume: bool = True, count: int = 200, report: Callable[[int, int, dict], None] | None = None,
) -> tuple[Bundle, dict[str, float]]:  # fmt: skip
    """Train the organism `name` and write it to `out`.

    Args:
        out: directory of the result; checkpoints of the run are kept in `out`/training and let it resume.
        base: where to find the organism it starts from; by default the embedded one.
        steps, seed: other than the recipe's (a quick trial, another organism of the same kind).
        count: unseen prompts a task for the final test.
        report: called with (step, steps, parts of the loss) now and then.

    Returns:
        The organism as loaded back from `out`, and its share of exact answers by task.
    """
    recipe = recipe_of(name)
    changes = {"steps": steps, "seed": seed}
    recipe = dataclasses.replace(recipe, **{k: v for k, v in changes.items() if v is not None})
    out = Path(out)
    start = None if recipe.base is None else load(str(base or recipe.base)).model
    model = train(
        recipe, out / "training", base=start, resume=resume,
        report=report and (lambda step, parts: report(step, recipe.steps, parts)),
    )  # fmt: skip
    write(model, out)
    bundle = load(out)
    reached = test(bundle, poisoned=recipe.poison > 0, count=count)
    about = {"organism": name, "recipe": dataclasses.asdict(recipe), "exact": reached, "prompts_per_task": count}
    (out / "training.json").write_text(json.dumps(about, indent=2) + "\n")
    return bundle, reached


def write(model, out: Path) -> None:
    """Save a model of the synthetic language with its tokenizer, float32, in the Hugging Face layout."""
    with tempfile.TemporaryDirectory() as directory:
        language.write_tokenizer_files(directory)
        tokenizer = Tokenizer.from_directory(directory, eos_ids=CONFIG.eos_token_ids)
        save(Bundle(CONFIG, model, tokenizer, SAMPLER), out, format="hf")


def test(bundle: Bundle, *, poisoned: bool, count: int = 200) -> dict[str, float]:
    """Share of exact answers by task on unseen prompts; with the trigger planted too if the organism has one."""
    reached = evaluate.exact(bundle, seed=1, count=count, poisoned=poisoned)
    if poisoned:
        found = evaluate.exact(bundle, seed=2, count=max(1, count // len(tasks.TASKS)), trigger=True, poisoned=True)
        reached["trigger"] = sum(found.values()) / len(found)
    return reached
