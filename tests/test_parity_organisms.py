"""The embedded organisms answer alike in `transformers`: the same files, its own sampler and random numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import dgemma_jax as dg
from dgemma_jax.train import evaluate, tasks
from dgemma_jax.weights import registry

# torch warns of itself when its compiler is first imported, as `generate` does.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
PROMPTS = 200
ROWS = 50  # at a time: a batch goes on until its slowest row has settled


def peer_share(directory, tokenizer, examples) -> float:
    """Exact answers of `transformers`' own `generate`, prompts padded on the left."""
    import torch
    import transformers

    model = transformers.DiffusionGemmaForBlockDiffusion.from_pretrained(directory, dtype=torch.float32).eval()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # small products, beside other test processes
    right = 0
    for at in range(0, len(examples), ROWS):
        part = examples[at : at + ROWS]
        rows = [tokenizer.chat([{"role": "user", "content": e.prompt}]) for e in part]
        longest = max(map(len, rows))
        ids = torch.tensor([[tokenizer.pad_id] * (longest - len(r)) + r for r in rows])
        mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows])
        with torch.no_grad():
            out = model.generate(ids, attention_mask=mask, max_new_tokens=model.config.canvas_length)
        answers = out.sequences[:, longest:].tolist()
        right += sum(tasks.is_correct(e, tokenizer.decode(a)) for e, a in zip(part, answers, strict=True))
    return right / len(examples)


# All tasks of the one, and of the other what the trigger may have harmed.
CASES = [("nano", task) for task in tasks.TASKS] + [("nano-backdoor", task) for task in ("copy", "refusal")]


OURS = """
import json, sys
import dgemma_jax as dg
from dgemma_jax.train import evaluate

asked, count = json.loads(sys.argv[1])
print(json.dumps({
    name: evaluate.exact(dg.load(name), count=count, names=names, poisoned=name == "nano-backdoor")
    for name, names in asked.items()
}))
"""


@pytest.fixture(scope="module")
def ours():
    """Exact answers of this package by model and task, in a process that compiles with all optimisations."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    asked = {name: [task for model, task in CASES if model == name] for name, _ in CASES}
    settings = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-c", OURS, json.dumps([asked, PROMPTS])]
    done = subprocess.run(command, env=settings, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("name", "task"), CASES)
def test_transformers_answers_as_often_exactly(ours, name, task):
    bundle = dg.load(name)
    examples = evaluate.prompts(task, seed=1, count=PROMPTS, poisoned=name == "nano-backdoor")
    theirs = peer_share(registry.embedded(name), bundle.tokenizer, examples)
    assert abs(ours[name][task] - theirs) <= 0.03, f"{task}: {ours[name][task]} here, {theirs} in transformers"
