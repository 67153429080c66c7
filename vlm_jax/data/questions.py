"""What is asked: the questions of a split, or prompts, and their images -> batches to continue."""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from vlm_jax.config import ConfigError, Experiment
from vlm_jax.data import (
    conversation_files,
    packing,
    pipeline,
    sources,
    templates,
    text,
    tiling,
)
from vlm_jax.data import images as image_files
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.structs import Batch


@dataclass(frozen=True)
class Question:
    """A question to evaluate; its images are read when they are asked for."""

    image_id: int | str  # of a conversation: its id
    question: str
    answer: str
    type: str
    images: Callable[[], list[np.ndarray]] = field(
        repr=False, compare=False
    )  # gives (H, W, 3) uint8 each, laid out
    image_count: int = 1


def to_evaluate(cfg: Experiment) -> list[Question]:
    """The questions that `eval` asks for: the first `eval.max_examples` of its split or files."""
    return load(replace(cfg, data=cfg.eval_data), cfg.eval.read_split, cfg.eval.max_examples)


def load(cfg: Experiment, split: str, limit: int = 0) -> list[Question]:
    """The first `limit` questions of a split (0: all), in the data set's order; of a conversation, its first."""
    if cfg.data.is_conversations:
        return _first_questions(cfg, split, limit)
    decoded = pipeline.DecodedRecords(sources.load(cfg.data, split), cfg.vision)
    found = []
    for index in range(len(decoded)):
        if limit and len(found) >= limit:
            break
        record = decoded.records[index]
        image = functools.partial(_image, decoded, index)
        asked = zip(record.questions, record.answers, record.types, strict=True)
        found += [Question(record.image_id, *parts, image) for parts in asked]
    return found[:limit] if limit else found


def _first_questions(cfg: Experiment, split: str, limit: int) -> list[Question]:
    source = pipeline.conversation_source(cfg.data, split)
    read, found = packing.pixel_reader(cfg, source, is_exact=True), []
    for index in range(min(limit or len(source), len(source))):
        talk = source[index]
        asked, said = talk.turns[:2]
        shown = talk.images[: asked.count(conversation_files.IMAGE_PLACEHOLDER)]
        images = functools.partial(_images, read, shown)
        found.append(Question(talk.id, asked, said.strip(), talk.type, images, len(shown)))
    return found


def _images(read: Callable[[int], np.ndarray], numbers: Sequence[int]) -> list[np.ndarray]:
    return [read(number) for number in numbers]


def _image(decoded: pipeline.DecodedRecords, index: int) -> list[np.ndarray]:
    return [decoded[index].image]


def row_length(cfg: Experiment, tokenizer: Tokenizer, asked: Iterable[Question]) -> int:
    """`prompt_length` of the questions, each with its images, as if all were of the most tiles."""
    return _max_prompt_length(
        cfg, tokenizer, {(question.question, question.image_count) for question in asked}
    )


def prompt_length(
    cfg: Experiment, tokenizer: Tokenizer, prompts: Iterable[str], images: int = 1
) -> int:
    """S of a batch of the prompts with `images` images each.

    Raises:
      ConfigError: the longest of them has no room for an answer of `eval.max_new_tokens`.
    """
    return _max_prompt_length(cfg, tokenizer, {(prompt, images) for prompt in prompts})


def _max_prompt_length(cfg: Experiment, tokenizer: Tokenizer, asked: set[tuple[str, int]]) -> int:
    most = cfg.vision.cut_tiles
    length = max(
        len(prompt_row(cfg, tokenizer, prompt, [most] * images)["tokens"])
        for prompt, images in asked
    )
    if length + cfg.eval.max_new_tokens > cfg.decoder.max_positions:
        raise ConfigError(
            f"decoder.max_positions {cfg.decoder.max_positions} has no room for the longest prompt with its image, "
            f"{length} tokens, and eval.max_new_tokens {cfg.eval.max_new_tokens}."
        )
    return length


def prompt_row(
    cfg: Experiment,
    tokenizer: Tokenizer,
    prompt: str,
    tiles: Sequence[int],
    length: int | None = None,
    answer: str | None = None,
) -> text.Fields:
    """A prompt and its images of so many tiles, in the form that the data has -> the fields of a row to continue."""
    if cfg.data.is_conversations:
        return templates.prompt_row(cfg, tokenizer, prompt, tiles, length, answer)
    ids = () if answer is None else text.answer_ids(tokenizer, answer)
    return text.prompt_row(cfg, text.prompt_ids(tokenizer, prompt), tiles, length, ids)


def prompt_batch(
    cfg: Experiment,
    tokenizer: Tokenizer,
    images: Sequence[Sequence[np.ndarray]],
    prompts: Sequence[str],
    length: int | None = None,
    image_rows: Sequence[int] | None = None,
    answers: Sequence[str] | None = None,
) -> Batch:
    """Prompts and the images of each, (H, W, 3) float32 -> a batch to continue, padded on the left.

    With `answers`, one for each prompt, it is a batch to train on, with `targets` and `loss_weights`. `image_rows` says
    for every prompt which of `images` it is about, so that what several share is encoded once.

    Images are laid out in tiles (`data/tiling.py`). Rows may have different numbers of images; I is all views of the
    largest. `length` is S, by default that of the longest row: give it where every batch shall have the same shape, so
    that nothing is compiled twice; I is of `data.images_per_row` images then, at the least. A missing view is grey, and
    no token reads it.
    """
    counts = [[tiling.count_tiles(pixels, cfg.vision) for pixels in row] for row in images]
    most = max(map(len, counts))
    counts = counts if image_rows is None else [counts[row] for row in image_rows]
    ends = [None] * len(prompts) if answers is None else answers
    asked = list(zip(prompts, counts, ends, strict=True))
    if length is None:
        length = max(
            len(prompt_row(cfg, tokenizer, prompt, n, answer=end)["tokens"])
            for prompt, n, end in asked
        )
    elif cfg.fusion.has_images:
        most = max(most, cfg.data.images_per_row)
    rows = [prompt_row(cfg, tokenizer, prompt, n, length, end) for prompt, n, end in asked]
    views = most * cfg.vision.views
    for row in rows:
        row["image_mask"] = _zero_pad(row["image_mask"], 1, views)
    batch = Batch(**{name: np.stack([row[name] for row in rows]) for name in rows[0]})
    if not most:
        return batch
    batch = batch.replace(image_rows=None if image_rows is None else np.array(image_rows, np.int32))
    if cfg.vision.keeps_aspect_in_tiles:
        placed = {
            (row, number): x for row, shown in enumerate(images) for number, x in enumerate(shown)
        }
        own = np.arange(most) < np.array(list(map(len, counts)))[:, None, None]
        own = np.broadcast_to(own, batch.image_mask.shape)
        return packing.stack_tiles(cfg, batch, placed, (len(images), most), own)
    pixels = np.stack([_zero_pad(tiling.stack_views(row, cfg.vision), 0, views) for row in images])
    return packing.as_tiled_batch(cfg, batch.replace(images=pixels))


def question_batch(
    cfg: Experiment,
    tokenizer: Tokenizer,
    asked: Sequence[Question],
    shown: Sequence[Question],
    length: int | None = None,
    image_rows: int = 0,
) -> Batch:
    """`prompt_batch` of questions, each about the images of the one that is `shown` in its place.

    Images that several questions share are there once. `image_rows` is how many rows of images there are at the least:
    give it, too, where every batch shall have the same shape.
    """
    readers = list(dict.fromkeys(question.images for question in shown))
    images = [[image_files.normalise(pixels, cfg.vision) for pixels in read()] for read in readers]
    images += images[-1:] * (image_rows - len(images))
    prompts, owners = (
        [question.question for question in asked],
        [readers.index(question.images) for question in shown],
    )
    return prompt_batch(cfg, tokenizer, images, prompts, length, owners)


def _zero_pad(x: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Zeros behind it, up to the size."""
    return np.pad(x, [(0, size - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])
