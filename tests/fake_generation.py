"""A made-up generation with the fields that `dg.generate` returns, for tests of what reads them.

Each position has a hidden final token and a time at which it becomes clear; until then rivals lead and
the entropy is high. Acceptance follows the sampler's rule, so un-accepts occur as they do in real runs.
"""

import types

import numpy as np

from dgemma_jax.config import ModelConfig, SamplerConfig
from dgemma_jax.diffusion import StopReason, Trajectory

PAD, EOS, BOS = 0, 1, 2


class FakeTokenizer:
    """Pieces by id; `decode` joins them, with `▁` as a space."""

    eos_ids = (EOS,)
    special_ids = frozenset({PAD, EOS, BOS})

    def __init__(self, pieces):
        self.pieces = ["<pad>", "<eos>", "<bos>", *pieces]

    def id(self, piece):
        return self.pieces.index(piece)

    def token(self, id):
        return self.pieces[id].replace("\n", "\\n")

    def tokens(self, ids):
        return [self.token(id) for id in ids]

    def decode(self, ids, skip_special=True):
        kept = [i for i in ids if not (skip_special and i in self.special_ids)]
        return "".join(self.pieces[i] for i in kept).replace("▁", " ").strip()


def bundle(pieces, canvas_length=32, name="fake"):
    """A bundle without a model."""
    tokenizer = FakeTokenizer(pieces)
    config = ModelConfig.tiny(vocab_size=len(tokenizer.pieces), canvas_length=canvas_length, eos_token_ids=(EOS,))
    return types.SimpleNamespace(tokenizer=tokenizer, config=config, source=name)


def generation(fake, prompt_ids, answer_ids, *, steps=14, seed=0, top_k=8, **sampler):
    """The run in which `fake` writes `answer_ids`, an end token and padding."""
    rng = np.random.default_rng(seed)
    c = fake.config.canvas_length
    ids = [*answer_ids, EOS]
    num_blocks = -(-len(ids) // c)
    final_JC = np.full((num_blocks, c), PAD)
    final_JC.flat[: len(ids)] = ids
    sampler = SamplerConfig(**{"eos_token_ids": (EOS,)} | sampler)
    blocks = [_block(rng, fake.config.vocab_size, row, steps, sampler, top_k) for row in final_JC]

    cap = sampler.max_denoising_steps

    def padded(name):
        arrays = [np.asarray(block[name]) for block in blocks]
        out = np.zeros((num_blocks, cap, 1, *arrays[0].shape[1:]), arrays[0].dtype)
        for j, array in enumerate(arrays):
            out[j, : len(array), 0] = array
        return out

    names = ("tokens", "argmax", "accepted", "entropy", "temperature")
    trajectory = Trajectory(
        start=np.stack([block["start"] for block in blocks])[:, None],
        **{name: padded(name) for name in names},
        top_ids=padded("top_ids") if top_k else None,
        top_probs=padded("top_probs") if top_k else None,
        soft=None,
        fn=None,
        valid=padded("valid"),
        committed=np.stack([block["argmax"][-1] for block in blocks])[:, None],
        num_steps=np.array([[len(block["argmax"])] for block in blocks]),
        stop=np.array([[block["stop"]] for block in blocks]),
    )
    total = int(trajectory.num_steps.sum())
    return types.SimpleNamespace(
        texts=[fake.tokenizer.decode(answer_ids)],
        tokens=final_JC.reshape(1, -1),
        prompt_tokens=[list(prompt_ids)],
        trajectory=trajectory,
        num_steps=np.array([total]),
        stop_reason=["eos"],
        tokens_per_forward=np.array([len(ids) / total]),
        sampler=sampler,
        seeds=[seed],
    )


def _block(rng, vocab, final_C, steps, sampler, top_k):
    c, u = len(final_C), 8
    clear_C = 1 + (steps - 4) * np.linspace(0.1, 0.8, c) * rng.uniform(0.3, 1.3, c)
    clear_C[final_C == PAD] = rng.uniform(0, 1.5, (final_C == PAD).sum())
    rivals_CU = rng.integers(3, vocab, (c, u))
    rivals_CU[:, 0] = final_C
    rivals_CU[1:, 1], rivals_CU[:-1, 2] = final_C[:-1], final_C[1:]  # smeared neighbours
    for row in rivals_CU:  # candidates differ, as they do in a real top-k
        while len(set(row)) < u:
            row[:] = [row[0], *(i if i not in row[:n] else rng.integers(3, vocab) for n, i in enumerate(row) if n)]
    out = {n: [] for n in ("tokens", "argmax", "accepted", "entropy", "temperature", "top_ids", "top_probs", "valid")}
    start_C, stop = rng.integers(0, vocab, c), StopReason.MAX_STEPS
    wobble_CU = rng.normal(0, 1.2, (c, u))
    for t in range(sampler.max_denoising_steps):
        wobble_CU = 0.6 * wobble_CU + rng.normal(0, 1.0, (c, u))
        score_CU = 1.2 + 0.12 * t + wobble_CU
        score_CU[:, 0] += 2.2 * (t - clear_C)
        tau = sampler.t_min + (sampler.t_max - sampler.t_min) * (1 - t / sampler.max_denoising_steps)
        weight_CU = np.exp(np.minimum(score_CU / tau, 60))
        rest = float(vocab - u)
        total = weight_CU.sum(1, keepdims=True) + rest
        p_CU, tail = weight_CU / total, rest / total
        entropy_C = -(p_CU * np.log(p_CU)).sum(1) - (tail * np.log(np.maximum(tail / rest, 1e-30)))[:, 0]
        entropy_C = np.maximum(entropy_C, 0)
        order = np.argsort(entropy_C)
        keep = np.cumsum(entropy_C[order]) - entropy_C[order] <= sampler.entropy_bound
        accepted_C = np.zeros(c, bool)
        accepted_C[order] = keep
        rank_CU = np.argsort(-p_CU, 1)
        top_ids = np.take_along_axis(rivals_CU, rank_CU, 1)
        sample_C = np.array([rng.choice(r, p=p / p.sum()) for r, p in zip(rivals_CU, p_CU, strict=True)])
        out["tokens"].append(np.where(accepted_C, sample_C, rng.integers(0, vocab, c)))
        out["argmax"].append(top_ids[:, 0])
        out["accepted"].append(accepted_C)
        out["entropy"].append(entropy_C.astype(np.float32))
        out["temperature"].append(np.float32(tau))
        out["top_ids"].append(top_ids[:, :top_k])
        out["top_probs"].append(np.take_along_axis(p_CU, rank_CU, 1)[:, :top_k].astype(np.float32))
        out["valid"].append(True)
        stable = t > 0 and (out["argmax"][-1] == out["argmax"][-2]).all()
        if stable and entropy_C.mean() < sampler.confidence_threshold and (top_ids[:, 0] == final_C).all():
            stop = StopReason.CONVERGED
            break
    out["argmax"][-1] = final_C
    return out | {"start": start_C, "stop": int(stop)}
