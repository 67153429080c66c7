"""Results for texts that repeat, as answers and references do."""

from collections.abc import Callable

MOST_TEXTS = 2**16  # after which a function begins anew


def remember(function: Callable[[str], str]) -> Callable[[str], str]:
    """Returns a function of a text that computes each text once.

    Unlike `functools.lru_cache`, it makes no objects that Python's garbage collector visits, and a
    text that is not repeated costs less.
    """

    class Results(dict):
        def __missing__(self, text: str) -> str:
            if len(self) >= MOST_TEXTS:
                self.clear()
            result = self[text] = function(text)
            return result

    return Results().__getitem__
