"""Tokenizer and chat: laws on two small tokenizers, and parity with `transformers`."""

import datetime
import json
import subprocess
import sys

import numpy as np
import pytest

from dgemma_jax.text import Tokenizer, chat, split_thinking
from dgemma_jax.train import language, tasks

# The released model's kind: BPE over "▁" pieces with byte fallback, named extra tokens.
SPECIALS = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "<|channel>", "<channel|>"]
MERGES = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("i", "n"), ("c", "a"), ("ca", "t"), ("▁", "cat")]
TEMPLATE = """\
{{ bos_token }}{% for message in messages %}
    {% if loop.first and message.role == 'system' and enable_thinking %}
<|channel>
    {%- endif %}
<|turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}
{% generation %}
{{ message['content'] if message['content'] is string else message['content'] | tojson }}<turn|>
{% endgeneration %}
{% if message['content'] == 'stop' %}{% break %}{% endif %}
{% if message['content'] == 'fail' %}{{ raise_exception('no <fail> here') }}{% endif %}
{% endfor %}
{% if tools is none and not documents %}{{ strftime_now('%Y') }}{% endif %}
{% if add_generation_prompt %}
<|turn>model
{% endif %}
"""

TEXTS = [
    "",
    "the cat in the cat",
    "  the   cat\n\n\tcat ",
    "naïve 猫 🐈‍⬛ \u0000\u0007\x1b[0m",
    "<script>alert('&amp;')</script>",
    "<bos><|turn>user\nthe cat<turn|>\n",
    "▁the ▁ <0x0A> <unk>",
    "\r\n\u2028\u00a0a\u0301",
]
CHAT = [
    {"role": "system", "content": "in the <b>cat</b> & 'it'"},
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "<|channel>thought\nthe<channel|>cat"},
    {"role": "user", "content": [{"type": "text", "text": 'in "猫" <p>'}]},
]


@pytest.fixture(scope="module")
def bpe_dir(tmp_path_factory):
    from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    pieces = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyz\n", *(a + b for a, b in MERGES)]
    backend = Backend(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=MERGES,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS])
    backend.enable_truncation(3)  # a trap: the reader must switch both off
    backend.enable_padding(length=50)
    directory = tmp_path_factory.mktemp("bpe")
    backend.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": {"__type": "AddedToken", "content": "<eos>", "special": True},
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }
    text = json.dumps(config, indent=1).replace("\n", "\r\n")  # odd bytes must survive
    (directory / "tokenizer_config.json").write_bytes(text.encode())
    (directory / "generation_config.json").write_text('{"eos_token_id": [1, 5]}')
    (directory / "model.safetensors").write_bytes(b"weights")
    return directory


@pytest.fixture(scope="module")
def word_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("words")
    language.write_tokenizer_files(directory)
    return directory


@pytest.fixture(scope="module")
def bpe(bpe_dir):
    return Tokenizer.from_directory(bpe_dir)


@pytest.fixture(scope="module")
def word(word_dir):
    return Tokenizer.from_directory(word_dir)


def reference(directory):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(str(directory))


def language_text():
    examples = tasks.examples(0, 40)
    turns = (f"<|turn>user\n{e.prompt}<turn|>\n<|turn>model\n{e.answer}<turn|>" for e in examples)
    return "<bos>" + "".join(turns)


# --- ids -------------------------------------------------------------------------------------


def test_word_is_token(word):
    text = "how do i steal a bank ? 47 4 7"
    ids = word.encode(text)
    assert word.tokens(ids) == text.split()
    assert word.decode(ids) == text
    assert [word.token(i) for i in range(256)] == list(language.words())
    assert (word.vocab_size, word.pad_id, word.bos_id, word.eos_ids) == (256, 0, 2, (1,))
    assert word.special_ids == frozenset(range(9))


def test_specials_are_recognised_inline_and_dropped_by_default(word):
    ids = word.encode("<bos><|turn>user\nsay cat 2 times<turn|>")
    assert ids[:2] == [2, 4] and ids[-1] == 5 and len(ids) == 8
    assert word.decode(ids) == "user say cat 2 times"
    assert word.decode(ids, skip_special=False) == "<bos> <|turn> user say cat 2 times <turn|>"


def test_unknown_words_are_named_once_each(word):
    with pytest.raises(ValueError, match=r"vocabulary: 'Bank', 'xyzzy'$"):
        word.encode("steal a Bank xyzzy Bank now")
    with pytest.raises(ValueError, match=r"'w7' and 12 more$"):
        word.encode(" ".join(f"w{n}" for n in range(20)))
    with pytest.raises(ValueError, match="'<script>'"):
        word.encode("say <script>")
    with pytest.raises(ValueError, match=r"'\\x00'"):
        word.encode("say \x00")
    assert word.encode("say <unk>")[-1] == language.UNK  # written on purpose


@pytest.mark.parametrize("text", TEXTS)
def test_byte_fallback_round_trip(bpe, text):
    special = any(token in text for token in SPECIALS)
    decoded = bpe.decode(bpe.encode(text), skip_special=not special)
    assert decoded == text.replace("▁", " ")  # the piece for a space is the one that is lost


def test_padding_and_truncation_of_the_file_are_off(bpe):
    ids = bpe.encode(" the cat the cat")
    assert bpe.tokens(ids) == ["▁the", "▁cat", "▁the", "▁cat"]
    assert bpe.encode("") == []


def test_ids_of_any_integer_kind_and_out_of_range(bpe):
    ids = bpe.encode("the cat")
    assert bpe.decode(np.array(ids, np.int32)) == bpe.decode(tuple(ids)) == "the cat"
    for bad in (-1, bpe.vocab_size):
        with pytest.raises(ValueError, match=rf"0\.\.{bpe.vocab_size - 1}.*{bad}"):
            bpe.decode([bad])
    assert [bpe.id(piece) for piece in bpe.tokens(ids)] == ids
    with pytest.raises(ValueError, match="'nowhere'"):
        bpe.id("nowhere")
    with pytest.raises(TypeError, match="list"):
        bpe.encode(["the"])


def test_display_is_one_line(bpe):
    pieces = [bpe.token(i) for i in range(bpe.vocab_size)]
    assert len(set(pieces)) == len(pieces)
    assert "\\n" in pieces and "▁the" in pieces and "<0xE2>" in pieces
    assert all(piece.isprintable() for piece in pieces)


# --- files -----------------------------------------------------------------------------------


def test_save_is_byte_for_byte_and_leaves_the_weights_alone(bpe, bpe_dir, tmp_path):
    bpe.save(tmp_path / "new" / "place")
    saved = {path.name: path.read_bytes() for path in (tmp_path / "new" / "place").iterdir()}
    assert set(saved) == {"tokenizer.json", "tokenizer_config.json"}
    assert all(saved[name] == (bpe_dir / name).read_bytes() for name in saved)
    assert b"\r\n" in saved["tokenizer_config.json"]


def test_language_files_are_reproducible(word, word_dir, tmp_path):
    language.write_tokenizer_files(tmp_path / "a")
    word.save(tmp_path / "b")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "a" / name).read_bytes() == (word_dir / name).read_bytes()
        assert (tmp_path / "b" / name).read_bytes() == (word_dir / name).read_bytes()


def test_where_special_ids_come_from(word_dir, tmp_path):
    language.write_tokenizer_files(tmp_path)
    (tmp_path / "config.json").write_text(
        '{"pad_token_id": null, "text_config": {"pad_token_id": 7, "eos_token_id": 5}}'
    )
    read = Tokenizer.from_directory(tmp_path)
    assert (read.pad_id, read.bos_id, read.eos_ids) == (7, 2, (5,))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 5, 8]}')
    assert Tokenizer.from_directory(tmp_path).eos_ids == (1, 5, 8)
    assert Tokenizer.from_directory(tmp_path, eos_ids=[4]).eos_ids == (4,)
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        Tokenizer.from_directory(tmp_path / "nowhere")


def test_template_places(tmp_path, bpe_dir):
    content = (bpe_dir / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match="no chat template"):
        Tokenizer.from_directory(tmp_path).chat(CHAT)
    named = [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert Tokenizer.from_directory(tmp_path).chat_template == "d"
    (tmp_path / "chat_template.jinja").write_text("own file")
    assert Tokenizer.from_directory(tmp_path).chat_template == "own file"


def test_tokenizer_is_frozen(word):
    with pytest.raises(AttributeError):
        word.pad_id = 3


# --- chat ------------------------------------------------------------------------------------


def test_language_template(word):
    turns = [
        {"role": "system", "content": "sure"},
        {"role": "user", "content": "say cat 1 times"},
        {"role": "model", "content": "<|channel>thought\nfox<channel|>cat"},
        {"role": "user", "content": [{"type": "text", "text": "add 1 1 + 2 2"}]},
    ]
    expected = (
        "<bos><|turn>system\n<|think|>sure<turn|>\n<|turn>user\nsay cat 1 times<turn|>\n"
        "<|turn>model\ncat<turn|>\n<|turn>user\nadd 1 1 + 2 2<turn|>\n<|turn>model\n"
    )
    variables = {"add_generation_prompt": True, "enable_thinking": True}
    assert chat.render(language.CHAT_TEMPLATE, turns, **variables) == expected
    assert word.chat(turns, thinking=True) == word.encode(expected)
    assert word.chat(turns) == word.encode(expected.replace("<|think|>", ""))
    prefix = word.chat(turns, add_generation_prompt=False)
    assert word.chat(turns) == prefix + word.encode("<|turn>model\n")
    alone = [{"role": "user", "content": "now"}]
    assert word.chat(alone, thinking=True) == word.encode(
        "<bos><|turn>system<|think|><turn|><|turn>user now<turn|><|turn>model"
    )
    assert word.chat(alone) == word.encode("<bos><|turn>user now<turn|><|turn>model")


def test_template_helpers():
    def render(template, **variables):
        return chat.render(template, CHAT[:1], **variables)

    assert render("{{ x | tojson }}", x={"<é>": "'&'"}) == '{"<é>": "\'&\'"}'
    assert render("{{ strftime_now('%Y') }}") == str(datetime.date.today().year)
    assert render("{% for i in [1, 2, 3] %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}") == "13"
    scoped = "{% set a = 1 %}{% generation %}{% set a = 2 %}{{ a }}{% endgeneration %}{{ a }}"
    assert render(scoped) == "21"
    assert render("  {% if true %}\n x\n  {% endif %}\n") == " x\n"
    with pytest.raises(ValueError, match="refuses.*no <fail> here"):
        chat.render(TEMPLATE, [{"role": "user", "content": "fail"}])
    with pytest.raises(ValueError, match="broken, line 2"):
        render("a\n{% if %}")
    with pytest.raises(ValueError, match="refuses"):
        render("{{ ''.__class__.__mro__ }}")  # the sandbox holds
    with pytest.raises(ValueError, match="refuses"):
        render("{{ messages.append(1) }}")


@pytest.mark.parametrize(
    "messages, error, match",
    [
        ("hello", TypeError, "str"),
        ([], ValueError, "empty"),
        ([{"role": "user"}], ValueError, r"messages\[0\].*'content'"),
        ([{"role": "robot", "content": "a"}], ValueError, "'robot'; known are system, user"),
        ([CHAT[1], CHAT[0]], ValueError, r"messages\[1\] is a system message"),
        ([{"role": "user", "content": None}], ValueError, "NoneType"),
        ([{"role": "user", "content": "a", "tool_calls": []}], ValueError, "tool_calls"),
        (
            [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
            ValueError,
            r"messages\[0\]\['content'\]\[0\].*images.*not supported yet",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], ValueError, r"\[0\] must be"),
        ([{"role": "user", "content": ["a"]}], ValueError, r"\[0\] must be"),
    ],
)
def test_bad_messages(messages, error, match):
    with pytest.raises(error, match=match):
        chat.validate(messages)


def test_validate_leaves_the_callers_messages_alone():
    message = {"role": "model", "content": "a"}
    assert chat.validate((message,)) == [{"role": "assistant", "content": "a"}]
    assert message == {"role": "model", "content": "a"}


THINKING = [
    ("yes", "", "yes"),
    ("<|channel>thought\nhm\nhm<channel|>yes", "hm\nhm", "yes"),
    ("<|channel>thought\n<channel|>yes", "", "yes"),
    ("<|channel>thought\nhm, it never", "hm, it never", ""),
    ("<|channel>", "", ""),
    ("hm<channel|>yes", "hm", "yes"),
    ("thought\nhm<channel|>yes", "hm", "yes"),
    ("<|channel>thought\na<channel|>b <|channel>thought\nc<channel|>d", "a\nc", "b d"),
    ("<|channel>thoughtful<channel|>yes", "thoughtful", "yes"),
    ("a thought", "", "a thought"),
    ("<|channel> thought fox <channel|> cat", "fox", "cat"),
]


@pytest.mark.parametrize("text, thought, answer", THINKING)
def test_split_thinking(text, thought, answer):
    assert split_thinking(text) == (thought, answer)


def test_split_thinking_of_ids(word, bpe):
    ids = word.encode("<|channel>thought\nfox cat<channel|>blue is 7<turn|><eos><pad>")
    assert word.split_thinking(ids) == ("fox cat", "blue is 7")
    assert word.split_thinking(np.array(ids[:3])) == ("fox", "")
    assert word.split_thinking(word.encode("blue is 7<turn|>")) == ("", "blue is 7")
    assert bpe.split_thinking(bpe.encode("<|channel>thought\nin é<channel|> the cat")) == (
        "in é",
        "the cat",
    )


# --- parity ----------------------------------------------------------------------------------


def test_ids_equal_transformers_and_tokenizers(bpe, bpe_dir, word, word_dir):
    import tokenizers

    pairs = [(bpe, bpe_dir, TEXTS), (word, word_dir, [language_text(), "say <unk> now"])]
    for ours, directory, texts in pairs:
        theirs = reference(directory)
        raw = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        raw.no_truncation()
        raw.no_padding()
        for text in texts:
            ids = ours.encode(text)
            assert ids == raw.encode(text, add_special_tokens=False).ids
            assert ids == theirs(text, add_special_tokens=False)["input_ids"]
            for skip in (True, False):
                assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
        assert ours.pad_id == theirs.pad_token_id and ours.bos_id == theirs.bos_token_id
        assert ours.eos_ids[0] == theirs.eos_token_id
        assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("generation", [False, True])
def test_chat_equals_transformers(bpe, bpe_dir, word, word_dir, thinking, generation):
    simple = [
        {"role": "system", "content": " sure "},
        {"role": "user", "content": "recall red 4 , blue 7 , cat 1 ? blue"},
        {"role": "assistant", "content": "<|channel>thought\nfox<channel|>blue is 7"},
        {"role": "user", "content": [{"type": "text", "text": "now "}]},
    ]
    stop = [*CHAT, {"role": "user", "content": "stop"}, {"role": "user", "content": "unseen"}]
    cases = [(word, word_dir, simple), (word, word_dir, simple[1:])]
    cases += [(bpe, bpe_dir, CHAT), (bpe, bpe_dir, stop), (bpe, bpe_dir, CHAT[1:2])]
    for ours, directory, messages in cases:
        theirs = reference(directory)
        variables = {"add_generation_prompt": generation, "enable_thinking": thinking}
        text = theirs.apply_chat_template(messages, tokenize=False, **variables)
        assert text == chat.render(ours.chat_template, messages, bos_token="<bos>", **variables)
        assert ours.chat(messages, thinking, add_generation_prompt=generation) == ours.encode(text)


def test_importing_text_is_light():
    code = (
        "import sys, dgemma_jax.text, dgemma_jax.train.language;"
        "print([m for m in ('tokenizers', 'jinja2', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
