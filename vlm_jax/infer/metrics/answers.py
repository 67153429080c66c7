"""Scores of short answers: a text, a number or a box."""

import re
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

from vlm_jax.config import DataError
from vlm_jax.infer.metrics.memory import remember

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
    folded = " ".join(prediction.lower().split())
    # In upper case, one character outside of ASCII may become several.
    length = len(prediction.upper())
    best = 0.0
    for reference in references:
        folded_reference = " ".join(reference.lower().split())
        longest = max(length, len(reference.upper()))
        # The similarity at a larger distance is below 0.5.
        largest = longest // 2
        distance = Levenshtein.distance(folded, folded_reference, score_cutoff=largest)
        if distance <= largest:
            best = max(best, 1 - distance / longest)
    return best


def relaxed_accuracy(prediction: str, references: Sequence[str]) -> bool:
    """Returns whether a number is within 5 % of a reference, or a text equals one ignoring case.

    Source: ChartQA (Masry et al. 2022), section 5.1; `tasks/chartqa/utils.py` of lmms-eval.
    """
    number, lowered = _to_number(prediction), prediction.lower()
    if number is None:
        return lowered in map(str.lower, references)
    for reference in references:
        target = _to_number(reference)
        if target:
            is_right = abs(number - target) / abs(target) <= LARGEST_RELATIVE_ERROR
        else:
            # Nothing is within 5 % of 0.
            is_right = lowered == reference.lower()
        if is_right:
            return True
    return False


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
    targets = list(map(_parse_box, references))
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
    a_left, a_top, a_right, a_bottom = a
    b_left, b_top, b_right, b_bottom = b
    # Calls of min and max would take half the time of the metric.
    width = (a_right if a_right < b_right else b_right) - (a_left if a_left > b_left else b_left)
    height = (a_bottom if a_bottom < b_bottom else b_bottom) - (a_top if a_top > b_top else b_top)
    if width <= 0 or height <= 0:
        return 0.0
    intersection = width * height
    a_area = (a_right - a_left) * (a_bottom - a_top)
    b_area = (b_right - b_left) * (b_bottom - b_top)
    return intersection / (a_area + b_area - intersection)
