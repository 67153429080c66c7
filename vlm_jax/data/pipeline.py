"""Reads records or conversations into batches with Grain; batch k depends on `seed` and k alone.

Without `data.mixture` there is one source of examples, without a name.
"""

import functools
import importlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import grain
import numpy as np

from vlm_jax.config import ConfigError, Data, Experiment, Vision, naming_source
from vlm_jax.data import batching, cuts, native, packing, sources, templates, text, tiling
from vlm_jax.data import images as image_files
from vlm_jax.data.builders.records import Record
from vlm_jax.data.conversations import Conversations, Selection
from vlm_jax.data.fields import Fields, without_scores
from vlm_jax.data.forms.record import IMAGE_PLACEHOLDER
from vlm_jax.data.mixture import Part, mix, read_parts
from vlm_jax.data.tfds_vqa import TfdsVqa
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.structs import ONE_SEGMENT, Batch

# Questions with answers whose tokens are cached: datasets made from templates repeat theirs.
CACHED_PAIRS = 1 << 16


class DecodedRecords:
    """Random access to records whose image is (H, W, 3) uint8 pixels, resized to its grid of tiles.

    The records read last are cached.

    Args:
      caches: number of caches that share the memory for one.
    """

    def __init__(self, records: sources.Records, vision: Vision, caches: int = 1):
        self.records = records
        self._vision = vision
        self._read = tiling.lru_cached(self._decode, vision, caches)

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

    Every process draws its part of each batch of one stream, consecutive rows, so batch k of n
    processes is batch k of one process. `get_state()` and `set_state()` continue exactly, also with
    another number of processes.

    Raises:
      ConfigError: the processes cannot share a batch equally, or the data cannot be used.
    """
    own = _own_rows(cfg, process_index, process_count)
    if cfg.data.is_conversations:
        return iter(packing.batches(cfg, tokenizer, conversation_parts(cfg, tokenizer), own))
    parts = record_parts(cfg)
    rows = mix(cfg, [record_rows(tokenizer, part, len(parts)) for part in parts])
    return iter(_batches(cfg, rows, own))


def _own_rows(cfg: Experiment, process_index: int, process_count: int) -> slice:
    """Returns the rows of each global batch that a process draws.

    Raises:
      ConfigError: the processes cannot share a batch equally.
    """
    count, remainder = divmod(cfg.train.batch_size, process_count)
    if remainder:
        raise ConfigError(
            f"train.batch_size {cfg.train.batch_size} is not divisible by the {process_count} "
            "processes."
        )
    return slice(process_index * count, (process_index + 1) * count)


def record_parts(cfg: Experiment) -> list[Part]:
    """Returns the records to train on, of each source."""
    return read_parts(cfg, lambda part: sources.load(part.data, part.data.train_split))


def record_rows(tokenizer: Tokenizer, part: Part, caches: int = 1) -> grain.MapDataset:
    """Returns the rows of the first epoch of a source of records, with pixels as `images`."""
    decoded = DecodedRecords(part.examples, part.cfg.vision, caches)
    return part.shuffled(decoded).random_map(_make_row_builder(tokenizer, part))


def validation_batches(
    cfg: Experiment, tokenizer: Tokenizer, process_index: int = 0, process_count: int = 1
) -> grain.IterDataset:
    """Batches of `training_iterator` of every question of `data.train_split` once, in order.

    The last batch is filled up with rows without a scored token.

    Raises:
      ConfigError: the data cannot be used.
    """
    own = _own_rows(cfg, process_index, process_count)
    if cfg.data.is_conversations:
        parts = conversation_parts(cfg, tokenizer)
        return packing.validation_batches(cfg, tokenizer, parts, own)
    rows = grain.MapDataset.source(ValidationRows(cfg, tokenizer))
    return _batches(cfg, rows, own)


class ValidationRows:
    """Rows of all questions of a split of records, as many as fill whole batches."""

    def __init__(self, cfg: Experiment, tokenizer: Tokenizer):
        self._cfg = cfg
        self._parts = record_parts(cfg)
        self._decoded = [
            DecodedRecords(part.examples, cfg.vision, len(self._parts)) for part in self._parts
        ]
        # The number of a source, the index of a record, and the tokens of the questions of a row.
        self._rows: list[tuple[int, int, list[text.Pair]]] = []
        for part in self._parts:
            for index, record in enumerate(part.examples):
                pairs = zip(record.questions, record.answers, strict=True)
                encoded = [text.encode_pair(tokenizer, *pair) for pair in pairs]
                for row in text.fill_rows(cfg, encoded):
                    self._rows.append((part.number, index, row))

    def __len__(self) -> int:
        batch_size = self._cfg.train.batch_size
        return -(-len(self._rows) // batch_size) * batch_size

    def __getitem__(self, number: int) -> Fields:
        source, index, pairs = self._rows[min(number, len(self._rows) - 1)]
        pixels = self._decoded[source][index].image
        row = text.pack_row(self._cfg, pairs, tiling.describe_tiles(pixels, self._cfg.vision))
        row = self._parts[source].tagged(row)
        row = row if number < len(self._rows) else without_scores(row)
        return row | {"images": pixels}


class OwnRows:
    """Grain's selection of the rows `own` of each `batch_size` rows of one dataset."""

    def __init__(self, length: int, batch_size: int, own: slice):
        self._length, self._batch_size, self._own = length, batch_size, own

    @property
    def _count(self) -> int:
        return self._own.stop - self._own.start

    def __len__(self) -> int:
        return self._length // self._batch_size * self._count

    def __getitem__(self, index: int) -> tuple[int, int]:
        batch, row = divmod(index, self._count)
        return 0, batch * self._batch_size + self._own.start + row


def _batches(cfg: Experiment, rows: grain.MapDataset, own: slice) -> grain.IterDataset:
    """Batches of the rows `own` of each global batch of `train.batch_size` rows."""
    selection = OwnRows(len(rows), cfg.train.batch_size, own)
    batches = grain.MapDataset.select_from_datasets([rows], selection).batch(
        own.stop - own.start,
        drop_remainder=True,
        batch_fn=functools.partial(_stack, cfg),
    )
    threads = cfg.data.threads
    options = grain.ReadOptions(threads, max(threads, cfg.data.prefetch))
    return batches.to_iter_dataset(options)


def batch_ids(cfg: Experiment, tokenizer: Tokenizer, state: dict) -> list:
    """Returns the example ids in the global batch that follows iterator state `state`."""
    return list(itertools.chain(*row_ids(cfg, tokenizer, state)))


def row_ids(cfg: Experiment, tokenizer: Tokenizer, state: dict) -> list[list]:
    """Returns the example ids of each row of the global batch after iterator state `state`.

    They are the ids of conversations, or else of images.
    """
    if cfg.data.is_conversations:
        return packing.row_ids(cfg, tokenizer, conversation_parts(cfg, tokenizer), state)
    ids = mix(cfg, [part.shuffled().map(_make_labeler(part)) for part in record_parts(cfg)])
    first = state["next_index"] * cfg.train.batch_size
    return [[ids[row]] for row in range(first, first + cfg.train.batch_size)]


def _make_labeler(part: Part) -> Callable[[Record], int | str]:
    return lambda record: part.label(record.image_id)


def _make_row_builder(
    tokenizer: Tokenizer, part: Part
) -> Callable[[Record, np.random.Generator], Fields]:
    cfg = part.cfg
    sample = make_question_sampler(cfg, tokenizer)

    def build_row(record: Record, rng: np.random.Generator) -> Fields:
        pairs = sample(record, rng)
        pixels = image_files.augment(record.image, cfg.data.augment, rng)
        row = text.pack_row(cfg, pairs, tiling.describe_tiles(pixels, cfg.vision))
        return part.tagged(row) | {"images": pixels}

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
    batch = Batch(
        **batching.stack_fields(rows, without="images"), layout=batching.row_layout(cfg.data)
    )
    if batch.layout == ONE_SEGMENT:
        # The only branch continues the trunk: attention is causal in the whole row.
        batch = batch.replace(branch_ids=None)
    images = [row["images"] for row in rows]
    if cfg.vision.keeps_aspect_in_tiles:
        pixels = {
            (row, 0): image_files.normalize(image, cfg.vision) for row, image in enumerate(images)
        }
        is_own = np.ones_like(batch.image_mask)
        return batching.stack_tiles(cfg, batch, pixels, (len(rows), 1), is_own)
    if cfg.vision.is_native:
        pixels = [[image_files.normalize(image, cfg.vision)] for image in images]
        packed = native.pack_images(pixels, cfg.vision, cfg.patches_per_row)
        return batch.replace(**packed._asdict())
    views = tiling.batch_views(images, cfg.vision)
    tiles = {(row, 0): tiling.describe_tiles(image, cfg.vision) for row, image in enumerate(images)}
    memory = batching.map_memory(cfg, tiles, (len(rows), 1))
    return batching.as_tiled_batch(cfg, batch.replace(images=views, map_memory=memory))


def conversation_source(data: Data, split: str) -> Conversations | TfdsVqa | Selection:
    """Returns random access to the conversations of a split and to their images."""
    return importlib.import_module(data.dataset.conversations).load(data, split)


def conversation_parts(cfg: Experiment, tokenizer: Tokenizer) -> list[Part]:
    """Returns the conversations to train on, of each source."""
    return read_parts(cfg, lambda part: training_conversations(part, tokenizer)[0])


def conversation_cuts(cfg: Experiment, tokenizer: Tokenizer) -> dict[str, cuts.Cuts]:
    """Returns what the length of a row cuts from the conversations of each source, by its name."""
    return {name: training_conversations(part, tokenizer)[1] for name, part in cfg.parts.items()}


def training_conversations(
    cfg: Experiment, tokenizer: Tokenizer
) -> tuple[Conversations | Selection, cuts.Cuts]:
    """Returns the conversations to train on, and what the length of a row cuts from them.

    `cfg` has no mixture: it is one of `Experiment.parts`.

    Raises:
      ConfigError: no conversation is left, or one has more images than a row.
    """
    return _training_conversations(cfg, tokenizer, tuple(fingerprint(cfg.data).items()))


@functools.lru_cache(maxsize=64)  # sources of the training, and of the splits to validate on
def _training_conversations(cfg: Experiment, tokenizer: Tokenizer, contents: tuple):
    """Reads and tokenizes all texts once per process and `contents` of the files."""
    del contents  # a part of the cache's key
    source = conversation_source(cfg.data, cfg.data.train_split)
    packing.check_image_counts(cfg, source)
    templates.check_system_turns(cfg, source)
    return cuts.fit_rows(cfg, tokenizer, source)


def mixture_counts(cfg: Experiment, tokenizer: Tokenizer) -> dict[str, tuple[int, float]]:
    """Returns the number of examples of each source of the mixture, and its share of the stream."""
    if not cfg.data.mixture:
        return {}
    is_packed = cfg.data.is_conversations
    parts = conversation_parts(cfg, tokenizer) if is_packed else record_parts(cfg)
    counts = [len(part.examples) for part in parts]
    shares = cfg.data.mixture_shares(counts)
    numbers = zip(counts, shares, strict=True)
    return {part.name: number for part, number in zip(parts, numbers, strict=True)}


def data_counts(cfg: Experiment, tokenizer: Tokenizer) -> dict[str, int]:
    """Returns `cuts.data_counts` of conversations, and nothing for other datasets."""
    if not cfg.data.is_conversations:
        return {}
    total = Counter()
    for counts in conversation_cuts(cfg, tokenizer).values():
        total.update(cuts.data_counts(cfg, counts))
    return dict(total)


def contents(cfg: Experiment, tokenizer: Tokenizer) -> dict[str, str]:
    """Returns the fingerprint of the data of a run: of its training and of its validation.

    For TFDS it has the SHA-256 of the training's texts, too.
    """
    identity = fingerprint(cfg.data)
    for name, part in cfg.parts.items():
        if part.data.is_conversations and not part.data.files:
            _, counts = training_conversations(part, tokenizer)
            source = f"{part.data.source} ({name})" if name else part.data.source
            identity[f"texts of {source}"] = counts.digest
    for split in cfg.eval.named_splits.values():
        identity |= fingerprint(cfg.validation_data(split))
    return identity


def fingerprint(data: Data) -> dict[str, str]:
    """Returns what identifies the contents of a dataset, independent of the folder it is in.

    For conversations of files it is the SHA-256 of each file; for other datasets name, version,
    configuration and sizes.
    """
    identity = {}
    for name, part in data.parts.items():
        with naming_source(name):
            identity |= _fingerprint(part)
    return identity


def _fingerprint(data: Data) -> dict[str, str]:
    if data.is_conversations:
        return importlib.import_module(data.dataset.conversations).fingerprint(data)
    return sources.fingerprint(sources.builder(data).info, data)


def train_tokenizer(cfg: Experiment) -> Tokenizer:
    """Trains a tokenizer of at most decoder.vocab_size tokens on the training split."""
    tags = tiling.tag_names(cfg.vision) if cfg.tile_tags else ()
    texts = itertools.chain(*map(_training_texts, cfg.data.parts.items()))
    return Tokenizer.train(texts, cfg.decoder.vocab_size, tags)


def _training_texts(named_part: tuple[str, Data]) -> Iterator[str]:
    name, data = named_part
    with naming_source(name):
        if data.is_conversations:
            for conversation in conversation_source(data, data.train_split):
                for turn in (conversation.system or "", *conversation.turns):
                    yield turn.replace(IMAGE_PLACEHOLDER, "")
        else:
            for record in sources.load(data, data.train_split):
                yield from record.questions
                yield from record.answers
