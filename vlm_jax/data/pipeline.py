"""Reads records or conversations into batches with Grain; batch k depends on `seed` and k alone."""

import functools
import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import grain
import numpy as np

from vlm_jax.config import ConfigError, Data, Experiment, Vision
from vlm_jax.data import batching, cuts, packing, sources, templates, text, tiling
from vlm_jax.data import images as image_files
from vlm_jax.data.builders.records import Record
from vlm_jax.data.conversations import Conversations, Selection
from vlm_jax.data.fields import Fields, without_scores
from vlm_jax.data.forms.record import IMAGE_PLACEHOLDER
from vlm_jax.data.tfds_vqa import TfdsVqa
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.structs import Batch

# Questions with answers whose tokens are cached: datasets made from templates repeat theirs.
CACHED_PAIRS = 1 << 16


class DecodedRecords:
    """Random access to records whose image is (H, W, 3) uint8 pixels, resized to its grid of tiles.

    The records read last are cached.
    """

    def __init__(self, records: sources.Records, vision: Vision):
        self.records = records
        self._vision = vision
        self._read = tiling.lru_cached(self._decode, vision)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        return self._read(index)

    def _decode(self, index: int) -> Record:
        record = self.records[index]
        name = f"the image of row {index} of {self.records.title}"
        image = image_files.decode(record.image, name, rgb_conversion=self._vision.rgb_conversion)
        return replace(record, image=tiling.resize_to_grid(image, self._vision))


def training_iterator(
    cfg: Experiment, tokenizer: Tokenizer, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator:
    """Yields endless `Batch`es of numpy arrays with B = train.batch_size / process_count rows.

    Every process draws every n-th row of one stream, so batch k of n processes has the same rows as
    batch k of one process. `get_state()` and `set_state()` continue exactly, also with another
    number of processes.

    Raises:
      ConfigError: the processes cannot share a batch equally, or the data cannot be used.
    """
    if cfg.train.batch_size % process_count:
        raise ConfigError(
            f"train.batch_size {cfg.train.batch_size} is not divisible by the {process_count} "
            "processes."
        )
    if cfg.data.is_conversations:
        source, _ = training_conversations(cfg, tokenizer)
        shard = slice(process_index, None, process_count)
        return iter(packing.batches(cfg, tokenizer, source, shard))
    rows = record_rows(cfg, tokenizer).repeat()
    return iter(_batches(cfg, rows, slice(process_index, None, process_count)))


def record_rows(cfg: Experiment, tokenizer: Tokenizer) -> grain.MapDataset:
    """Returns the rows of the first epoch of a dataset of records, with pixels as `images`."""
    records = DecodedRecords(sources.load(cfg.data, cfg.data.train_split), cfg.vision)
    return shuffled(cfg, records).random_map(_make_row_builder(cfg, tokenizer))


def validation_batches(
    cfg: Experiment, tokenizer: Tokenizer, process_index: int = 0, process_count: int = 1
) -> grain.IterDataset:
    """Batches of `training_iterator` of every question of `data.train_split` once, in order.

    The last batch is filled up with rows without a scored token.

    Raises:
      ConfigError: the data cannot be used.
    """
    shard = slice(process_index, None, process_count)
    if cfg.data.is_conversations:
        source, _ = training_conversations(cfg, tokenizer)
        return packing.validation_batches(cfg, tokenizer, source, shard)
    rows = grain.MapDataset.source(ValidationRows(cfg, tokenizer))
    return _batches(cfg, rows, shard)


class ValidationRows:
    """Rows of all questions of a split of records, as many as fill whole batches."""

    def __init__(self, cfg: Experiment, tokenizer: Tokenizer):
        self._cfg = cfg
        self._records = DecodedRecords(sources.load(cfg.data, cfg.data.train_split), cfg.vision)
        # The index of a record, and the tokens of the questions of a row.
        self._rows: list[tuple[int, list[text.Pair]]] = []
        for index, record in enumerate(self._records.records):
            pairs = zip(record.questions, record.answers, strict=True)
            encoded = [text.encode_pair(tokenizer, *pair) for pair in pairs]
            self._rows += [(index, row) for row in text.fill_rows(cfg, encoded)]

    def __len__(self) -> int:
        batch_size = self._cfg.train.batch_size
        return -(-len(self._rows) // batch_size) * batch_size

    def __getitem__(self, number: int) -> Fields:
        index, pairs = self._rows[min(number, len(self._rows) - 1)]
        pixels = self._records[index].image
        row = text.pack_row(self._cfg, pairs, tiling.count_tiles(pixels, self._cfg.vision))
        row = row if number < len(self._rows) else without_scores(row)
        return row | {"images": pixels}


def _batches(cfg: Experiment, rows: grain.MapDataset, shard: slice) -> grain.IterDataset:
    """Batches of the rows `shard` of each global batch of `train.batch_size` rows."""
    batches = rows[shard].batch(
        cfg.train.batch_size // shard.step,
        drop_remainder=True,
        batch_fn=functools.partial(_stack, cfg),
    )
    threads = cfg.data.threads
    options = grain.ReadOptions(threads, max(threads, cfg.data.prefetch))
    return batches.to_iter_dataset(options)


def shuffled(cfg: Experiment, source: Sequence) -> grain.MapDataset:
    """Returns the items of a source in the order of the first epoch."""
    return grain.MapDataset.source(source).seed(cfg.seed).shuffle()


def batch_ids(cfg: Experiment, tokenizer: Tokenizer, state: dict) -> list:
    """Returns the example ids in the global batch that follows iterator state `state`."""
    return list(itertools.chain(*row_ids(cfg, tokenizer, state)))


def row_ids(cfg: Experiment, tokenizer: Tokenizer, state: dict) -> list[list]:
    """Returns the example ids of each row of the global batch after iterator state `state`.

    They are the ids of conversations, or else of images.
    """
    if cfg.data.is_conversations:
        source, _ = training_conversations(cfg, tokenizer)
        return packing.row_ids(cfg, tokenizer, source, state)
    records = sources.load(cfg.data, cfg.data.train_split)
    order = shuffled(cfg, range(len(records))).repeat()
    first = state["next_index"] * cfg.train.batch_size
    rows = range(first, first + cfg.train.batch_size)
    return [[records[order[row]].image_id] for row in rows]


def _make_row_builder(
    cfg: Experiment, tokenizer: Tokenizer
) -> Callable[[Record, np.random.Generator], Fields]:
    sample = make_question_sampler(cfg, tokenizer)

    def build_row(record: Record, rng: np.random.Generator) -> Fields:
        pairs = sample(record, rng)
        pixels = image_files.augment(record.image, cfg.data.augment, rng)
        row = text.pack_row(cfg, pairs, tiling.count_tiles(pixels, cfg.vision))
        return row | {"images": pixels}

    return build_row


def make_question_sampler(
    cfg: Experiment, tokenizer: Tokenizer
) -> Callable[[Record, np.random.Generator], list[text.Pair]]:
    """Returns a function that draws at most `data.questions_per_row` questions of a record."""

    @functools.lru_cache(CACHED_PAIRS)
    def encode(question: str, answer: str) -> text.Pair:
        return text.encode_pair(tokenizer, question, answer)

    def sample(record: Record, rng: np.random.Generator) -> list[text.Pair]:
        indices = rng.permutation(len(record.questions))[: cfg.data.questions_per_row]
        return [encode(record.questions[i], record.answers[i]) for i in indices]

    return sample


def _stack(cfg: Experiment, rows: Sequence[Fields]) -> Batch:
    """Makes a batch of rows with one image each."""
    batch = Batch(**batching.stack_fields(rows, without="images"))
    images = [row["images"] for row in rows]
    if cfg.vision.keeps_aspect_in_tiles:
        pixels = {
            (row, 0): image_files.normalise(image, cfg.vision) for row, image in enumerate(images)
        }
        is_own = np.ones_like(batch.image_mask)
        return batching.stack_tiles(cfg, batch, pixels, (len(rows), 1), is_own)
    views = tiling.batch_views(images, cfg.vision)
    return batching.as_tiled_batch(cfg, batch.replace(images=views))


def conversation_source(data: Data, split: str) -> Conversations | TfdsVqa | Selection:
    """Returns random access to the conversations of a split and to their images."""
    return importlib.import_module(data.dataset.conversations).load(data, split)


def training_conversations(
    cfg: Experiment, tokenizer: Tokenizer
) -> tuple[Conversations | Selection, cuts.Cuts]:
    """Returns the conversations to train on, and what the length of a row cuts from them.

    Raises:
      ConfigError: no conversation is left, or one has more images than a row.
    """
    return _training_conversations(cfg, tokenizer, tuple(fingerprint(cfg.data).items()))


@functools.lru_cache(maxsize=8)  # of the training, and of the splits to validate on
def _training_conversations(cfg: Experiment, tokenizer: Tokenizer, contents: tuple):
    """Reads and tokenizes all texts once per process and `contents` of the files."""
    del contents  # a part of the cache's key
    source = conversation_source(cfg.data, cfg.data.train_split)
    packing.check_image_counts(cfg, source)
    templates.check_system_turns(cfg, source)
    return cuts.fit_rows(cfg, tokenizer, source)


def data_counts(cfg: Experiment, tokenizer: Tokenizer) -> dict[str, int]:
    """Returns `cuts.data_counts` of conversations, and nothing for other datasets."""
    if not cfg.data.is_conversations:
        return {}
    _, counts = training_conversations(cfg, tokenizer)
    return cuts.data_counts(cfg, counts)


def contents(cfg: Experiment, tokenizer: Tokenizer) -> dict[str, str]:
    """Returns the fingerprint of the data of a run: of its training and of its validation.

    For TFDS it has the SHA-256 of the training's texts, too.
    """
    identity = fingerprint(cfg.data)
    if cfg.data.is_conversations and not cfg.data.files:
        _, counts = training_conversations(cfg, tokenizer)
        identity[f"texts of {cfg.data.source}"] = counts.digest
    for split in cfg.eval.named_splits.values():
        identity |= fingerprint(cfg.validation_data(split))
    return identity


def fingerprint(data: Data) -> dict[str, str]:
    """Returns what identifies the contents of a dataset, independent of the folder it is in.

    For conversations of files it is the SHA-256 of each file; for other datasets name, version,
    configuration and sizes.
    """
    if data.is_conversations:
        return importlib.import_module(data.dataset.conversations).fingerprint(data)
    return sources.fingerprint(sources.builder(data).info, data)


def train_tokenizer(cfg: Experiment) -> Tokenizer:
    """Trains a tokenizer of at most decoder.vocab_size tokens on the training split."""
    tags = tiling.tag_names(cfg.vision) if cfg.tile_tags else ()
    return Tokenizer.train(_training_texts(cfg), cfg.decoder.vocab_size, tags)


def _training_texts(cfg: Experiment) -> Iterator[str]:
    if cfg.data.is_conversations:
        for conversation in conversation_source(cfg.data, cfg.data.train_split):
            for turn in (conversation.system or "", *conversation.turns):
                yield turn.replace(IMAGE_PLACEHOLDER, "")
    else:
        for record in sources.load(cfg.data, cfg.data.train_split):
            yield from record.questions
            yield from record.answers
