"""Fast functions of many texts: the texts of a question at once, and those that repeat."""

from collections.abc import Callable, Sequence
from typing import TypeVar

MOST_TEXTS = 2**16  # after which a function begins anew

# A word between the texts of a question.
SEPARATOR = "\0"

T = TypeVar("T")


def join_texts(texts: Sequence[str]) -> str:
    """Returns the texts with SEPARATOR between them; in a text it becomes a space.

    One call for a joined text takes less time than a call for each of ten short ones.
    """
    joined = f" {SEPARATOR} ".join(texts)
    if joined.count(SEPARATOR) >= len(texts):
        texts = [text.replace(SEPARATOR, " ") for text in texts]
        return join_texts(texts)
    return joined


def remember(function: Callable[[str], T]) -> Callable[[str], T]:
    """Returns a function of a text that computes each text once.

    Unlike `functools.lru_cache`, it makes no objects that Python's garbage collector visits, and a
    text that is not repeated costs less.
    """

    class Results(dict):
        def __missing__(self, text: str) -> T:
            if len(self) >= MOST_TEXTS:
                self.clear()
            result = self[text] = function(text)
            return result

    return Results().__getitem__
