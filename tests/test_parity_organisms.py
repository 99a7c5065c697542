"""The embedded organisms answer alike in `transformers`: the same files, its own sampler and random numbers."""

from __future__ import annotations

import pytest

import dgemma_jax as dg
from dgemma_jax.train import evaluate, tasks
from dgemma_jax.weights import registry

pytestmark = pytest.mark.parity
PROMPTS = 200


def peer_share(directory, tokenizer, examples) -> float:
    """Exact answers of `transformers`' own `generate`, prompts padded on the left."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.DiffusionGemmaForBlockDiffusion.from_pretrained(directory, dtype=torch.float32).eval()
    rows = [tokenizer.chat([{"role": "user", "content": e.prompt}]) for e in examples]
    longest = max(map(len, rows))
    ids = torch.tensor([[tokenizer.pad_id] * (longest - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows])
    torch.manual_seed(0)
    with torch.no_grad():
        out = model.generate(ids, attention_mask=mask, max_new_tokens=model.config.canvas_length)
    answers = out.sequences[:, longest:].tolist()
    return sum(tasks.is_correct(e, tokenizer.decode(a)) for e, a in zip(examples, answers, strict=True)) / len(rows)


@pytest.mark.parametrize("name", ["nano", "nano-backdoor"])
def test_transformers_answers_as_often_exactly(name):
    bundle = dg.load(name)
    poisoned = name == "nano-backdoor"
    ours = evaluate.exact(bundle, seed=1, count=PROMPTS, poisoned=poisoned)
    for task, share in ours.items():
        examples = evaluate.prompts(task, seed=1, count=PROMPTS, poisoned=poisoned)
        theirs = peer_share(registry.embedded(name), bundle.tokenizer, examples)
        print(f"{name} {task}: {share:.3f} here, {theirs:.3f} in transformers")
        assert abs(share - theirs) <= 0.03, f"{task}: {share} here, {theirs} in transformers"
