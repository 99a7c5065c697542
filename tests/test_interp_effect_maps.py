"""Effect maps: shapes are checked, recovery and the largest places are by hand, files and pictures hold it all."""

import numpy as np
import pytest

import interp

STEPS, LAYERS, C, PAIRS = 3, 2, 4, 2


def example(**changes):
    rng = np.random.default_rng(0)
    shapes = {"canvas": (STEPS, C), "layers.*.attn_z": (STEPS, LAYERS, C, 3), "cache": (STEPS, LAYERS, 5)}
    axes = {"canvas": "RTB", "layers.*.attn_z": "RLTNB", "cache": "RLPB"}
    given = dict(
        effects={n: rng.normal(size=(*s, PAIRS)).astype(np.float32) for n, s in shapes.items()},
        axes=axes,
        index={n: {a: list(range(k)) for a, k in zip(axes[n], shapes[n], strict=False)} for n in shapes},
        base=np.array([[1.0, 2.0]] * STEPS, np.float32), donor=np.array([[3.0, 2.0]] * STEPS, np.float32),
        noise=np.full((STEPS, PAIRS), 0.5), method="patch", labels={"P": ["<bos>", "a", "b", "c", "d"]},
    )  # fmt: skip
    return interp.EffectMap(**given | changes)


def test_recovery_is_the_share_of_the_way():
    found = example()
    share = found.recovery("canvas")
    np.testing.assert_allclose(share[..., 0], found["canvas"][..., 0] / 2, rtol=1e-6)
    assert np.isnan(share[..., 1]).all()  # the second pair does not differ
    with pytest.raises(ValueError, match="no donor"):
        example(donor=None).recovery("canvas")


def test_the_largest_places_come_first():
    found = example()
    found.effects["layers.*.attn_z"][1, 0, 3, 2] = -9
    found.effects["cache"][2, 1, 4] = 7
    (first, place, effect), (second, at, _), *rest = found.top(5)
    assert (first, effect) == ("layers.*.attn_z", -9) and len(rest) == 3
    assert place == {"step": 1, "layer": 0, "position": 3, "head": 2}
    assert second == "cache" and at == {"step": 2, "layer": 1, "prompt position": 4}
    assert found.size == found.flat().size == PAIRS * (12 + 72 + 30)


def test_a_file_holds_it_all(tmp_path):
    found = example()
    again = interp.EffectMap.load(found.save(tmp_path / "map"))
    np.testing.assert_array_equal(again.flat(), found.flat())
    for name in ("axes", "index", "labels", "method"):
        assert getattr(again, name) == getattr(found, name)
    for name in ("base", "donor", "noise"):
        np.testing.assert_array_equal(getattr(again, name), getattr(found, name))
    assert repr(again) == repr(found) and "228 interventions, metric 1.5, of the donor 2.5, noise" in repr(found)
    assert "<td>cache</td>" in found._repr_html_() and "228 interventions" in found._repr_html_()
    bare = example(donor=None, noise=None)
    assert interp.EffectMap.load(bare.save(tmp_path / "bare")).donor is None


def test_what_does_not_fit_is_refused():
    wrong = example().effects | {"canvas": np.zeros((STEPS, C + 1, PAIRS))}
    with pytest.raises(ValueError, match="canvas has shape"):
        example(effects=wrong)
    with pytest.raises(KeyError, match="was not swept; swept are canvas"):
        example()["soft"]


def test_pictures_show_the_numbers():
    found = example()
    figure = found.plot(row=0)
    shown = {place.get_title(): place for place in figure.axes if place.images}
    assert len(shown) == 1 + STEPS + STEPS
    np.testing.assert_array_equal(shown["canvas"].images[0].get_array(), found["canvas"][..., 0])
    assert (shown["canvas"].get_xlabel(), shown["canvas"].get_ylabel()) == ("canvas position", "step")
    cache = shown["cache, step 2"]
    np.testing.assert_array_equal(cache.images[0].get_array(), found["cache"][2, ..., 0])
    assert [label.get_text() for label in cache.get_xticklabels()] == found.labels["P"]
    heads = found["layers.*.attn_z"][1, ..., 0]
    largest = np.take_along_axis(heads, np.abs(heads).argmax(-1)[..., None], -1)[..., 0]
    np.testing.assert_array_equal(shown["layers.*.attn_z, step 1"].images[0].get_array(), largest)
    limits = {tuple(place.images[0].get_clim()) for place in shown.values()}
    assert len(limits) == 1
    few = found.plot(recovery=True, most=2)  # the pair without a gap is left out of the mean
    shown = {place.get_title(): place for place in few.axes if place.images}
    assert set(shown) == {"canvas", *(f"{n}, step {i}" for n in ("layers.*.attn_z", "cache") for i in (0, 2))}
    np.testing.assert_allclose(shown["canvas"].images[0].get_array(), found["canvas"][..., 0] / 2, rtol=1e-6)
