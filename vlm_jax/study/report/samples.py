"""Questions on which arms disagree, with their images."""

import io
from collections.abc import Mapping

from PIL import Image

from vlm_jax.config import Experiment
from vlm_jax.data import questions
from vlm_jax.study.matching import axis_label
from vlm_jax.study.report.page import Picture, Sample, Section
from vlm_jax.study.report.results import Result, Results

SHOWN = 12
SMALLEST_PX = 224  # a smaller image is enlarged, pixel by pixel


def sample_section(results: Results) -> Section:
    """Of the first axis and the first seed that all arms have, types of questions in turn.

    As many are of every group of arms that were asked the same.
    """
    study, title = results.plan.study, "Where the arms disagree"
    axis = next(iter(study.matched))
    runs = {arm: results.of(axis, arm) for arm in study.arms}
    shared = set.intersection(*(set(found) for found in runs.values()))
    if not shared:
        return Section(title, ["No seed is done by all arms yet."])
    seed = min(shared)
    groups = asked_the_same({arm: found[seed] for arm, found in runs.items()})
    made: list[Sample] = []
    for answered in groups:
        cfg = max((results.plan.arms[axis, arm] for arm in answered), key=_pixels)
        asked = questions.to_evaluate(cfg)
        chosen = _chosen(answered, SHOWN // len(groups))
        made += [
            _sample(number, i, answered, asked[i].images())
            for number, i in enumerate(chosen, len(made))
        ]
    text = (
        f"From the {study.base.eval.read_split} split, at matched {axis_label(axis)}, seed {seed}: some arms are right, and "
        "some wrong, of those that were asked the same."
    )
    return Section(title, [text], samples=made)


def asked_the_same(answered: Mapping[str, Result]) -> list[dict[str, Result]]:
    """Groups of at least two arms; there are at most `SHOWN` of them."""
    groups: list[dict[str, Result]] = []
    for arm, result in answered.items():
        group = next(
            (one for one in groups if next(iter(one.values())).asked == result.asked), None
        )
        if group is None:
            groups.append(group := {})
        group[arm] = result
    return [group for group in groups if len(group) > 1][:SHOWN]


def _pixels(cfg: Experiment) -> int:
    """What an arm sees at the most: the sharpest pictures are shown."""
    return cfg.vision.image_size_px**2 * cfg.vision.tiles


def _chosen(answered: Mapping[str, Result], most: int) -> list[int]:
    """Indices of so many questions, at most one an image, the types taking turns."""
    by_type: dict[str, list[int]] = {}
    seen = set()
    for i, lines in enumerate(zip(*(result.predictions for result in answered.values()))):
        if len({line["correct"] for line in lines}) > 1 and lines[0]["image_id"] not in seen:
            by_type.setdefault(lines[0]["type"], []).append(i)
    chosen: list[int] = []
    first = next(iter(answered.values()))
    while len(chosen) < most and any(by_type.values()):
        for waiting in by_type.values():
            fresh = [i for i in waiting if first.predictions[i]["image_id"] not in seen]
            waiting[:] = fresh[1:]
            if fresh and len(chosen) < most:
                chosen.append(fresh[0])
                seen.add(first.predictions[fresh[0]]["image_id"])
    return chosen


def _sample(number: int, index: int, answered: Mapping[str, Result], images: list) -> Sample:
    lines = {arm: result.predictions[index] for arm, result in answered.items()}
    line = next(iter(lines.values()))
    file = io.BytesIO()
    image = Image.fromarray(images[0])
    image.resize(
        [side * max(1, -(-SMALLEST_PX // min(image.size))) for side in image.size], 0
    ).save(file, "png")
    picture = Picture(f"sample_{number}.png", f"test image {line['image_id']}", file.getvalue())
    said = [(arm, one["prediction"] or "(nothing)", one["correct"]) for arm, one in lines.items()]
    return Sample(picture, line["question"], line["answer"], line["type"], said)
