"""Questions on which arms disagree, with their images."""

import io
from collections.abc import Mapping

from PIL import Image

from vlm_jax.config import Experiment
from vlm_jax.data import questions
from vlm_jax.study.matching import axis_label
from vlm_jax.study.report.page import Answer, Picture, Sample, Section
from vlm_jax.study.report.results import Result, Results

MAX_SAMPLES = 12
# A smaller image is enlarged by a whole factor.
MIN_SIZE_PX = 224


def sample_section(results: Results) -> Section:
    """Returns samples of the first axis and of the first seed that all arms have.

    Arms with the same questions form a group; every group has equally many samples.
    """
    title = "Where the arms disagree"
    study = results.plan.study
    axis = next(iter(study.matched))
    by_arm = {arm: results.by_seed(axis, arm) for arm in study.arms}
    seeds = set.intersection(*map(set, by_arm.values()))
    if not seeds:
        return Section(title, ["No seed is done by all arms yet."])
    seed = min(seeds)
    groups = group_by_questions({arm: by_seed[seed] for arm, by_seed in by_arm.items()})
    samples: list[Sample] = []
    for group in groups:
        # Show the sharpest images that an arm of the group had.
        plan = results.plan
        cfg = max((plan.resolve(plan.arms[axis, arm]) for arm in group), key=_max_pixels)
        group_questions = questions.to_evaluate(cfg)
        for i in _select(group, MAX_SAMPLES // len(groups)):
            samples.append(_sample(len(samples), i, group, group_questions[i].images()))
    text = (
        f"Questions of the {study.base.eval.read_split} split, at matched {axis_label(axis)}, "
        f"seed {seed}, to which some arms gave a right and some a wrong answer."
    )
    return Section(title, [text], samples=samples)


def group_by_questions(by_arm: Mapping[str, Result]) -> list[dict[str, Result]]:
    """Returns groups of two or more arms with the same questions, at most `MAX_SAMPLES` groups."""
    groups: list[dict[str, Result]] = []
    for arm, result in by_arm.items():
        for group in groups:
            if next(iter(group.values())).questions == result.questions:
                group[arm] = result
                break
        else:
            groups.append({arm: result})
    return [group for group in groups if len(group) > 1][:MAX_SAMPLES]


def _max_pixels(cfg: Experiment) -> int:
    return cfg.vision.image_size_px**2 * cfg.vision.tiles


def _select(group: Mapping[str, Result], count: int) -> list[int]:
    """Returns indices of questions with right and wrong answers.

    At most `count`, at most one for each image, taking the types of questions in turn.
    """
    candidates = _disagreements(group)
    image_ids = [line["image_id"] for line in next(iter(group.values())).predictions]
    selected: list[int] = []
    used_images = set()
    while len(selected) < count and any(candidates.values()):
        for indices in candidates.values():
            unused = [i for i in indices if image_ids[i] not in used_images]
            indices[:] = unused[1:]
            if unused and len(selected) < count:
                selected.append(unused[0])
                used_images.add(image_ids[unused[0]])
    return selected


def _disagreements(group: Mapping[str, Result]) -> dict[str, list[int]]:
    """Returns type -> indices of its questions with right and wrong answers."""
    by_type: dict[str, list[int]] = {}
    predictions = [result.predictions for result in group.values()]
    for i, lines in enumerate(zip(*predictions)):
        if len({line["correct"] for line in lines}) > 1:
            by_type.setdefault(lines[0]["type"], []).append(i)
    return by_type


def _sample(number: int, index: int, group: Mapping[str, Result], images: list) -> Sample:
    lines = {arm: result.predictions[index] for arm, result in group.items()}
    line = next(iter(lines.values()))
    caption = f"test image {line['image_id']}"
    picture = Picture(f"sample_{number}.png", caption, _enlarged_png(images[0]))
    answers = [
        Answer(arm, arm_line["prediction"] or "(nothing)", arm_line["correct"])
        for arm, arm_line in lines.items()
    ]
    return Sample(picture, line["question"], line["answer"], line["type"], answers)


def _enlarged_png(pixels) -> bytes:
    image = Image.fromarray(pixels)
    factor = max(1, -(-MIN_SIZE_PX // min(image.size)))
    size = [side * factor for side in image.size]
    file = io.BytesIO()
    image.resize(size, Image.Resampling.NEAREST).save(file, "png")
    return file.getvalue()
