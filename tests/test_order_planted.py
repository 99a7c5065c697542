"""What the trained organism was taught, on a few prompts of the study that `python -m interp.order.planted_study` runs."""

import pytest

import dgemma_jax as dg
import interp
from interp.flow.recorded import of_rows
from interp.order import planted_study as planted

pytestmark = pytest.mark.slow

COUNT = 6


@pytest.fixture(scope="module")
def nano():
    return dg.load("nano")


@pytest.fixture(scope="module")
def found():
    return [example for name in ("length", "sequence", "add") for example in planted.examples(name, COUNT)]


@pytest.fixture(scope="module")
def run(nano, found):
    return planted.run(nano, found, planted.warm(nano))


def test_length_is_known_early(run, found):
    """Correlation with the requested length 0.9 or more by step 2; not with lengths of other prompts."""
    seen = planted.foresight(run, found)
    assert seen["correlation"][2] >= 0.9 and seen["correlation"][2] > seen["null"][2]
    lengths = [e.facts["n"] for e in found[:COUNT]]
    wrong = interp.length_foresight(of_rows(run, range(COUNT)), lengths[1:] + lengths[:1])
    assert wrong.correlation[2] < 0.9


def test_the_hidden_term_is_an_intermediate_token(nano, run, found):
    """It is seen, not that of another prompt; and it acts: without it the word for it becomes more likely."""
    seen = planted.hidden_terms(nano, run, found)
    assert seen["seen"] >= 0.8 and seen["seen of the next prompt"] <= 0.2
    assert seen["word gains without it"] > seen["word gains without another"]


def test_sums_settle_by_carry(run, found):
    """The units, which need no carry, are committed before tens and hundreds."""
    assert planted.carries(run, found)["units first"] > 0.5
