"""Trajectories written by hand, for statistics that need no model."""

import numpy as np

from dgemma_jax.diffusion import Trajectory

PAD, EOS, BOS = 0, 1, 2


def trajectory(argmax, accepted=None, entropy=None, *, ends=None, top_ids=None, top_probs=None, fn=None, committed=None):
    """One block of rows.

    argmax: [R, B, C]; accepted: the same shape, or [B, C] step of the first acceptance (it then stays); ends: [B]
    steps taken. What is left out is neutral: accepted at the last step, entropy 0, the argmax as only candidate.
    """
    argmax = np.asarray(argmax)
    steps, rows, length = argmax.shape
    ends = np.full(rows, steps) if ends is None else np.asarray(ends)
    valid = np.arange(steps)[:, None] < ends
    accepted = np.broadcast_to(ends[:, None] - 1, (rows, length)) if accepted is None else np.asarray(accepted)
    if accepted.ndim == 2:
        accepted = np.arange(steps)[:, None, None] >= accepted
    entropy = np.zeros(argmax.shape) if entropy is None else np.asarray(entropy, float)
    top_ids = argmax[..., None] if top_ids is None else np.asarray(top_ids)
    top_probs = np.ones(top_ids.shape) if top_probs is None else np.asarray(top_probs, float)
    last = argmax[ends - 1, np.arange(rows)] if committed is None else np.asarray(committed)

    def kept(values):
        values = np.asarray(values)
        return np.where(valid.reshape(steps, rows, *[1] * (values.ndim - 2)), values, 0)[None]

    return Trajectory(
        start=np.zeros((1, rows, length), int), tokens=kept(argmax), argmax=kept(argmax),
        accepted=kept(accepted).astype(bool), entropy=kept(entropy), temperature=np.zeros((1, steps, rows)),
        top_ids=kept(top_ids), top_probs=kept(top_probs), soft=None,
        fn=None if fn is None else {name: kept(v) for name, v in fn.items()}, valid=valid[None], committed=last[None],
        num_steps=ends[None], stop=np.ones((1, rows), int),
    )  # fmt: skip
