"""Reads the questions of a split, and makes batches to continue from questions or prompts."""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from vlm_jax.config import ConfigError, Experiment, naming_source
from vlm_jax.config.tile_maps import longest_image
from vlm_jax.data import batching, native, packing, pipeline, sources, templates, text, tiling
from vlm_jax.data import images as image_files
from vlm_jax.data.builders.boxes import Box
from vlm_jax.data.conversations import Conversation
from vlm_jax.data.fields import Fields
from vlm_jax.data.forms.record import DEFAULT_TYPE, IMAGE_PLACEHOLDER
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.structs import Batch

ImagesReader = Callable[[], list[np.ndarray]]


@dataclass(frozen=True)
class Question:
    """A question to evaluate; its images are read when they are needed."""

    image_id: int | str  # of a conversation: its id
    question: str
    answer: str
    type: str
    #: returns (H, W, 3) uint8 pixels for each image, resized to its grid of tiles
    images: ImagesReader = field(repr=False, compare=False)
    image_count: int = 1
    history: tuple[str, ...] = ()  # questions and true answers before it in its conversation
    #: right answers, instead of `answer` alone
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()  # texts of a multiple-choice question
    location: str = ""  # of its record, in messages
    system: str | None = None  # text of the system turn of its conversation
    source: str = ""  # name of its source in `data.mixture`

    @property
    def references(self) -> tuple[str, ...]:
        """All right answers."""
        return self.answers or (self.answer,)


def to_evaluate(cfg: Experiment) -> list[Question]:
    """Returns the first `eval.max_examples` questions of the split or files of `eval`."""
    data, source = cfg.eval_data, cfg.eval.source
    questions = load(replace(cfg, data=data), cfg.eval.read_split, cfg.eval.max_examples)
    return [replace(question, source=source) for question in questions] if source else questions


def boxes_to_evaluate(cfg: Experiment) -> list[Box | None]:
    """Returns for each question of `to_evaluate` the box of the object it asks about, or None.

    The row of the dataset must have `has_boxes`.

    Raises:
      ConfigError: `eval.split` has several splits.
    """
    data, split, limit = cfg.eval_data, cfg.eval.read_split, cfg.eval.max_examples
    if "+" in split:
        raise ConfigError(
            f"eval.split {split!r} has several splits: boxes are known for one, or a slice of it."
        )
    builder, boxes = sources.builder(data), []
    for record in sources.load(data, split):
        if limit is not None and len(boxes) >= limit:
            break
        boxes += builder.boxes(record, split)
    return boxes[:limit]


def load(cfg: Experiment, split: str, limit: int | None = None) -> list[Question]:
    """Returns the first `limit` questions of a split (None: all), in the order of the dataset.

    `eval.turns` decides which questions of a conversation they are. The sources of a mixture, all
    of which have the split, take turns; the type of a question is its source.
    """
    if not cfg.data.mixture:
        return _load(cfg, split, limit)
    columns = []
    for name, part in cfg.parts.items():
        with naming_source(name):
            questions = _load(part, split, limit)
        columns.append([_of_source(question, name) for question in questions])
    turns = itertools.chain(*itertools.zip_longest(*columns))
    return [question for question in turns if question is not None][:limit]


def _of_source(question: Question, name: str) -> Question:
    kind = name if question.type == DEFAULT_TYPE else f"{name}/{question.type}"
    return replace(question, source=name, type=kind)


def _load(cfg: Experiment, split: str, limit: int | None) -> list[Question]:
    if cfg.data.is_conversations:
        return _conversation_questions(cfg, split, limit)
    decoded = pipeline.DecodedRecords(sources.load(cfg.data, split), cfg.vision)
    questions = []
    for index in range(len(decoded)):
        if limit is not None and len(questions) >= limit:
            break
        record = decoded.records[index]
        image = functools.partial(_read_record_image, decoded, index)
        for fields in zip(record.questions, record.answers, record.types, strict=True):
            questions.append(Question(record.image_id, *fields, image))
    return questions[:limit]


def _conversation_questions(cfg: Experiment, split: str, limit: int | None) -> list[Question]:
    source = pipeline.conversation_source(cfg.data, split)
    templates.check_system_turns(cfg, source)
    reader = packing.pixel_reader(cfg, source, is_exact=True)

    # Questions about the same images share them in a batch.
    @functools.cache
    def images_reader(indices: tuple[int, ...]) -> ImagesReader:
        return functools.partial(_read_images, reader, indices)

    questions = []
    for index in range(len(source)):
        conversation = source[index]
        asked = len(conversation.turns) // 2 if cfg.eval.turns == "all" else 1
        for number in range(asked):
            if limit is not None and len(questions) >= limit:
                return questions
            location = source.location(index)
            questions.append(_question(conversation, number, location, images_reader))
    return questions


def _question(
    conversation: Conversation,
    number: int,
    location: str,
    images_reader: Callable[[tuple[int, ...]], ImagesReader],
) -> Question:
    """Returns a question of a conversation, with all images up to it."""
    *history, question, answer = conversation.turns[: 2 * number + 2]
    placeholders = sum(turn.count(IMAGE_PLACEHOLDER) for turn in [*history, question])
    indices = conversation.images[:placeholders]
    answers = conversation.answers[number] if conversation.answers else ()
    return Question(
        image_id=conversation.id,
        question=question,
        answer=answer.strip(),
        type=conversation.type,
        images=images_reader(indices),
        image_count=len(indices),
        history=tuple(history),
        answers=tuple(text.strip() for text in answers),
        choices=tuple(conversation.choices[number]) if conversation.choices else (),
        location=location,
        system=conversation.system,
    )


def _read_images(read: Callable[[int], np.ndarray], indices: Sequence[int]) -> list[np.ndarray]:
    return [read(index) for index in indices]


def _read_record_image(decoded: pipeline.DecodedRecords, index: int) -> list[np.ndarray]:
    return [decoded[index].image]


def row_length(cfg: Experiment, tokenizer: Tokenizer, questions: Iterable[Question]) -> int:
    """Returns `prompt_length` of the questions, as if every image had the most tiles."""
    prompts = {
        (
            question.question,
            question.image_count,
            question.history,
            question.system,
            question.source,
        )
        for question in questions
    }
    return _max_prompt_length(cfg, tokenizer, prompts)


def prompt_length(
    cfg: Experiment, tokenizer: Tokenizer, prompts: Iterable[str], images: int = 1
) -> int:
    """Returns S of a batch of prompts with `images` images each.

    Raises:
      ConfigError: the longest prompt leaves no room for an answer of `eval.max_new_tokens`.
    """
    entries = {(prompt, images, (), None, "") for prompt in prompts}
    return _max_prompt_length(cfg, tokenizer, entries)


def _max_prompt_length(
    cfg: Experiment,
    tokenizer: Tokenizer,
    prompts: Iterable[tuple[str, int, Sequence[str], str | None, str]],
) -> int:
    """Returns the length of the longest prompt.

    Each has its number of images, its history, its system turn and the name of its source.
    """
    lengths, parts = [], _parts_of_prompts(cfg)
    for prompt, image_count, history, system, source in prompts:
        tiles = [_most_tiles(cfg)] * image_count
        row = prompt_row(parts[source], tokenizer, prompt, tiles, history=history, system=system)
        lengths.append(len(row["tokens"]))
    length = max(lengths)
    if length + cfg.eval.max_new_tokens > cfg.decoder.max_positions:
        raise ConfigError(
            f"decoder.max_positions {cfg.decoder.max_positions} has no room for the longest prompt "
            f"with its image, {length} tokens, and eval.max_new_tokens {cfg.eval.max_new_tokens}."
        )
    return length


@functools.lru_cache
def _parts_of_prompts(cfg: Experiment) -> dict[str, Experiment]:
    """Returns `Experiment.parts`, and the experiment itself for prompts without a source."""
    return {"": cfg, **cfg.parts}


def prompt_row(
    cfg: Experiment,
    tokenizer: Tokenizer,
    prompt: str,
    tiles: Sequence[tiling.Tiles],
    length: int | None = None,
    answer: str | None = None,
    history: Sequence[str] = (),
    system: str | None = None,
) -> Fields:
    """Returns the fields of a row to continue, in the form that the training data has.

    `tiles` has the tiles of each image of the prompt and of `history`, the questions and
    answers before it in a conversation, which begins with the system turn `system`.
    """
    if cfg.data.is_conversations:
        return templates.prompt_row(cfg, tokenizer, prompt, tiles, length, answer, history, system)
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
    histories: Sequence[Sequence[str]] | None = None,
    systems: Sequence[str | None] | None = None,
    sources: Sequence[str] | None = None,
    pad_to_multiple_of: int = 1,
    is_longest: bool = False,
) -> Batch:
    """Makes a batch to continue, padded on the left, of prompts and the images of each.

    Args:
      cfg: the experiment.
      tokenizer: its tokenizer.
      images: rows of images, (H, W, 3) float32 each, resized to their grids of tiles. Rows may
        have different numbers of images; a missing view is gray and read by no token.
      prompts: one for each row of `images`, unless `image_rows` is given.
      length: S, by default of the longest row. Set it to get batches of one shape, so that nothing
        is compiled twice; I then has at least `data.images_per_row` images.
      image_rows: for each prompt, the row of `images` that it is about, so that images that
        several prompts share are encoded once.
      answers: one for each prompt. The batch then has `targets` and `loss_weights` to train on.
      histories: for each prompt, the questions and answers before it in its conversation.
      systems: for each prompt, the system turn of its conversation.
      sources: for each prompt, the name of the source of the mixture that it has the form of; None:
        all have the form of `data`.
      pad_to_multiple_of: without `length`, S is rounded up to a multiple of it.
      is_longest: `length` has room for images of the most patches. S and P are halved as often as
        the rows of this batch allow.
    """
    tiles = [_tiles_of_row(cfg, row) for row in images]  # for each row of images
    tiles_by_slot = _by_slot(tiles)
    max_images = max(map(len, tiles))
    if image_rows is not None:
        tiles = [tiles[row] for row in image_rows]  # for each prompt
    if answers is None:
        answers = [None] * len(prompts)
    if histories is None:
        histories = [()] * len(prompts)
    if systems is None:
        systems = [None] * len(prompts)
    if sources is None:
        sources = [""] * len(prompts)
    parts = _parts_of_prompts(cfg)
    forms = [parts[source] for source in sources]
    entries = list(zip(forms, prompts, tiles, answers, histories, systems, strict=True))
    most_images = None
    if length is not None and cfg.fusion.has_images:
        most_images = max_images = max(max_images, cfg.data.images_per_row)
    if length is None or is_longest:
        lengths = []
        for form, prompt, counts, answer, history, system in entries:
            row = prompt_row(form, tokenizer, prompt, counts, None, answer, history, system)
            lengths.append(len(row["tokens"]))
        longest = max(lengths)
        if length is None:
            length = longest + -longest % pad_to_multiple_of
        else:
            length = native.halve(length, longest)
    views = max_images * cfg.vision.views
    rows = []
    for form, prompt, counts, answer, history, system in entries:
        row = prompt_row(form, tokenizer, prompt, counts, length, answer, history, system)
        rows.append(row | {"image_mask": _zero_pad(row["image_mask"], 1, views)})
    batch = Batch(**batching.stack_fields(rows))
    if not max_images:
        return batch
    if image_rows is not None:
        batch = batch.replace(image_rows=np.array(image_rows, np.int32))
    if cfg.vision.keeps_aspect_in_tiles:
        return _stack_tiles(cfg, batch, images, tiles, max_images)
    if cfg.vision.is_native:
        patches = _count_patches(cfg, images, most_images)
        packed = native.pack_images(images, cfg.vision, patches)
        return batch.replace(**packed._asdict())
    pixels = [_zero_pad(tiling.stack_views(row, cfg.vision), 0, views) for row in images]
    memory = batching.map_memory(cfg, tiles_by_slot, (len(images), max_images))
    batch = batch.replace(images=np.stack(pixels), map_memory=memory)
    return batching.as_tiled_batch(cfg, batch)


def _count_patches(
    cfg: Experiment, images: Sequence[Sequence[np.ndarray]], most_images: int | None
) -> int:
    """Returns P of a batch of prompts at native resolution.

    With `most_images` it is the most patches of this number of images, halved as often as the
    images allow, so that few shapes are compiled.
    """
    vision = cfg.vision
    square = vision.patch_square**2
    squares = []
    for row in images:
        squares.append(sum(native.count_squares(image.shape[:2], vision) for image in row))
    if most_images is None:
        return native.padded_length(max(squares) * square, vision.patch_square)
    return native.halve(most_images * vision.max_squares, max(squares)) * square


def _tiles_of_row(cfg: Experiment, images: Sequence[np.ndarray]) -> list[tiling.Tiles]:
    return [tiling.describe_tiles(pixels, cfg.vision) for pixels in images]


def _most_tiles(cfg: Experiment) -> tiling.Tiles:
    """Returns the tiles of an image with the most tokens."""
    vision = cfg.vision
    if not vision.tile_grids:
        return vision.cut_tiles
    if cfg.has_maps_in_sequence:
        return longest_image(vision, cfg.projector)
    rows, columns = max(vision.tile_grids, key=math.prod)
    return rows * vision.image_size_px, columns * vision.image_size_px


def _by_slot(images: Sequence[Sequence[Any]]) -> dict[tuple[int, int], Any]:
    """Returns (row, slot) -> what `images` has of an image."""
    by_slot = {}
    for row, row_images in enumerate(images):
        for slot, image in enumerate(row_images):
            by_slot[row, slot] = image
    return by_slot


def _stack_tiles(
    cfg: Experiment,
    batch: Batch,
    images: Sequence[Sequence[np.ndarray]],
    tiles: Sequence[Sequence[tiling.Tiles]],
    max_images: int,
) -> Batch:
    """Adds the images of `prompt_batch` by `batching.stack_tiles`; `tiles` has a row per prompt."""
    pixels = _by_slot(images)
    image_counts = np.array([len(counts) for counts in tiles])  # (B,)
    is_own = np.arange(max_images) < image_counts[:, None, None]  # (B, 1, I)
    is_own = np.broadcast_to(is_own, batch.image_mask.shape)  # (B, S, I)
    return batching.stack_tiles(cfg, batch, pixels, (len(images), max_images), is_own)


def question_batch(
    cfg: Experiment,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    image_sources: Sequence[Question],
    length: int | None = None,
    image_rows: int = 0,
    answers: Sequence[str] | None = None,
) -> Batch:
    """Makes the `prompt_batch` of questions, each about the images of its `image_sources` entry.

    Images that several questions share are in the batch once. `image_rows` is the smallest number
    of rows of images: set it, like `length`, to get batches of one shape, or at native resolution
    of few. `answers` as in `prompt_batch`.
    """
    readers = list(dict.fromkeys(source.images for source in image_sources))
    images = [_read_normalized(cfg, reader) for reader in readers]
    images += images[-1:] * (image_rows - len(images))
    prompts = [question.question for question in questions]
    histories = [question.history for question in questions]
    systems = [question.system for question in questions]
    sources = [question.source for question in questions]
    owners = [readers.index(source.images) for source in image_sources]
    return prompt_batch(
        cfg,
        tokenizer,
        images,
        prompts,
        length,
        owners,
        answers,
        histories=histories,
        systems=systems,
        sources=sources,
        is_longest=length is not None and cfg.vision.is_native,
    )


def _read_normalized(cfg: Experiment, read: ImagesReader) -> list[np.ndarray]:
    return [image_files.normalize(pixels, cfg.vision) for pixels in read()]


def _zero_pad(x: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Appends zeros along an axis, up to a size."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return np.pad(x, widths)
