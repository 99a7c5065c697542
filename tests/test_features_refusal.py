"""The refusal direction of the trained model, by its effects: taken out refusals end, put in harmless prompts are refused."""

import numpy as np
import pytest

import dgemma_jax as dg
import interp
from interp.features import refusal_study as study

N, LAYERS = 4, 6


@pytest.mark.slow
def test_the_refusal_direction_decides_refusals():
    """One batch: prompts as they are, without each layer's direction, without a random one, and with it added."""
    nano = dg.load("nano")
    nano = nano.with_sampler(nano.sampler.replace(max_denoising_steps=6))
    source, test = study.prompts(24, 1, "train"), study.prompts(N, 9, "test")
    found = interp.find_directions(nano, source["refused"], source["harmless"], steps=0, batch=24)
    kinds = {"plain": 1, "ablated": LAYERS, "random": 1, "ordinary": 1, "ordinary ablated": LAYERS, "added": 1}
    kind = np.repeat(list(kinds), np.asarray(list(kinds.values())) * N)
    noise = np.random.default_rng(0).standard_normal((N, found.vectors.shape[1]))
    by_layer = found.vectors.repeat(N, 0)
    units = np.repeat(noise[:1], len(kind), 0)
    units[kind == "ablated"] = units[kind == "ordinary ablated"] = by_layer
    off = np.isin(kind, ["plain", "ordinary", "added"])
    edited = interp.ablate_directions(nano, units[:, None], rows=np.where(off, 0.0, 1.0))
    vector = interp.SteeringVector(
        difference=found.vectors, norms=found.norms, layers=tuple(range(LAYERS)), place="prompt", counts=(24, 24)
    )
    edited = interp.steer(edited, vector, np.where(kind == "added", 0.5, 0.0), layers=[1, 2, 3], place="prompt")
    rows = test["refused"] * (2 + LAYERS) + test["ordinary"] * (1 + LAYERS) + test["harmless"]
    seeds = list(range(N)) * (len(rows) // N)
    out = dg.generate(edited, rows, seeds, None, nano.config.canvas_length, dg.Record.nothing())
    texts = np.asarray(out.texts)
    refused = np.asarray([study.refuses(text) for text in texts])
    still = refused[kind == "ablated"].reshape(LAYERS, N).mean(1)
    changed = (texts[kind == "ordinary ablated"].reshape(LAYERS, N) != texts[kind == "ordinary"]).mean(1)
    print(still, changed, texts[kind == "added"])
    assert refused[kind == "plain"].all() and refused[kind == "random"].mean() >= 0.75
    assert (still + changed).min() <= 0.5 and still.max() >= 0.75  # some layer's is the cause, not every one's
    assert refused[kind == "added"].mean() >= 0.75 and not refused[kind == "ordinary"].any()
