"""Conversations as text: checked messages, the chat template, and the thinking channel.

A message is `{"role": "system" | "user" | "assistant" (or "model"), "content": text}`, where the
content may also be a list of parts `{"type": "text", "text": text}`. Nothing here knows token ids.
"""

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

CHANNEL_OPEN, CHANNEL_CLOSE = "<|channel>", "<channel|>"
THOUGHT = "thought"

_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "model": "assistant"}
_MEDIA = ("image", "image_url", "video", "audio", "input_audio")


def render(template: str, messages: Sequence[Mapping], **variables: Any) -> str:
    """The conversation as the chat template writes it.

    The template sees what `transformers` gives it: `messages`, `tools` and `documents` (None),
    `raise_exception`, `strftime_now`, a `tojson` that leaves non-ASCII and HTML characters alone,
    `break` and `continue`, and `generation` blocks, which only mark their content and are ignored.

    Args:
      template: the Jinja source. It runs in a sandbox.
      messages: see the module; checked first.
      **variables: e.g. `bos_token`, `add_generation_prompt`, `enable_thinking`.

    Raises:
      ValueError: the messages are malformed, or the template refuses them or is itself broken.
    """
    import jinja2

    messages = validate(messages)
    try:
        compiled = _compile(template)
        return compiled.render(messages=messages, **({"tools": None, "documents": None} | variables))
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is broken, line {error.lineno}: {error}") from error
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses these messages: {error}") from error


def validate(messages: Sequence[Mapping]) -> list[dict]:
    """The messages as plain dicts with the role `model` renamed to `assistant`, or a ValueError."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise TypeError(f"messages must be a list of {{'role': ..., 'content': ...}}, not {type(messages).__name__}")
    if not messages:
        raise ValueError("messages is empty; give at least one user message")
    return [_message(message, i) for i, message in enumerate(messages)]


def _message(message: Mapping, i: int) -> dict:
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise ValueError(f"messages[{i}] must have the keys 'role' and 'content': {message!r}")
    if extra := sorted(message.keys() - {"role", "content"}):
        raise ValueError(f"messages[{i}] has keys that are not supported: {', '.join(extra)}")
    role, content = message["role"], message["content"]
    if role not in _ROLES:
        raise ValueError(f"messages[{i}] has the role {role!r}; known are {', '.join(_ROLES)}")
    if role == "system" and i > 0:
        raise ValueError(f"messages[{i}] is a system message; only the first message may be one")
    if isinstance(content, list | tuple):
        content = [_part(part, f"messages[{i}]['content'][{j}]") for j, part in enumerate(content)]
    elif not isinstance(content, str):
        raise ValueError(f"messages[{i}]['content'] must be text or a list of parts, not {type(content).__name__}")
    return {"role": _ROLES[role], "content": content}


def _part(part: Mapping, where: str) -> dict:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in _MEDIA:
        raise ValueError(f"{where} is of type {kind!r}: images and other media are not supported yet")
    if kind != "text" or not isinstance(part.get("text"), str):
        raise ValueError(f"{where} must be {{'type': 'text', 'text': ...}}, got {part!r}")
    return {"type": "text", "text": part["text"]}


def split_thinking(text: str) -> tuple[str, str]:
    """`(thought, answer)`: what stands inside the thinking channels, and the rest.

    A channel that never closes runs to the end (the answer is then empty). A channel that closes
    without having been opened began before the text, as when the prompt holds its header.

    >>> split_thinking("<|channel>thought\\nhm<channel|>yes")
    ('hm', 'yes')
    """
    marks = f"({re.escape(CHANNEL_OPEN)}|{re.escape(CHANNEL_CLOSE)})"
    inside, outside = split_channels(re.split(marks, text), CHANNEL_OPEN, CHANNEL_CLOSE)
    thought = "\n".join(filter(None, map(without_header, map("".join, inside))))
    return thought, "".join(outside).strip()


def split_channels(pieces: Sequence, opening: Any, closing: Any) -> tuple[list[list], list]:
    """The pieces inside each channel, and all pieces outside; the marks themselves are dropped."""
    inside, outside, current = [], [], None
    for piece in pieces:
        if piece == opening:
            current = []
            inside.append(current)
        elif piece == closing:
            if current is None:
                inside.append(outside)
                outside = []
            current = None
        else:
            (outside if current is None else current).append(piece)
    return inside, outside


def without_header(thought: str) -> str:
    """The content of a channel without its name `thought` at the start."""
    return re.sub(rf"\A\s*{THOUGHT}(?=\s|\Z)", "", thought).strip()


@functools.lru_cache(maxsize=16)
def _compile(template: str):
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = frozenset({"generation"})

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _now
    return environment.from_string(template)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str):
    import jinja2

    raise jinja2.TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
