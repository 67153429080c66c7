"""Records -> batches, with Grain: what comes next is a function of `seed` and of the step alone."""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import grain
import numpy as np

from vlm_jax.config import ConfigError, Data, Experiment, Vision
from vlm_jax.data import conversations, packing, sources, templates, text, tfds_sets, tiles
from vlm_jax.data import images as image_files
from vlm_jax.data.text import Tokenizer
from vlm_jax.structs import Batch

CACHED_PAIRS = 1 << 16  # questions with answers whose tokens are kept: data sets from templates repeat theirs


class Decoded:
    """Random access to records whose image is pixels, (H, W, 3) uint8, laid out in tiles.

    Those read last stay in memory.
    """

    def __init__(self, records: sources.Records, vision: Vision):
        self.records = records
        self._vision = vision
        self._read = tiles.kept(self._decode, vision)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> sources.Record:
        return self._read(index)

    def _decode(self, index: int) -> sources.Record:
        record = self.records[index]
        image = image_files.decode(record.image, name=f"image {record.image_id}")
        return replace(record, image=tiles.lay_out(image, self._vision))


def training_iterator(
    cfg: Experiment, tokenizer: Tokenizer, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator:
    """Endless `Batch`es of numpy arrays with B = train.batch_size / process_count rows.

    `get_state()` and `set_state()` continue exactly, with another number of processes, too: every process draws every
    n-th row of one stream, so batch k of n processes holds together the rows of batch k of one process.
    """
    if cfg.train.batch_size % process_count:
        raise ConfigError(f"train.batch_size {cfg.train.batch_size} is no multiple of the {process_count} processes")
    if cfg.data.is_conversations:
        source = conversation_source(cfg.data, cfg.data.train_split)
        return iter(packing.batches(cfg, tokenizer, source, slice(process_index, None, process_count)))
    records = Decoded(sources.load(cfg.data, cfg.data.train_split), cfg.vision)
    rows = _shuffled(cfg, records).random_map(_row_builder(cfg, tokenizer)).repeat()
    batches = rows[process_index::process_count].batch(
        cfg.train.batch_size // process_count, drop_remainder=True, batch_fn=functools.partial(_stack, cfg)
    )
    threads = cfg.data.threads
    return iter(batches.to_iter_dataset(grain.ReadOptions(threads, max(threads, cfg.data.prefetch))))


def _shuffled(cfg: Experiment, source: Sequence) -> grain.MapDataset:
    return grain.MapDataset.source(source).seed(cfg.seed).shuffle()


def ids(cfg: Experiment, tokenizer: Tokenizer, state: dict) -> list:
    """Ids of what is in the batch, of all processes, that `training_iterator` gives after its state was `state`.

    Of conversations, or else of images.
    """
    if cfg.data.is_conversations:
        return packing.ids(cfg, tokenizer, conversation_source(cfg.data, cfg.data.train_split), state)
    records = sources.load(cfg.data, cfg.data.train_split)
    order, first = _shuffled(cfg, range(len(records))).repeat(), state["next_index"] * cfg.train.batch_size
    return [records[order[row]].image_id for row in range(first, first + cfg.train.batch_size)]


def _row_builder(cfg: Experiment, tokenizer: Tokenizer) -> Callable:
    choose = chooser(cfg, tokenizer)

    def row(record: sources.Record, rng: np.random.Generator) -> dict[str, np.ndarray]:
        pairs = choose(record, rng)
        pixels = image_files.augment(record.image, cfg.data.augment, rng)
        packed = text.pack_row(cfg, pairs, tiles.tiles_of(pixels, cfg.vision))
        return packed | {"images": pixels}

    return row


def chooser(cfg: Experiment, tokenizer: Tokenizer) -> Callable[[sources.Record, np.random.Generator], list[text.Pair]]:
    """A record and a generator -> the questions that are chosen for a row, with their answers."""

    @functools.lru_cache(CACHED_PAIRS)
    def encode(question: str, answer: str) -> text.Pair:
        return text.prompt_ids(tokenizer, question), text.answer_ids(tokenizer, answer)

    def choose(record: sources.Record, rng: np.random.Generator) -> list[text.Pair]:
        chosen = rng.permutation(len(record.questions))[: cfg.data.questions_per_row]
        return [encode(record.questions[i], record.answers[i]) for i in chosen]

    return choose


def _stack(cfg: Experiment, rows: Sequence[dict[str, np.ndarray]]) -> Batch:
    images = tiles.one_a_row([row["images"] for row in rows], cfg.vision)
    stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0] if name != "images"}
    return packing.tiled(cfg, Batch(**stacked, images=images))


def conversation_source(data: Data, split: str) -> conversations.Conversations | tfds_sets.AskedRows:
    """Random access to the conversations of a split, and to their images."""
    return (conversations if data.source == "conversations" else tfds_sets).load(data, split)


def train_tokenizer(cfg: Experiment) -> Tokenizer:
    """A tokenizer for what is said in the training split, of at most decoder.vocab_size tokens."""
    if cfg.data.is_conversations:
        talks = conversation_source(cfg.data, cfg.data.train_split)
        texts = (turn.replace(conversations.MARK, "") for talk in talks for turn in talk.turns)
    else:
        records = sources.load(cfg.data, cfg.data.train_split)
        texts = (line for record in records for line in record.questions + record.answers)
    return Tokenizer.train(texts, cfg.decoder.vocab_size, tiles.tag_names(cfg.vision) if cfg.tile_tags else ())


@dataclass(frozen=True)
class Question:
    """A question to evaluate; its images are read when they are asked for."""

    image_id: int | str  # of a conversation: its id
    question: str
    answer: str
    type: str
    images: Callable[[], list[np.ndarray]] = field(repr=False, compare=False)  # gives (H, W, 3) uint8 each, laid out
    image_count: int = 1


def questions(cfg: Experiment, split: str, limit: int = 0) -> list[Question]:
    """The first `limit` questions of a split (0: all), in the data set's order; of a conversation, its first."""
    if cfg.data.is_conversations:
        return _first_questions(cfg, split, limit)
    decoded = Decoded(sources.load(cfg.data, split), cfg.vision)
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
    source = conversation_source(cfg.data, split)
    read, found = packing.pixel_reader(cfg, source), []
    for index in range(min(limit or len(source), len(source))):
        talk = source[index]
        asked, said = talk.turns[:2]
        shown = talk.images[: asked.count(conversations.MARK)]
        images = functools.partial(_images, read, shown)
        found.append(Question(talk.id, asked, said.strip(), "conversation", images, len(shown)))
    return found


def _images(read: Callable[[int], np.ndarray], numbers: Sequence[int]) -> list[np.ndarray]:
    return [read(number) for number in numbers]


def _image(decoded: Decoded, index: int) -> list[np.ndarray]:
    return [decoded[index].image]


def question_length(cfg: Experiment, tokenizer: Tokenizer, asked: Iterable[Question]) -> int:
    """`prompt_length` of the questions, each with its images, as if all were of the most tiles."""
    return _room(cfg, tokenizer, {(question.question, question.image_count) for question in asked})


def prompt_length(cfg: Experiment, tokenizer: Tokenizer, prompts: Iterable[str]) -> int:
    """S of a batch of the prompts with one image each.

    Raises:
      ConfigError: the longest of them has no room for an answer of `eval.max_new_tokens`.
    """
    return _room(cfg, tokenizer, {(prompt, 1) for prompt in prompts})


def _room(cfg: Experiment, tokenizer: Tokenizer, asked: set[tuple[str, int]]) -> int:
    most = cfg.vision.cut_tiles
    length = max(len(prompt_row(cfg, tokenizer, prompt, [most] * images)["tokens"]) for prompt, images in asked)
    if length + cfg.eval.max_new_tokens > cfg.decoder.max_positions:
        raise ConfigError(
            f"decoder.max_positions {cfg.decoder.max_positions} has no room for the longest prompt with its image, "
            f"{length} tokens, and eval.max_new_tokens {cfg.eval.max_new_tokens}."
        )
    return length


def prompt_row(
    cfg: Experiment, tokenizer: Tokenizer, prompt: str, tiles: Sequence[int], length: int | None = None
) -> text.Fields:
    """A prompt and its images of so many tiles, in the form that the data has -> the fields of a row to continue."""
    if cfg.data.is_conversations:
        return templates.prompt_row(cfg, tokenizer, prompt, tiles, length)
    return text.prompt_row(cfg, text.prompt_ids(tokenizer, prompt), tiles, length)


def prompt_batch(
    cfg: Experiment,
    tokenizer: Tokenizer,
    images: Sequence[Sequence[np.ndarray]],
    prompts: Sequence[str],
    length: int | None = None,
    image_rows: Sequence[int] | None = None,
) -> Batch:
    """Prompts and the images of each, (H, W, 3) float32 -> a batch to continue, padded on the left; no targets.

    `image_rows` says for every prompt which of `images` it is about, so that what several share is encoded once.

    Images are laid out in tiles (`data/tiles.py`). Rows may have different numbers of images; I is all views of the
    largest. `length` is S, by default that of the longest row: give it where every batch shall have the same shape, so
    that nothing is compiled twice; I is of `data.images_per_row` images then, at the least. A missing view is grey, and
    no token reads it.
    """
    counts = [[tiles.tiles_of(pixels, cfg.vision) for pixels in row] for row in images]
    most = max(map(len, counts))
    counts = counts if image_rows is None else [counts[row] for row in image_rows]
    asked = list(zip(prompts, counts, strict=True))
    if length is None:
        length = max(len(prompt_row(cfg, tokenizer, *one)["tokens"]) for one in asked)
    elif cfg.fusion.has_images:
        most = max(most, cfg.data.images_per_row)
    rows = [prompt_row(cfg, tokenizer, *one, length) for one in asked]
    views = most * cfg.vision.views
    for row in rows:
        row["image_mask"] = _filled(row["image_mask"], 1, views)
    batch = Batch(**{name: np.stack([row[name] for row in rows]) for name in rows[0]})
    if not most:
        return batch
    pixels = np.stack([_filled(tiles.stacked(row, cfg.vision), 0, views) for row in images])
    own = None if image_rows is None else np.array(image_rows, np.int32)
    return packing.tiled(cfg, batch.replace(images=pixels, image_rows=own))


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
    prompts, owners = [question.question for question in asked], [readers.index(question.images) for question in shown]
    return prompt_batch(cfg, tokenizer, images, prompts, length, owners)


def _filled(x: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Zeros behind it, up to the size."""
    return np.pad(x, [(0, size - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])
