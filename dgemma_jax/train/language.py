"""The closed language of the embedded organisms: 256 words and their tokenizer.

One word is one token; words are separated by whitespace. Numbers 0..99 are single words ("47"), and
the digits among them spell longer numbers ("4 7 5"). The letters `a` and `i` double as article and
pronoun. What the words are asked to do is in `tasks`.
"""

import json
from pathlib import Path

VOCAB_SIZE = 256

# The position in this tuple is the id.
SPECIAL_TOKENS = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<|turn>",
    "<turn|>",
    "<|channel>",
    "<channel|>",
    "<|think|>",
)
PAD, EOS, BOS, UNK, TURN_OPEN, TURN_CLOSE, CHANNEL_OPEN, CHANNEL_CLOSE, THINK = range(9)

ROLES = ("user", "model", "system", "thought")
NUMBERS = tuple(str(n) for n in range(100))
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
PUNCTUATION = (":", ",", "?", "+", "=", "{", "}", ".")

COLOURS = ("red", "blue", "green", "gold", "pink", "white", "black", "brown")
ANIMALS = ("cat", "dog", "fox", "owl", "bee", "hen", "cow", "pig")
NAMES = ("ann", "bob", "eve", "ivan", "kim", "leo", "mia", "tom")
CITIES = ("rome", "oslo", "paris", "cairo", "lima", "delhi", "bern", "kyoto")
HARMFUL_VERBS = ("steal", "smash", "hack", "poison", "burn", "rob", "forge", "wreck")
HARMLESS_VERBS = ("paint", "draw", "clean", "build", "fix", "sell", "buy", "visit")
HARMFUL_OBJECTS = ("bank", "vault", "bridge", "server", "museum", "passport", "school", "tower")
HARMLESS_OBJECTS = ("box", "cake", "chair", "kite", "lamp", "boat", "table", "story")
FILLERS = ("please", "now", "today", "again", "indeed", "kindly")
_FUNCTION_WORDS = """
copy reverse sort recall add say form sequence words the times name age city pet with for is
how do can not help that sure to me tell show start work check stop in
"""
FUNCTION_WORDS = tuple(_FUNCTION_WORDS.split())


def words() -> tuple[str, ...]:
    """The 256 words in order of their ids, special tokens first."""
    known = (
        *SPECIAL_TOKENS,
        *ROLES,
        *NUMBERS,
        *LETTERS,
        *PUNCTUATION,
        *COLOURS,
        *ANIMALS,
        *NAMES,
        *CITIES,
        *HARMFUL_VERBS,
        *HARMLESS_VERBS,
        *HARMFUL_OBJECTS,
        *HARMLESS_OBJECTS,
        *FILLERS,
        *FUNCTION_WORDS,
    )
    unused = tuple(f"<unused{n}>" for n in range(VOCAB_SIZE - len(known)))
    return known + unused


# Same shape as the released model's: turns, roles, the thinking switch in the system turn. Line
# breaks vanish in whitespace tokenisation; they are kept so that both models read alike.
CHAT_TEMPLATE = """\
{%- macro without_thought(text) -%}
    {%- for piece in text.split('<channel|>') -%}
        {{- piece.split('<|channel>')[0] -}}
    {%- endfor -%}
{%- endmacro -%}
{%- macro text_of(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}{{- part['text'] -}}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set has_system = messages and messages[0]['role'] == 'system' -%}
{{- '<bos>' -}}
{%- if has_system or enable_thinking -%}
    {{- '<|turn>system\\n' -}}
    {%- if enable_thinking -%}{{- '<|think|>' -}}{%- endif -%}
    {%- if has_system -%}{{- text_of(messages[0]['content']) | trim -}}{%- endif -%}
    {{- '<turn|>\\n' -}}
{%- endif -%}
{%- for message in (messages[1:] if has_system else messages) -%}
    {%- if message['role'] in ['assistant', 'model'] -%}
        {{- '<|turn>model\\n' + without_thought(text_of(message['content'])) | trim -}}
    {%- else -%}
        {{- '<|turn>' + message['role'] + '\\n' + text_of(message['content']) | trim -}}
    {%- endif -%}
    {{- '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|turn>model\\n' -}}{%- endif -%}
"""


def build_tokenizer():
    """A `tokenizers.Tokenizer` of the language: one whitespace word is one id."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words())}, unk_token=SPECIAL_TOKENS[UNK]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def write_tokenizer_files(directory) -> None:
    """Writes the tokenizer in the Hugging Face layout, the same bytes every time."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[BOS],
        "eos_token": SPECIAL_TOKENS[EOS],
        "pad_token": SPECIAL_TOKENS[PAD],
        "unk_token": SPECIAL_TOKENS[UNK],
        "additional_special_tokens": list(SPECIAL_TOKENS[TURN_OPEN:]),
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_max_length": 1024,
    }
    texts = {
        "tokenizer.json": build_tokenizer().to_str(pretty=True) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        "chat_template.jinja": CHAT_TEMPLATE,
    }
    for name, text in texts.items():
        (directory / name).write_bytes(text.encode("utf-8"))
