"""Parity with recorded numbers of `transformers`: needs neither torch nor a network.

`reference_cases.py` made the records, `reference_checks.py` says what must hold. The checkpoints are as
`save_pretrained` wrote them, so that the format is tested too.
"""

import functools

import pytest
import reference_checks as checks

import dgemma_jax as dg

DIRECTORY = checks.DIRECTORY
CASES = sorted((path.name for path in DIRECTORY.iterdir() if path.is_dir()), reverse=True)  # "irregular" first


@functools.cache
def loaded(case):
    return dg.load(DIRECTORY / case), checks.load_record(DIRECTORY / case / "reference.npz")


# The parity tests compare both afresh; one is enough here.
@pytest.mark.parametrize("case", [CASES[0], *(pytest.param(case, marks=pytest.mark.slow) for case in CASES[1:])])
@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
def test_agrees_with_the_record(check, case):
    check(*loaded(case))


def test_records_are_small():
    sizes = {case: sum(path.stat().st_size for path in (DIRECTORY / case).iterdir()) for case in CASES}
    assert len(sizes) >= 2
    assert max(sizes.values()) < 1_000_000, sizes
