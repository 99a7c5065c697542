"""The embedded organisms answer alike in `transformers`: the same files, its own sampler and random numbers."""

from __future__ import annotations

import pytest

import dgemma_jax as dg
from dgemma_jax.train import evaluate, tasks
from dgemma_jax.weights import registry

# torch warns of itself when its compiler is first imported, as `generate` does.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
PROMPTS = 200
ROWS = 20  # at a time: a batch goes on until its slowest row has settled


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


@pytest.mark.parametrize(("name", "task"), CASES)
def test_transformers_answers_as_often_exactly(name, task):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    bundle, poisoned = dg.load(name), name == "nano-backdoor"
    ours = evaluate.exact(bundle, seed=1, count=PROMPTS, names=[task], poisoned=poisoned, batch=ROWS)[task]
    examples = evaluate.prompts(task, seed=1, count=PROMPTS, poisoned=poisoned)
    theirs = peer_share(registry.embedded(name), bundle.tokenizer, examples)
    assert abs(ours - theirs) <= 0.03, f"{task}: {ours} here, {theirs} in transformers"
