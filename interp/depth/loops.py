"""One iteration of a loop as a matrix over (maximum, plus), and its powers."""

from __future__ import annotations

from interp.depth.paths import NOTHING, Value, through

Step = dict[int, Value]  # for each thing that goes round: how it depends on those of the iteration before


def power(step: Step, count: int) -> Step:
    """`count` iterations as one; a dozen compositions for thousands."""
    result: Step = {key: {key: NOTHING} for key in step}
    while count:
        if count & 1:
            result = composed(result, step)
        count >>= 1
        if count:
            step = composed(step, step)
    return result


def composed(first: Step, second: Step) -> Step:
    """One step, then the other."""
    return {key: through(row, first) for key, row in second.items()}
