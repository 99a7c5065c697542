"""Masks and the cache: truth tables; the ring holds the last tokens, however they came."""

import jax
import numpy as np
import oracles
import pytest

from dgemma_jax.config import FULL, SLIDING, ModelConfig
from dgemma_jax.nn import cache as kv
from dgemma_jax.nn import masks

append = jax.jit(kv.append)
B, K, H = 4, 2, 3


def test_causal_mask_by_hand():
    query, key = np.array([[3, 4]]), np.array([[-1, 0, 1, 2, 3, 4, 5]])
    full = np.array([[0, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 0]], bool)
    window = np.array([[0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1, 0]], bool)
    np.testing.assert_array_equal(masks.visible(query, key, None)[0], full)
    np.testing.assert_array_equal(masks.visible(query, key, 2)[0], window)
    np.testing.assert_array_equal(masks.visible(query, key, 100)[0], full)


def test_canvas_mask_by_hand():
    sight = masks.canvas(np.array([[4, -1, 3], [-1, -1, -1]]), np.array([[5, 6], [0, 1]]))
    got = sight.mask()
    assert got.shape == (2, 1, 5) and got.dtype == bool  # the same for every query
    np.testing.assert_array_equal(got[0], [[1, 0, 1, 1, 1]])  # every filled slot, whatever its distance
    np.testing.assert_array_equal(got[1], [[0, 0, 0, 1, 1]])  # and the whole canvas without a window
    np.testing.assert_array_equal(sight.of(1, 3).mask(), got[..., 1:4])


@pytest.mark.parametrize("slots", [1, 3, 7, 20])
def test_slot_positions(slots):
    lengths = np.arange(18)
    got = np.asarray(kv.slot_positions(lengths, slots))
    np.testing.assert_array_equal(got, [oracles.ring(n, slots) for n in lengths])


def test_sizes_of_layers():
    config = ModelConfig.tiny(layer_types=(SLIDING, FULL), sliding_window=8)
    shapes = jax.eval_shape(lambda: kv.empty(config, 5, 20, np.float32))
    assert [e.k.shape for e in shapes.layers] == [(5, 2, 7, 8), (5, 1, 20, 16)]
    assert shapes.length.shape == (5,)
    assert kv.num_slots(config, 0, 4) == 4  # never more than the capacity


def fill(slots, chunks, counts):
    """An entry after chunks of tokens, `counts[c][b]` valid ones at random places of chunk c."""
    rng = np.random.default_rng(3)
    zeros = np.zeros((B, K, slots, H), np.float32)
    entry, lengths = kv.LayerCache(zeros, zeros), np.zeros(B, int)
    for size, count in zip(chunks, counts, strict=True):
        valid = np.zeros((B, size), bool)
        for row in range(B):
            valid[row, rng.permutation(size)[: count[row]]] = True
        positions = lengths[:, None] + np.cumsum(valid, 1) - 1
        k = np.broadcast_to(positions[..., None, None] + 100.0, (B, size, K, H)).astype(np.float32)
        k = np.where(valid[..., None, None], k, -7)  # junk where there is padding
        entry = append(entry, k, -k, positions, valid)
        lengths = lengths + valid.sum(1)
    return entry, lengths


@pytest.mark.parametrize("slots", [1, 4, 12])
def test_slots_hold_the_last_tokens(slots):
    """Rows of unequal lengths; token by token, chunk by chunk, and all at once into a ring that is too small."""
    totals = np.array([0, 3, 7, 12])
    tens = [np.clip(totals - 4 * i, 0, 4) for i in range(3)]
    ways = {
        "at once": ([12], [totals]),
        "chunks": ([4, 4, 4], tens),
        "one by one": ([1] * 12, [(totals > i).astype(int) for i in range(12)]),
        "ragged": ([8, 8], [np.array([0, 1, 6, 5]), np.array([0, 2, 1, 7])]),
    }
    held = np.array([oracles.ring(n, slots) for n in totals])
    expected = np.where(held >= 0, held + 100, 0)[:, None, :, None] * np.ones((1, K, 1, H))
    for name, (chunks, counts) in ways.items():
        entry, lengths = fill(slots, chunks, counts)
        np.testing.assert_array_equal(lengths, totals)
        np.testing.assert_array_equal(entry.k, expected, err_msg=name)
        np.testing.assert_array_equal(entry.v, -expected, err_msg=name)
        np.testing.assert_array_equal(kv.slot_positions(lengths, slots), held)
