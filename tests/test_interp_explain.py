"""The explain page: its numbers against definitions, its text against injection, its panels."""

import base64
import dataclasses
import hashlib
import html
import html.parser
import json
import re
import types

import fake_generation
import numpy as np
import pytest

import dgemma_jax as dg
from interp.explain import SCHEMA_VERSION, Explanation, describe, explain, settled_step
from interp.panels import PANELS, Panel, choose

WORDS = tuple(f"w{n}" for n in range(60))
HOSTILE = '</script><script>document.title="run"</script><!-- <img src=x onerror=alert(1)> &amp; \u202e\ud7ff'


def words(n, start=0):
    return list(range(3 + start, 3 + start + n))


@pytest.fixture(scope="module")
def fake():
    return fake_generation.bundle(WORDS, canvas_length=12)


@pytest.fixture(scope="module")
def run(fake):
    """Two blocks: 12 positions, then 7 of the answer, the end token and padding."""
    return fake_generation.generation(fake, words(4), words(18, 10), steps=9, seed=5, max_denoising_steps=20)


def page_of(fake, run, **options):
    data = describe(fake, run, **options)
    panels = choose(None)
    return Explanation(
        data | {"panels": [{"name": p.name, "title": p.title, "place": p.place, "data": None} for p in panels]}, panels
    )


class Parsed(html.parser.HTMLParser):
    """The elements of a page, its scripts and its text, as a browser would see them."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.scripts, self.text, self.open = [], [], "", None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open = tag
        if tag == "script":
            self.scripts.append((dict(attributes), ""))

    def handle_data(self, data):
        if self.open == "script" and self.scripts:
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        else:
            self.text += data

    def handle_endtag(self, tag):
        self.open = None


# ---- numbers ---------------------------------------------------------------------------------------


def test_settled_step_by_hand():
    argmax = np.array([[7, 1, 5, 3], [7, 2, 4, 3], [7, 1, 4, 2], [7, 1, 4, 3]])
    assert settled_step(argmax).tolist() == [1, 3, 2, 4]
    assert settled_step(argmax[:1]).tolist() == [1] * 4


def test_settled_step_is_its_definition(run):
    argmax = np.random.default_rng(0).integers(0, 2, (9, 40))
    for i, settled in enumerate(settled_step(argmax)):
        holds = [s for s in range(1, 10) if (argmax[s - 1 :, i] == argmax[-1, i]).all()]
        assert settled == min(holds)


def test_what_is_derived_from_acceptance_by_hand(fake, run):
    """Position 0 is accepted, given up and accepted again; position 1 never; position 2 at the end."""
    accepted = np.array([[1, 0, 0], [0, 0, 0], [1, 0, 1]], bool)
    entropy = np.array([[0.1, 3, 2], [0.7, 3, 2], [0.2, 3, 0.3]], np.float32)
    argmax = np.array([[3, 4, 5], [6, 4, 5], [3, 4, 8]])
    one = types.SimpleNamespace(**vars(run))
    one.trajectory = dataclasses.replace(
        run.trajectory,
        start=np.array([[[9, 9, 9]]]),
        tokens=argmax[None, :, None],
        argmax=argmax[None, :, None],
        accepted=accepted[None, :, None],
        entropy=entropy[None, :, None],
        temperature=np.array([[[0.8], [0.7], [0.6]]]),
        top_ids=None,
        top_probs=None,
        valid=np.ones((1, 3, 1), bool),
        committed=argmax[None, -1:],
        num_steps=np.array([[3]]),
        stop=np.array([[2]]),
    )
    one.tokens = argmax[-1:]
    (block,) = describe(fake, one)["blocks"]
    assert block["accepted"] == accepted.astype(int).tolist()
    assert block["first_accepted"] == [1, None, 3]
    assert block["unaccepts"] == [1, 0, 0]
    assert block["entropy_at_commit"] == [0.1, None, 0.3]
    assert block["entropy_at_end"] == [0.2, 3, 0.3]
    assert (block["accepted_count"], block["newly_accepted"], block["unaccepted"]) == ([1, 0, 2], [1, 0, 2], [0, 1, 0])
    assert block["argmax_changed"] == [None, 1, 2]
    assert block["argmax_final"] == [2, 1, 3]
    assert block["settled"] == [3, 1, 3]
    assert np.allclose(block["mean_entropy"], entropy.mean(1), atol=1e-6)
    assert (block["stop"], block["top_ids"], block["answer_length"]) == ("MAX_STEPS", None, 3)


def test_arrays_are_those_of_the_trajectory(fake, run):
    data = describe(fake, run)
    assert len(data["blocks"]) == 2
    for j, block in enumerate(data["blocks"]):
        n = int(run.trajectory.num_steps[j, 0])
        assert block["num_steps"] == n < run.trajectory.tokens.shape[1]
        for name in ("tokens", "argmax", "accepted", "entropy", "temperature", "top_ids", "top_probs"):
            wanted = getattr(run.trajectory, name)[j, :n, 0]
            assert np.shape(block[name]) == wanted.shape
            assert np.abs(np.asarray(block[name], float) - wanted).max() <= 5.1e-6
        assert block["start"] == run.trajectory.start[j, 0].tolist()
        assert block["committed"] == run.trajectory.committed[j, 0].tolist()


def test_the_answer_and_its_part_of_each_block(fake, run):
    data = describe(fake, run, prompt="as given", max_new_tokens=24)
    assert data["answer"] == {"text": run.texts[0], "ids": words(18, 10), "ended": True}
    assert [block["answer_length"] for block in data["blocks"]] == [12, 7]  # 6 words and the end token
    assert data["prompt"] == {"text": "as given", "ids": words(4)}
    assert data["run"]["max_new_tokens"] == 24
    assert data["blocks"][1]["stop_sentence"] == dg.StopReason.CONVERGED.sentence


def test_every_id_has_its_text(fake, run):
    data = describe(fake, run)
    ids = set(data["prompt"]["ids"] + data["answer"]["ids"])
    for block in data["blocks"]:
        for name in ("start", "tokens", "argmax", "top_ids", "committed"):
            ids |= set(np.unique(block[name]).tolist())
    assert {int(i) for i in data["vocabulary"]} == ids
    assert all(data["vocabulary"][str(i)] == fake.tokenizer.token(i) for i in ids)
    assert set(data["special_ids"]) == ids & {fake_generation.PAD, fake_generation.EOS, fake_generation.BOS}


def test_prompts_of_every_kind_are_told_as_text(fake, run):
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    assert describe(fake, run, prompt=chat)["prompt"]["text"] == "system: be brief\nuser: hi"
    decoded = fake.tokenizer.decode(words(4), skip_special=False)
    assert describe(fake, run)["prompt"]["text"] == decoded
    assert describe(fake, run, prompt=np.array(words(4)))["prompt"]["text"] == decoded


@pytest.mark.parametrize(
    "source, shown",
    [
        ("nano", "nano"),
        ("google/some-model", "google/some-model"),
        ("/home/someone/checkpoints/nano", "nano"),
        ("/home/someone/.cache/hub/models--google--some-model/snapshots/0123abc", "google/some-model"),
        (None, "a model without a name"),
    ],
)
def test_the_name_of_the_model_tells_no_path(fake, run, source, shown):
    bundle = types.SimpleNamespace(tokenizer=fake.tokenizer, config=fake.config, source=source)
    assert describe(bundle, run)["model"]["name"] == shown


def test_a_batch_is_refused(fake, run):
    many = types.SimpleNamespace(**{**vars(run), "texts": ["a", "b"]})
    with pytest.raises(ValueError, match="one prompt, got a generation of 2"):
        describe(fake, many)


# ---- explain ---------------------------------------------------------------------------------------


def test_explain_asks_for_one_generation_and_runs_every_panel(fake, run, monkeypatch):
    asked, told = [], []
    monkeypatch.setattr(dg, "generate", lambda *given, **options: asked.append((given, options)) or run)
    count = Panel(
        name="count", title="Count", script="table.js", data=lambda b, g: {"rows": len(g.texts), "of": b.source}
    )
    explanation = explain(fake, "hello", seed=3, max_new_tokens=24, panels=["canvas", count], progress=told.append)
    (((bundle, prompts), options),) = asked
    assert bundle is fake and prompts == ["hello"]
    assert options["seed"] == 3 and options["max_new_tokens"] == 24 and options["record"] == dg.Record(top_k=8)
    assert [panel["name"] for panel in explanation.data["panels"]] == ["canvas", "count"]
    assert explanation.data["panels"][1]["data"] == {"rows": 1, "of": "fake"}
    assert explanation.data["schema_version"] == SCHEMA_VERSION
    assert told[0] == "generating" and told[-1] == "panel: Count"
    assert json.loads(json.dumps(explanation.data, allow_nan=False)) == explanation.data


@pytest.mark.parametrize("record", [dg.Record.nothing(), dg.Record(entropy=False)])
def test_a_record_without_what_the_page_shows_is_refused(fake, record):
    with pytest.raises(ValueError, match=r"explain needs .*entropy in the record"):
        explain(fake, "hello", record=record)


@pytest.mark.slow
def test_explain_of_a_real_model(tiny, monkeypatch):
    """The page's arrays are those of `generate`; of a resumed run, which lacks its beginning, there is no page."""
    made, generate = [], dg.generate
    monkeypatch.setattr(dg, "generate", lambda *given, **options: made.append(generate(*given, **options)) or made[0])
    sampler = dg.SamplerConfig(max_denoising_steps=3, eos_token_ids=(1, 5))
    explanation = explain(tiny, [2, 7, 8], seed=4, sampler=sampler, max_new_tokens=12)
    (block,), (out,) = explanation.data["blocks"], made
    assert block["tokens"] == out.trajectory.tokens[0, :, 0].tolist()
    assert np.allclose(block["entropy"], out.trajectory.entropy[0, :, 0], atol=1e-5)
    assert np.shape(block["top_ids"]) == (3, 12, 8)
    assert explanation.data["prompt"]["text"] == "#2 #7 #8"  # a model alone has no tokenizer
    assert explanation.html().count("<script>") == 3 + len(PANELS)
    (lens,) = [panel["data"] for panel in explanation.data["panels"] if panel["name"] == "lens"]
    (read,) = lens["blocks"]
    assert lens["layers"] == [0, 1, 2] and np.shape(read["top"]) == np.shape(read["final_probs"]) == (3, 3, 12)
    assert [row[-1] for row in read["top"]] == block["argmax"]  # the last layer is the model
    share = np.mean(np.equal(read["top"], block["committed"])[..., : max(1, block["answer_length"])], -1)
    assert np.allclose(read["share"], share, atol=1e-3)
    valid = out.trajectory.valid.copy()
    valid[0, 0] = False
    later = dataclasses.replace(out, trajectory=dataclasses.replace(out.trajectory, valid=valid))
    with pytest.raises(ValueError, match="the run was resumed"):
        describe(tiny, later)


# ---- the page --------------------------------------------------------------------------------------


def test_the_page_needs_nothing_from_elsewhere(fake, run):
    text = page_of(fake, run).html()
    loads = {"src", "href", "srcset", "data", "action", "poster"}
    for tag, attributes in Parsed(text).tags:
        for name in loads & attributes.keys():
            assert attributes[name].startswith(("#", "data:")), f"<{tag} {name}={attributes[name]!r}>"
    assert not re.search(r"@import|url\(", text)
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}  # a name, not a request


def test_the_policy_allows_exactly_the_scripts_of_the_page(fake, run):
    parsed = Parsed(page_of(fake, run).html())
    (policy,) = [a["content"] for tag, a in parsed.tags if tag == "meta" and "http-equiv" in a]
    allowed = set(re.findall(r"'sha256-[^']+'", policy))
    run_here = [text for attributes, text in parsed.scripts if "type" not in attributes]
    digests = {f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in run_here}
    assert allowed == digests and len(digests) == len(run_here) == 3 + len(PANELS)
    assert "default-src 'none'" in policy and "unsafe-eval" not in policy
    assert "unsafe-inline" not in policy.split("script-src")[1]


def test_hostile_text_stays_text(run):
    hostile = fake_generation.bundle([*WORDS[:-1], HOSTILE], canvas_length=12, name=HOSTILE)
    one = types.SimpleNamespace(**{**vars(run), "texts": [HOSTILE]})
    one.prompt_tokens = [[hostile.tokenizer.id(HOSTILE)]]
    text = page_of(hostile, one, prompt=HOSTILE).html()
    parsed = Parsed(text)
    assert not [tag for tag, _ in parsed.tags if tag == "img"]
    assert len(parsed.scripts) == 4 + len(PANELS)
    assert parsed.text.count(HOSTILE) >= 3  # prompt, answer, model
    embedded = [json.loads(body) for attributes, body in parsed.scripts if "type" in attributes]
    assert embedded[0]["prompt"]["text"] == embedded[0]["answer"]["text"] == HOSTILE
    assert "<script>document.title" not in text and "<!-- <img" not in text


def test_the_embedded_data_is_the_data(fake, run):
    explanation = page_of(fake, run)
    (body,) = [body for attributes, body in Parsed(explanation.html()).scripts if "type" in attributes]
    assert json.loads(body) == explanation.data
    assert body.isascii() and not re.search("[<>&]", body)


def test_save_writes_the_page_and_the_data(fake, run, tmp_path):
    explanation = page_of(fake, run)
    page, beside = explanation.save(tmp_path / "new" / "report.html")
    assert page.read_text("utf-8") == explanation.html()
    assert beside == tmp_path / "new" / "report.json"
    assert json.loads(beside.read_text("utf-8")) == explanation.data
    with pytest.raises(ValueError, match=r"must end in \.html, got .*report\.json"):
        explanation.save(tmp_path / "report.json")


def test_notebooks_get_the_page_in_a_frame(fake, run):
    explanation = page_of(fake, run)
    ((tag, attributes),) = Parsed(explanation._repr_html_()).tags
    assert tag == "iframe" and attributes["srcdoc"] == explanation.html()
    assert attributes["sandbox"] == "allow-scripts"


def test_a_long_run_stays_small():
    """Two blocks of 256 positions and 48 steps with 8 candidates: the released model's largest usual page."""
    pieces = [f"▁word{n}" for n in range(20_000)]
    fake = fake_generation.bundle(pieces, canvas_length=256)
    ids = np.random.default_rng(0).integers(3, 20_000, 500).tolist()
    run = fake_generation.generation(fake, ids[:50], ids, steps=50, max_denoising_steps=48)
    explanation = page_of(fake, run)
    assert [block["num_steps"] for block in explanation.data["blocks"]] == [48, 48]
    assert len(explanation.html()) < 6e6


# ---- panels ----------------------------------------------------------------------------------------


def test_panels_are_chosen_by_name_or_given(tmp_path):
    script = tmp_path / "mine.js"
    script.write_text('report.panel("mine", () => {});')
    mine = Panel(name="mine", title="Mine", script=script)
    assert choose(None) == tuple(PANELS.values())
    assert choose(["maps", mine]) == (PANELS["maps"], mine)
    assert choose("maps") == (PANELS["maps"],)
    assert mine.source() == script.read_text()
    with pytest.raises(ValueError, match=r"no panel is named 'map'; known are .*'maps'"):
        choose(["map"])
    with pytest.raises(ValueError, match="different names"):
        choose(["maps", "maps"])


@pytest.mark.parametrize("name", sorted(PANELS))
def test_a_script_registers_its_panel(name):
    assert f'report.panel("{name}"' in PANELS[name].source()


def test_what_a_panel_may_not_be(fake, run, tmp_path):
    with pytest.raises(ValueError, match="a-z, 0-9 and hyphens"):
        Panel(name="<b>", title="", script="x.js")
    with pytest.raises(ValueError, match="place must be"):
        Panel(name="x", title="", script="x.js", place="top")
    script = tmp_path / "bad.js"
    script.write_text('const end = "</script>";')
    bad = Panel(name="bad", title="Bad", script=script)
    with pytest.raises(ValueError, match=r"panels/bad\.js contains '</script'"):
        Explanation(describe(fake, run) | {"panels": []}, (bad,)).html()
