"""Records -> batches, with Grain: what comes next is a function of `seed` and of the step alone."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import grain
import numpy as np

from vlm_jax.config import (
    ConfigError,
    Data,
    Experiment,
    Vision,
)
from vlm_jax.data import (
    conversation_files,
    conversations,
    cuts,
    packing,
    sources,
    text,
    tfds_vqa,
    tiling,
)
from vlm_jax.data import images as image_files
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.structs import Batch

CACHED_PAIRS = (
    1 << 16
)  # questions with answers whose tokens are kept: data sets from templates repeat theirs


class DecodedRecords:
    """Random access to records whose image is pixels, (H, W, 3) uint8, laid out in tiles.

    Those read last stay in memory.
    """

    def __init__(self, records: sources.Records, vision: Vision):
        self.records = records
        self._vision = vision
        self._read = tiling.lru_cached(self._decode, vision)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> sources.Record:
        return self._read(index)

    def _decode(self, index: int) -> sources.Record:
        record = self.records[index]
        name = f"the image of row {index} of {self.records.title}"
        image = image_files.decode(record.image, name)
        return replace(record, image=tiling.resize_to_grid(image, self._vision))


def training_iterator(
    cfg: Experiment, tokenizer: Tokenizer, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator:
    """Endless `Batch`es of numpy arrays with B = train.batch_size / process_count rows.

    `get_state()` and `set_state()` continue exactly, with another number of processes, too: every process draws every
    n-th row of one stream, so batch k of n processes holds together the rows of batch k of one process.
    """
    if cfg.train.batch_size % process_count:
        raise ConfigError(
            f"train.batch_size {cfg.train.batch_size} is no multiple of the {process_count} processes"
        )
    if cfg.data.is_conversations:
        source, _ = training_conversations(cfg, tokenizer)
        return iter(
            packing.batches(cfg, tokenizer, source, slice(process_index, None, process_count))
        )
    records = DecodedRecords(sources.load(cfg.data, cfg.data.train_split), cfg.vision)
    rows = _shuffled(cfg, records).random_map(_make_row_builder(cfg, tokenizer)).repeat()
    batches = rows[process_index::process_count].batch(
        cfg.train.batch_size // process_count,
        drop_remainder=True,
        batch_fn=functools.partial(_stack, cfg),
    )
    threads = cfg.data.threads
    return iter(
        batches.to_iter_dataset(grain.ReadOptions(threads, max(threads, cfg.data.prefetch)))
    )


def _shuffled(cfg: Experiment, source: Sequence) -> grain.MapDataset:
    return grain.MapDataset.source(source).seed(cfg.seed).shuffle()


def batch_ids(cfg: Experiment, tokenizer: Tokenizer, state: dict) -> list:
    """Ids of what is in the batch, of all processes, that `training_iterator` gives after its state was `state`.

    Of conversations, or else of images.
    """
    if cfg.data.is_conversations:
        return packing.batch_ids(cfg, tokenizer, training_conversations(cfg, tokenizer)[0], state)
    records = sources.load(cfg.data, cfg.data.train_split)
    order, first = (
        _shuffled(cfg, range(len(records))).repeat(),
        state["next_index"] * cfg.train.batch_size,
    )
    return [records[order[row]].image_id for row in range(first, first + cfg.train.batch_size)]


def _make_row_builder(cfg: Experiment, tokenizer: Tokenizer) -> Callable:
    choose = make_question_sampler(cfg, tokenizer)

    def row(record: sources.Record, rng: np.random.Generator) -> dict[str, np.ndarray]:
        pairs = choose(record, rng)
        pixels = image_files.augment(record.image, cfg.data.augment, rng)
        packed = text.pack_row(cfg, pairs, tiling.count_tiles(pixels, cfg.vision))
        return packed | {"images": pixels}

    return row


def make_question_sampler(
    cfg: Experiment, tokenizer: Tokenizer
) -> Callable[[sources.Record, np.random.Generator], list[text.Pair]]:
    """A record and a generator -> the questions that are chosen for a row, with their answers."""

    @functools.lru_cache(CACHED_PAIRS)
    def encode(question: str, answer: str) -> text.Pair:
        return text.prompt_ids(tokenizer, question), text.answer_ids(tokenizer, answer)

    def choose(record: sources.Record, rng: np.random.Generator) -> list[text.Pair]:
        chosen = rng.permutation(len(record.questions))[: cfg.data.questions_per_row]
        return [encode(record.questions[i], record.answers[i]) for i in chosen]

    return choose


def _stack(cfg: Experiment, rows: Sequence[dict[str, np.ndarray]]) -> Batch:
    stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0] if name != "images"}
    if cfg.vision.keeps_aspect_in_tiles:
        placed = {
            (row, 0): image_files.normalise(fields["images"], cfg.vision)
            for row, fields in enumerate(rows)
        }
        own = np.ones_like(stacked["image_mask"])
        return packing.stack_tiles(cfg, Batch(**stacked), placed, (len(rows), 1), own)
    images = tiling.batch_views([row["images"] for row in rows], cfg.vision)
    return packing.as_tiled_batch(cfg, Batch(**stacked, images=images))


def conversation_source(data: Data, split: str) -> conversations.Conversations | tfds_vqa.TfdsVqa:
    """Random access to the conversations of a split, and to their images."""
    return (conversations if data.source == "conversations" else tfds_vqa).load(data, split)


def training_conversations(
    cfg: Experiment, tokenizer: Tokenizer
) -> tuple[conversations.Conversations | conversations.Selection, cuts.Cuts]:
    """Returns the conversations that are learned from, and what the length of a row cuts.

    Raises:
      ConfigError: there are none, or one has more images than a row.
    """
    return _training_conversations(cfg, tokenizer, tuple(fingerprint(cfg.data).items()))


@functools.lru_cache(maxsize=1)
def _training_conversations(cfg: Experiment, tokenizer: Tokenizer, contents: tuple):
    """Reads and tokenizes all texts once per process; other `contents` are other texts."""
    del contents
    source = conversation_source(cfg.data, cfg.data.train_split)
    packing.check_image_counts(cfg, source)
    return cuts.drop_unscored(cfg, tokenizer, source)


def contents(cfg: Experiment, tokenizer: Tokenizer) -> dict[str, str]:
    """Returns the fingerprint of the data that is learned from; of a TFDS set it has the SHA-256 of the texts, too."""
    found = fingerprint(cfg.data)
    if cfg.data.source.startswith("tfds:"):
        found[f"texts of {cfg.data.source}"] = training_conversations(cfg, tokenizer)[1].digest
    return found


def fingerprint(data: Data) -> dict[str, str]:
    """Returns what identifies the contents of a dataset, whatever folder it is prepared in.

    Of conversations, the SHA-256 of each file; of other datasets, the name, version, configuration and size.
    """
    if data.source == "conversations":
        return {file: conversations.file_digest(file).hex() for file in data.files}
    info = (tfds_vqa if data.is_conversations else sources).builder(data).info
    sizes = {
        f"{info.name}, split {name}": str(split.num_examples) for name, split in info.splits.items()
    }
    return {data.source: info.full_name} | sizes


def train_tokenizer(cfg: Experiment) -> Tokenizer:
    """A tokenizer for what is said in the training split, of at most decoder.vocab_size tokens."""
    if cfg.data.is_conversations:
        talks = conversation_source(cfg.data, cfg.data.train_split)
        texts = (
            turn.replace(conversation_files.IMAGE_PLACEHOLDER, "")
            for talk in talks
            for turn in talk.turns
        )
    else:
        records = sources.load(cfg.data, cfg.data.train_split)
        texts = (line for record in records for line in record.questions + record.answers)
    return Tokenizer.train(
        texts, cfg.decoder.vocab_size, tiling.tag_names(cfg.vision) if cfg.tile_tags else ()
    )
