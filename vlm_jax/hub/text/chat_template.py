"""A checkpoint's chat template: messages -> the text of a prompt, as `apply_chat_template` of transformers 5.23 has it.

Templates are Jinja programs from strangers: they run in `sandbox.BoundedEnvironment`.
"""

import datetime
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols

from vlm_jax.config import CheckpointError, UserError
from vlm_jax.hub.tensors.folder import read_bytes, read_json
from vlm_jax.hub.text.jinja_sandbox import BoundedEnvironment
from vlm_jax.hub.text.special_tokens import TOKENIZER_CONFIG

FILES = (
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    TOKENIZER_CONFIG,
)  # the first counts
DEFAULT = "default"  # the name of the one to take where a checkpoint has several
MAX_CHARACTERS = 10_000_000

# {"role": "user", "content": ...}, with a text, or with [{"type": "image"}, {"type": "text", "text": "what is it?"}]
Message = Mapping[str, Any]


class ChatTemplate:
    def __init__(self, source: str, path: Path):
        """Raises CheckpointError, which names `path`, where the source is no template."""
        self._path = path
        self._environment = BoundedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        self._environment.filters["tojson"] = self._environment.bounded("tojson", _to_json)
        self._environment.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }
        try:
            self._template = self._environment.from_string(source)
        except (
            Exception
        ) as error:  # constants are computed at once, which can fail like any expression
            raise self._refusal(error) from None

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "ChatTemplate | None":
        """The template in a folder: of processor_config.json, chat_template.json or .jinja, or tokenizer_config.json.

        None where none of them holds one.

        Raises:
          CheckpointError: a file is damaged, its template is none, or it has several and none is called "default".
        """
        folder = Path(folder).expanduser()
        for path in (folder / name for name in FILES if os.path.isfile(folder / name)):
            source = (
                _text(path)
                if path.suffix == ".jinja"
                else _default(read_json(path).get("chat_template"), path)
            )
            if source is not None:
                return cls(source, path)
        return None

    def render(
        self,
        messages: Sequence[Message],
        special_tokens: Mapping[str, str],
        add_generation_prompt: bool = True,
    ) -> str:
        """The text of a prompt.

        Args:
          messages: plain data, as JSON has it; whether a template reads strings, lists or both is the checkpoint's.
          special_tokens: `HubTokenizer.special_tokens`.
          add_generation_prompt: ends with what stands before an answer.

        Raises:
          CheckpointError: the template refuses the messages, fails, does what it must not do, or does not come to an end.
        """
        self._environment.begin()
        self._characters = 0
        names = {
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return "".join(map(self._counted, self._template.generate({**special_tokens, **names})))
        except Exception as error:  # a template can compute anything, so anything can go wrong
            raise self._refusal(error) from None

    def reads_lists(self, special_tokens: Mapping[str, str]) -> bool:
        """Whether the content of a message can be a list, as it has to be where an image is part of it."""
        text = "which of them"
        message = {"role": "user", "content": [{"type": "text", "text": text}]}
        try:
            rendered = self.render([message], special_tokens)
        except UserError:
            return False
        return text in rendered and repr(text) not in rendered

    def _counted(self, part: str) -> str:
        self._characters += len(part)
        if self._characters > MAX_CHARACTERS:
            raise jinja2.TemplateRuntimeError(f"it writes more than {MAX_CHARACTERS} characters")
        return part

    def _refusal(self, error: Exception) -> CheckpointError:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        line = f" in line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        return CheckpointError(f"the chat template of {self._path} fails{line}: {reason}.")


class _Generation(Extension):
    """`{% generation %}`, which marks answers for training, and changes nothing here."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(
            parser.parse_statements(["name:endgeneration"], drop_needle=True), lineno=line
        )


def _text(path: Path) -> str:
    try:
        return io.StringIO(read_bytes(path).decode(), newline=None).read()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from None


def _default(found: Any, path: Path) -> str | None:
    """Several templates are a list of {"name", "template"}, or an object of them."""
    if isinstance(found, list):
        found = {
            str(item["name"]): item.get("template")
            for item in found
            if isinstance(item, dict) and "name" in item
        }
    if isinstance(found, dict):
        if DEFAULT not in found:
            raise CheckpointError(
                f'{path} has the chat templates {", ".join(found)}, but none called "{DEFAULT}".'
            )
        found = found[DEFAULT]
    if not isinstance(found, str | None):
        raise CheckpointError(
            f"{path}: chat_template is {type(found).__name__}, but has to be text."
        )
    return found


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Unlike Jinja's own, it does not escape what HTML has a meaning for."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
