"""Chat templates: messages -> the text of a prompt.

The text equals that of `apply_chat_template` of transformers 5.23.

A template is a Jinja program of unknown origin: it runs in `jinja_sandbox.BoundedEnvironment`.
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

# In order of precedence.
FILES = ("processor_config.json", "chat_template.json", "chat_template.jinja", TOKENIZER_CONFIG)
DEFAULT = "default"  # name of the template to use if a checkpoint has several
MAX_CHARACTERS = 10_000_000

# {"role": "user", "content": TEXT}, or with a list as content:
# [{"type": "image"}, {"type": "text", "text": "what is it?"}]
Message = Mapping[str, Any]


class ChatTemplate:
    """Compiled chat template; `source` is its Jinja code."""

    def __init__(self, source: str, path: Path):
        """Compiles a template. Raises CheckpointError, which names `path`, if it is not valid."""
        self.source = source
        self._path = path
        self._environment = BoundedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        self._generation = self._environment.extensions[_Generation.identifier]
        self._environment.filters["tojson"] = self._environment.bounded("tojson", _to_json)
        self._environment.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }
        # Jinja folds constant expressions while it compiles, so any exception can occur here.
        try:
            self._template = self._environment.from_string(source)
        except Exception as error:
            raise self._refusal(error) from None

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "ChatTemplate | None":
        """Loads the template from the first of `FILES` that has one, else None.

        Raises:
          CheckpointError: a file is damaged, its template is not valid, or it has several templates
            and none is called "default".
        """
        folder = Path(os.path.expanduser(folder))
        for path in (folder / name for name in FILES if os.path.isfile(folder / name)):
            if path.suffix == ".jinja":
                source = _read_text(path)
            else:
                source = _select_default(read_json(path).get("chat_template"), path)
            if source is not None:
                return cls(source, path)
        return None

    def render(
        self,
        messages: Sequence[Message],
        special_tokens: Mapping[str, str],
        add_generation_prompt: bool = True,
    ) -> str:
        """Renders the text of a prompt.

        Args:
          messages: plain JSON data; it depends on the template whether content may be text, a list
            or both.
          special_tokens: `HubTokenizer.special_tokens`.
          add_generation_prompt: append the tokens that start an answer.

        Raises:
          CheckpointError: the template rejects the messages, fails, or exceeds the limits of the
            sandbox.
        """
        self._environment.begin()
        self._generation.begin()
        names = {
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        # A template can compute anything, so any exception can occur.
        try:
            parts = self._template.generate({**special_tokens, **names})
            return "".join(map(self._counted, parts))
        except Exception as error:
            raise self._refusal(error) from None

    @property
    def marks_answers(self) -> bool:
        """True if the template has `{% generation %}` blocks."""
        return self._generation.is_used

    @property
    def marked_spans(self) -> list[tuple[int, int]]:
        """The (start, end) characters of the `{% generation %}` blocks in the text of `render`."""
        return list(self._generation.spans)

    def accepts_lists(self, special_tokens: Mapping[str, str]) -> bool:
        """Returns True if the content of a message can be a list, as messages with images need."""
        text = "which of them"
        message = {"role": "user", "content": [{"type": "text", "text": text}]}
        try:
            rendered = self.render([message], special_tokens)
        except UserError:
            return False
        # A template for text only may still print the Python list, where the text is in quotes.
        return text in rendered and repr(text) not in rendered

    def _counted(self, part: str) -> str:
        self._generation.position += len(part)
        if self._generation.position > MAX_CHARACTERS:
            raise jinja2.TemplateRuntimeError(f"it writes more than {MAX_CHARACTERS} characters")
        return part

    def _refusal(self, error: Exception) -> CheckpointError:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        line = f" in line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        return CheckpointError(f"the chat template of {self._path} fails{line}: {reason}.")


class _Generation(Extension):
    """`{% generation %}` marks answers for training; it does not change the text.

    As in transformers, a block within a macro or a filter is marked at a wrong position.
    """

    tags = {"generation"}

    def __init__(self, environment):
        super().__init__(environment)
        self.is_used = False
        self.begin()

    def begin(self) -> None:
        """Forgets the text and the blocks written so far."""
        self.position = 0  # characters written
        self.spans: list[tuple[int, int]] = []

    def parse(self, parser):
        self.is_used = True
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("mark"), [], [], body, lineno=line)

    def mark(self, caller) -> str:
        """Returns the text of a block, and keeps its position."""
        text = caller()
        self.spans.append((self.position, self.position + len(text)))
        return text


def _read_text(path: Path) -> str:
    try:
        return io.StringIO(read_bytes(path).decode(), newline=None).read()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from None


def _select_default(template: Any, path: Path) -> str | None:
    """Selects from several templates: a list of {"name", "template"}, or an object of them."""
    if isinstance(template, list):
        items = [item for item in template if isinstance(item, dict) and "name" in item]
        template = {str(item["name"]): item.get("template") for item in items}
    if isinstance(template, dict):
        if DEFAULT not in template:
            raise CheckpointError(
                f'{path} has the chat templates {", ".join(template)}, but none called "{DEFAULT}".'
            )
        template = template[DEFAULT]
    if not isinstance(template, str | None):
        raise CheckpointError(
            f"{path}: chat_template is {type(template).__name__}, but must be text."
        )
    return template


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
