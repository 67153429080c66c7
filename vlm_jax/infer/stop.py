"""Stop strings: texts that end an answer and are not part of it."""

from collections.abc import Collection, Sequence

from vlm_jax.config import ConfigError
from vlm_jax.hub.text.tokenizer import TextStream


class AnswerText:
    """Text of one answer, token by token, up to its end token or a stop string.

    Text that may be the beginning of a stop string is withheld until more text follows.

    Args:
      text: `decode_stream` of a processor.
      eos_ids: tokens that end an answer.
      stop: stop strings.

    Attributes:
      is_ended: an end token or a stop string has ended the answer.
    """

    def __init__(self, text: TextStream, eos_ids: Collection[int], stop: Sequence[str] = ()):
        self._text = text
        self._eos_ids = eos_ids
        self._stop = stop
        self._withheld = ""
        self._is_stopped = False
        self.is_ended = False

    def feed(self, token: int) -> str:
        """Returns the text that a token completes; "" once the answer has ended."""
        self.is_ended = self.is_ended or token in self._eos_ids
        return "" if self.is_ended else self._add(self._text.feed([token]))

    def end(self) -> str:
        """Returns the rest, when no more tokens follow."""
        if self._is_stopped:
            return ""
        rest = self._add(self._text.end())
        return rest if self._is_stopped else rest + self._withheld

    def _add(self, piece: str) -> str:
        """Returns the text that can be neither a stop string nor the beginning of one."""
        text = self._withheld + piece
        position = find_stop(text, self._stop)
        if position is None:
            position = find_beginning(text, self._stop)
        else:
            self._is_stopped = self.is_ended = True
        self._withheld = text[position:]
        return text[:position]


def find_stop(text: str, stop: Sequence[str]) -> int | None:
    """Returns the start of the stop string that ends first in a text; None without one."""
    matches = []
    for string in stop:
        start = text.find(string)
        if start >= 0:
            matches.append((start + len(string), start))
    return min(matches)[1] if matches else None


def find_beginning(text: str, stop: Sequence[str]) -> int:
    """Returns the position in a text from which its rest may be the beginning of a stop string."""
    longest = max(map(len, stop), default=0)
    for position in range(max(0, len(text) - longest + 1), len(text)):
        if any(string.startswith(text[position:]) for string in stop):
            return position
    return len(text)


def check_stop(stop: Sequence[str], name: str = "stop") -> None:
    """Raises ConfigError if a stop string is not a text or is empty; `name` names the option."""
    for string in stop:
        if not isinstance(string, str):
            raise ConfigError(f"{name} {string!r}: a stop string must be text.")
        if not string:
            raise ConfigError(f"{name} has an empty text, which would end every answer at once.")
