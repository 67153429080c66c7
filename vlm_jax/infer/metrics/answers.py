"""Scores of short answers: a text, a number or a box."""

import re
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

from vlm_jax.config import DataError
from vlm_jax.infer.metrics.memory import remember

ANLS_THRESHOLD = 0.5
LARGEST_RELATIVE_ERROR = 0.05
IOU_THRESHOLD = 0.5
_NUMBER = r"\s*(-?\d+(?:\.\d+)?)"
BOX = re.compile(rf"\[{','.join([_NUMBER] * 4)}\s*\]")

Box = tuple[float, ...]  # left, top, right, bottom


def exact_match(prediction: str, references: Sequence[str]) -> bool:
    """Returns whether the prediction equals a reference, character by character."""
    return prediction in references


def contains(prediction: str, references: Sequence[str]) -> bool:
    """Returns whether a reference occurs in the prediction, ignoring case.

    Source: OCRBench (Liu et al. 2023), `tasks/ocrbench/utils.py` of lmms-eval, which also makes
    full-width characters narrow.
    """
    prediction = _one_line(prediction)
    return any(_one_line(reference) in prediction for reference in references)


def _one_line(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def anls(prediction: str, references: Sequence[str]) -> float:
    """Returns the normalized Levenshtein similarity to the nearest reference, or 0 below 0.5.

    The distance ignores case and repeated spaces, but is divided by the length of the longer text
    as it was written.

    Source: ST-VQA (Biten et al. 2019), `anls` in `api/metrics.py` of lmms-eval.
    """
    if prediction in references:
        return 1.0
    folded, length = _fold(prediction), _length(prediction)
    best = 0.0
    for reference in references:
        longest = max(length, _length(reference))
        if longest:
            # A larger distance counts as one more than the largest, whose similarity is below 0.5.
            largest = int(longest * (1 - ANLS_THRESHOLD))
            distance = Levenshtein.distance(folded, _fold(reference), score_cutoff=largest)
            best = max(best, 1 - distance / longest)
    return best if best >= ANLS_THRESHOLD else 0.0


def _fold(text: str) -> str:
    """Returns a text without case and repeated spaces."""
    return " ".join(text.lower().split())


def _length(text: str) -> int:
    """Returns the length in upper case: a character outside of ASCII may have one of several."""
    return len(text) if text.isascii() else len(text.upper())


def relaxed_accuracy(prediction: str, references: Sequence[str]) -> bool:
    """Returns whether a number is within 5 % of a reference, or a text equals one ignoring case.

    Source: ChartQA (Masry et al. 2022), section 5.1; `tasks/chartqa/utils.py` of lmms-eval.
    """
    number, lowered = _to_number(prediction), prediction.lower()
    return any(_is_close(number, lowered, reference) for reference in references)


def _is_close(number: float | None, lowered: str, reference: str) -> bool:
    """Compares a prediction, as a number if it is one and in lower case, with a reference."""
    target = None if number is None else _to_number(reference)
    # Nothing is within 5 % of 0.
    if not target:
        return lowered == reference.lower()
    return abs(number - target) / abs(target) <= LARGEST_RELATIVE_ERROR


def _to_number(text: str) -> float | None:
    """Returns the number that a text is, a percentage as a share; None for other texts."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def box_iou(prediction: str, references: Sequence[str]) -> bool:
    """Returns whether the first box of the prediction overlaps a reference, IoU >= 0.5.

    A box is `[left, top, right, bottom]`, in the units of the references.

    Source: RefCOCO, `tasks/refcoco/utils_rec.py` of lmms-eval.

    Raises:
      DataError: a reference has no box.
    """
    targets = [_parse_box(reference) for reference in references]
    if None in targets:
        text = references[targets.index(None)]
        raise DataError(f"the reference {text!r} has no box [left, top, right, bottom]")
    box = _parse_box(prediction)
    return box is not None and any(_iou(box, target) >= IOU_THRESHOLD for target in targets)


@remember
def _parse_box(text: str) -> Box | None:
    match = BOX.search(text)
    return tuple(map(float, match.groups())) if match else None


def _iou(a: Box, b: Box) -> float:
    """Returns the intersection over union of the areas of two boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    intersection = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    return intersection / union
