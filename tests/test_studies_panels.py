"""The four panels of order and flow: their numbers on a run whose truth is written by hand."""

import dataclasses
import types

import fake_generation
import hand_trajectory
import numpy as np
import pytest

from interp.order_panels import commit_data, length_data, smearing_data, transitions_data

PAD, EOS = 0, 1
TEXT = [3, 4, 5, EOS, PAD, PAD]


@pytest.fixture(scope="module")
def fake():
    return fake_generation.bundle([f"w{n}" for n in range(9)], canvas_length=6)


def of(fake, **arrays):
    sampler = types.SimpleNamespace(eos_token_ids=(EOS,), pad_token_id=PAD)
    return types.SimpleNamespace(trajectory=hand_trajectory.trajectory(**arrays), sampler=sampler)


def test_transitions_and_commits_are_those_of_the_record(fake):
    """Positions 0, 1, 2 come at steps 1, 2, 3; position 1 is given up at the last step and its token changes there."""
    argmax = np.tile(TEXT, (4, 1, 1))
    argmax[:3, 0, 1] = 7
    accepted = np.arange(4)[:, None, None] >= np.array([0, 1, 2, 0, 0, 0])
    accepted[3, 0, 1] = False
    run = of(fake, argmax=argmax, accepted=accepted)
    (block,) = transitions_data(fake, run)["blocks"]
    assert block["counts"] == [[1, 0, 3, 2], [4, 0, 1, 1], [5, 0, 1, 0], [5, 1, 0, 0]]
    (order,) = commit_data(fake, run)["blocks"]
    assert order["commit"] == [1, 2, 3, 1, 1, 1] and order["lock"] == [1, 4, 1, 1, 1, 1]
    assert order["content"] == [True] * 3 + [False] * 3
    assert order["measures"]["tau"] == 1 and order["measures"]["given up"] == 1


def test_the_expected_length_lies_between_its_bounds(fake):
    """End and padding hold 0.6 of the last three positions and 0.1 of the others, which candidates know of all but 0.2."""
    ids = np.stack([np.full(6, 5), [EOS, EOS, EOS, PAD, PAD, PAD]], -1)[None, None]
    closing = np.array([0.1] * 3 + [0.6] * 3)
    probs = np.stack([0.8 - closing, closing], -1)[None, None]
    (block,) = length_data(fake, of(fake, argmax=[[TEXT]], top_ids=ids, top_probs=probs))["blocks"]
    assert block == {"low": [pytest.approx(6 - 2.1 - 1.2)], "high": [pytest.approx(6 - 2.1)], "final": 3}


def test_a_token_at_two_places_is_smeared_and_a_settled_one_is_not(fake):
    argmax = np.tile(TEXT, (2, 1, 1))
    ids = np.stack([argmax, argmax], -1)
    ids[0, 0, 1, 1] = 3  # beside its own place
    probs = np.zeros(ids.shape)
    probs[..., 0], probs[..., 1] = [[[0.6]], [[1.0]]], [[[0.3]], [[0.0]]]
    (block,) = smearing_data(fake, of(fake, argmax=argmax, top_ids=ids, top_probs=probs))["blocks"]
    assert block["tokens"] == [[[1, 3]], []]
    assert block["spacing"][1] == [0, 0, 0, 1, 0, 0, 0] and len(block["null"]) == 2


def test_without_candidates_two_panels_say_nothing(fake):
    run = of(fake, argmax=[[TEXT]])
    run.trajectory = dataclasses.replace(run.trajectory, top_ids=None, top_probs=None)
    assert length_data(fake, run) is None and smearing_data(fake, run) is None and commit_data(fake, run)["blocks"]
