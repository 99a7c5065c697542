"""Every estimator on a model whose weights are written: one prompt token decides. Null, other prompts, a mesh."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import hand_built as hb
import numpy as np
import pytest

import dgemma_jax as dg
import interp
from interp.masking import masked_game as games
from interp.masking import planted
from interp.masking.masked_diffusion import masked_game

AT = 2
OPTIONS = dict(rows_at_once=16, draws=4)
PROMPT = hb.prompts(1)[0].tolist()

ON_A_MESH = """
import sys
import jax
import numpy as np
from test_masking_methods import OPTIONS, PROMPT, dg, route, target
from interp.masking.masked_diffusion import masked_game

given = np.load(sys.argv[1])
model = route()
bundle = dg.Bundle(model.config, model).on(jax.make_mesh((8,), ("data",)))
game = masked_game(bundle, PROMPT, target(2), **OPTIONS)
assert game.rows_at_once == 16 and game.gradients_at_once == 8
found = game.values(given["masks"], given["draws"])
np.testing.assert_allclose(found, given["values"], atol=2e-5)
print("equal")
"""


def target(position, prompt=PROMPT):
    return interp.LogProb([position], [int(hb.answer(prompt[position]))])


def route():
    """The two layers of the hand-built model that do the work: half the time to compile."""
    model = hb.model()
    model.layers = model.layers[hb.HEAD[0] : hb.EXPERT[0] + 1]
    model.config = dataclasses.replace(hb.CONFIG, layer_types=hb.CONFIG.layer_types[hb.HEAD[0] : hb.EXPERT[0] + 1])
    return model


@pytest.fixture(scope="module")
def model():
    return route()


@pytest.fixture(scope="module")
def game(model):
    return masked_game(model, PROMPT, target(AT), **OPTIONS)


@pytest.mark.parametrize(("method", "settings"), [
    ("path", dict(budget=200)), ("regression", dict(budget=200)),
    pytest.param("gradient", dict(budget=150), marks=pytest.mark.heavy),
    ("gates", dict(budget=260, margin=1.0)),
])  # fmt: skip
def test_every_estimator_finds_the_token_that_decides(model, method, settings):
    found = interp.saliency(model, PROMPT, target(AT), method, **OPTIONS, **settings)
    others = np.delete(found.scores, AT)
    if method == "gates":
        assert np.flatnonzero(found.kept).tolist() == [AT] and found.scores[AT] > 0.9
        return
    assert found.scores[AT] > 5 * np.abs(others).max() and found.scores[AT] > 3
    gap = {"path": 1e-4, "regression": 1e-4, "gradient": 0.2 * (found.on - found.off)}[method]
    assert found.completeness_gap < gap
    assert abs(found.scores[AT] - (found.on - found.off)) < 4 * found.stderr[AT] + gap + 0.2


def test_gradients_are_those_of_the_values(game):
    masks = np.full((2, len(game.names)), 0.6)
    values, grads = game.gradients(masks, [0, 1])
    np.testing.assert_allclose(values, game.values(masks, [0, 1]), atol=1e-5)
    shift = 2e-3
    moved = np.repeat(masks[:1], 2, 0)
    moved[:, AT] += [shift, -shift]
    up, down = game.values(moved, [0, 0])
    assert grads[0, AT] == pytest.approx((up - down) / (2 * shift), rel=2e-2, abs=1e-3)


def test_shuffled_weights_lose_it(model):
    """Each position is the one that decides in turn; a map that knows nothing finds a sixth of them."""

    def share(model):
        maps = [interp.saliency(model, PROMPT, target(at), **OPTIONS, budget=45) for at in range(0, hb.LENGTH, 2)]
        return np.mean([found.scores.argmax() == at for at, found in zip(range(0, hb.LENGTH, 2), maps, strict=True)])

    assert share(model) == 1
    bundle = dg.Bundle(model.config, model)
    assert np.mean([share(planted.shuffled(bundle, seed)) for seed in range(3)]) < 0.5


def test_against_other_prompts_only_words_that_differ_count(model):
    first, second = hb.pairs(4, AT)
    before = games._stepped._cache_size()
    found = interp.saliency(model, first[0], target(AT, first[0]), baseline=[second[0]] * 4, **OPTIONS, budget=60)
    assert games._stepped._cache_size() == before, "another baseline is data"
    assert np.abs(np.delete(found.scores, AT)).max() < 1e-5
    assert found.scores[AT] == pytest.approx(found.on - found.off, abs=1e-5) and found.baseline == "other prompts"
    other = masked_game(model, second[0], target(AT, first[0]), **OPTIONS)
    assert found.off == pytest.approx(float(other.values(np.ones((1, hb.LENGTH)), [0])[0]), abs=1e-5)


@pytest.mark.slow
def test_rows_on_a_mesh_of_eight_are_the_rows_of_one(game, tmp_path):
    rng = np.random.default_rng(0)
    masks, draws = (rng.random((20, len(game.names))) < 0.5).astype(np.float32), rng.integers(0, 4, 20)
    np.savez(tmp_path / "given.npz", masks=masks, draws=draws, values=game.values(masks, draws))
    here = Path(__file__).parent
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", ON_A_MESH, str(tmp_path / "given.npz")],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path},
        capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.strip().endswith("equal")
