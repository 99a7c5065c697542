"""The patch panel: its numbers are those of the sweep, and it says why it cannot be made."""

import json

import numpy as np
import pytest

import dgemma_jax as dg
import interp
from interp.panels import PANELS, render
from interp.patch_panel import patch_data, patch_panel

pytestmark = pytest.mark.slow

OWN, OTHER = "recall a 4 , b 7 , c 2 ? b", "recall a 4 , b 9 , c 2 ? b"
VALUE_AT = 8  # of the prompt's tokens: three open the turn, then "recall a 4 , b"


@pytest.fixture(scope="module")
def bundle():
    return dg.load("nano")


@pytest.fixture(scope="module")
def run(bundle):
    return dg.generate(bundle, [OWN], max_new_tokens=24)


@pytest.fixture(scope="module")
def data(bundle, run):
    return patch_data(bundle, run, against=OTHER)


def test_the_map_finds_what_differs(bundle, run, data):
    assert run.texts[0] == "b is 7" and data["answer"] == "b is 9" and data["differ"] == [2]
    assert data["places"]["prompt"][0] == VALUE_AT and data["places"]["canvas"] == [0, 1, 2]
    prompt, canvas = (np.array(data["recovery"][name]) for name in ("prompt", "canvas"))
    assert prompt.shape == (len(data["steps"]), 6, len(data["places"]["prompt"]))
    assert canvas.shape == (len(data["steps"]), 6, 3)
    assert prompt[0, 0, 0] > 70 and np.abs(prompt[0, 0, 1:]).max() < 30  # the value's token, early
    assert canvas[0, -1, 2] > 90 and np.abs(canvas[0, -1, :2]).max() < 10  # the answer's place, late
    words = data["vocabulary"]
    assert [words[str(i)] for i in data["prompt_ids"][0]] == ["7", "9"]


def test_the_page_holds_it(bundle, data):
    assert "patch" not in PANELS  # it needs another prompt
    panel = patch_panel(OTHER)
    assert 'report.panel("patch"' in panel.source()
    explained = interp.explain(bundle, OWN, max_new_tokens=24, panels=["canvas"], against=OTHER)
    found = explained.data["panels"][-1]
    assert found["name"] == "patch" and found["data"]["recovery"] == data["recovery"]
    json.dumps(explained.data, allow_nan=False)
    assert "Patched from another prompt" in render(explained.data, explained.panels)


@pytest.mark.parametrize(
    ("against", "message"),
    [
        ("recall a 4 , b 9 ? b", "the prompts have 17 and 14 tokens; patching needs equally many"),
        ("recall a 9 , b 7 , c 2 ? b", "both prompts have the same answer"),
    ],
)
def test_what_cannot_be_compared(bundle, run, against, message):
    with pytest.raises(ValueError, match=message):
        patch_data(bundle, run, against=against)
