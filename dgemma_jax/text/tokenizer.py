"""The tokenizer of a model directory: a thin, frozen layer over `tokenizers`.

It reads any `tokenizer.json` (the released model's BPE with byte fallback, the organisms' words),
adds nothing to what is encoded, and keeps the source files so that they are saved byte for byte.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dgemma_jax.text import chat as chat_text

# What belongs to the tokenizer in a Hugging Face directory. The two configs are read, never saved:
# they belong to the weights.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
)
_SHOWN_UNKNOWN = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text to ids and back, with the special ids and the chat template of one model.

    Attributes:
      backend: the `tokenizers.Tokenizer`; do not change it.
      files: the source files by name, as read.
      pad_id, bos_id: ids, or None where the model has none.
      eos_ids: every id that ends a generation; the first is the tokenizer's own.
      chat_template: Jinja source, or None.
    """

    backend: Any = dataclasses.field(repr=False)
    files: Mapping[str, bytes] = dataclasses.field(repr=False)
    pad_id: int | None
    bos_id: int | None
    eos_ids: tuple[int, ...]
    chat_template: str | None = dataclasses.field(default=None, repr=False)

    @classmethod
    def from_directory(
        cls, path: str | Path, *, eos_ids: Sequence[int] | None = None
    ) -> "Tokenizer":
        """Reads a Hugging Face directory.

        Special ids come from `generation_config.json`, else `config.json` (or its `text_config`),
        else the tokens named in `tokenizer_config.json`.

        Args:
          path: holds at least `tokenizer.json`.
          eos_ids: use these instead of the files'.
        """
        import tokenizers

        path = Path(path)
        if not (path / "tokenizer.json").is_file():
            raise ValueError(f"{path} has no tokenizer.json")
        files = {name: (path / name).read_bytes() for name in FILES if (path / name).is_file()}
        backend = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
        backend.no_padding()
        backend.no_truncation()

        names = _named_tokens(files)
        configs = [_json(path / name) for name in ("generation_config.json", "config.json")]
        configs.append(configs[-1].get("text_config") or {})

        def special(kind: str):
            for config in configs:
                if config.get(f"{kind}_token_id") is not None:
                    return config[f"{kind}_token_id"]
            name = names.get(f"{kind}_token")
            return None if name is None else backend.token_to_id(name)

        if eos_ids is None:
            eos_ids = special("eos")
        return cls(
            backend=backend,
            files=files,
            pad_id=special("pad"),
            bos_id=special("bos"),
            eos_ids=_as_tuple(eos_ids),
            chat_template=_chat_template(files),
        )

    def save(self, directory: str | Path) -> None:
        """Writes the source files again, byte for byte."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (directory / name).write_bytes(content)

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values())

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids that `decode` leaves out by default."""
        added = self.backend.get_added_tokens_decoder()
        return frozenset(i for i, token in added.items() if token.special)

    def encode(self, text: str) -> list[int]:
        """The ids of the text. Special tokens are added nowhere, but recognised where written.

        Raises:
          ValueError: some words have no id; the message names them.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be str, not {type(text).__name__}")
        encoding = self.backend.encode(text, add_special_tokens=False)
        ids = encoding.ids
        if self._unknown is not None and self._unknown[0] in ids:
            unknown_id, written = self._unknown
            spans = zip(ids, encoding.offsets, strict=True)
            words = [text[start:end] for i, (start, end) in spans if i == unknown_id]
            words = list(dict.fromkeys(word for word in words if word.strip() != written))
            if words:
                shown = ", ".join(map(repr, words[:_SHOWN_UNKNOWN]))
                more = f" and {len(words) - _SHOWN_UNKNOWN} more" * (len(words) > _SHOWN_UNKNOWN)
                raise ValueError(f"not in this tokenizer's vocabulary: {shown}{more}")
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of the ids (any integers, arrays included)."""
        return self.backend.decode(self._checked(ids), skip_special_tokens=skip_special)

    def token(self, id: int) -> str:
        """The vocabulary's own piece on one line: `▁the`, `\\n`, `<0xE2>`, `<bos>`.

        Control characters are escaped. Markup is not: a report in HTML must escape it itself.
        """
        (id,) = self._checked([id])
        piece = self.backend.id_to_token(id)
        if piece is None:
            return f"<no token {id}>"
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in piece)

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """`token` of each id."""
        return [self.token(id) for id in ids]

    def id(self, token: str) -> int:
        """The id of one piece of the vocabulary, e.g. `<|turn>`."""
        found = self.backend.token_to_id(token)
        if found is None:
            raise ValueError(f"{token!r} is not a piece of this tokenizer's vocabulary")
        return found

    def chat(
        self,
        messages: Sequence[Mapping],
        thinking: bool = False,
        *,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """The ids of a conversation, by the model's chat template.

        Args:
          messages: see `dgemma_jax.text.chat`.
          thinking: whether the template is asked to let the model think first.
          add_generation_prompt: whether to open the model's turn at the end.
        """
        if self.chat_template is None:
            raise ValueError("this tokenizer has no chat template; encode plain text instead")
        text = chat_text.render(
            self.chat_template,
            messages,
            **self._names,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=thinking,
        )
        return self.encode(text)

    def split_thinking(self, ids: Iterable[int]) -> tuple[str, str]:
        """`(thought, answer)` of generated ids, special tokens left out of both.

        `decode` alone would drop the channel's marks and run the thought into the answer.
        """
        marks = map(self.backend.token_to_id, (chat_text.CHANNEL_OPEN, chat_text.CHANNEL_CLOSE))
        inside, outside = chat_text.split_channels(self._checked(ids), *marks)
        thoughts = (chat_text.without_header(self.decode(thought)) for thought in inside)
        return "\n".join(filter(None, thoughts)), self.decode(outside).strip()

    @functools.cached_property
    def _names(self) -> dict[str, str]:
        """The special tokens of the files, which may be of megabytes, by name."""
        return _named_tokens(self.files)

    @functools.cached_property
    def _unknown(self) -> tuple[int, str] | None:
        """Id and spelling of the unknown token."""
        name = getattr(self.backend.model, "unk_token", None)
        id = None if name is None else self.backend.token_to_id(name)
        return None if id is None else (id, name)

    def _checked(self, ids: Iterable[int]) -> list[int]:
        ids = [int(i) for i in ids]
        if bad := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise ValueError(f"ids must be in 0..{self.vocab_size - 1}, got {bad[:_SHOWN_UNKNOWN]}")
        return ids


def _json(path: Path) -> dict:
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def _as_tuple(ids: int | Sequence[int] | None) -> tuple[int, ...]:
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(int(i) for i in ids)


def _named_tokens(files: Mapping[str, bytes]) -> dict[str, str]:
    """`bos_token` and the like by name, as chat templates read them."""
    named = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        config = json.loads(files.get(name, b"{}"))
        for group in ("extra_special_tokens", "model_specific_special_tokens"):
            if isinstance(config.get(group), dict):
                config = config | config[group]
        for key, token in config.items():
            token = token.get("content") if isinstance(token, dict) else token
            if key.endswith("_token") and isinstance(token, str):
                named[key] = token
    return named


def _chat_template(files: Mapping[str, bytes]) -> str | None:
    """The template from its own file, else from the tokenizer's config."""
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode("utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = json.loads(files.get(name, b"{}")).get("chat_template")
        if isinstance(template, list):  # several by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if template is not None:
            return template
    return None
