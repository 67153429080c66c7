"""Questions of a validation split that are also in the training data, about the same images."""

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from vlm_jax.config import Data
from vlm_jax.data import pipeline, sources

Digests = tuple[bytes, ...]  # SHA-256 of the encoded images


class Example(NamedTuple):
    """A question of a record, or the first question of a conversation with all its images."""

    question: str
    digests: Callable[[], Digests]  # reads the images


class Overlap(NamedTuple):
    """Questions of a validation split."""

    count: int  # also in the training data
    total: int


def count_overlaps(training: Data, splits: Mapping[str, Data]) -> dict[str, Overlap]:
    """Counts the questions of each named split that are also in the training data.

    Each split is the `train_split` of its data. Ids are not compared, because two files may use the
    same ones. Images of the training are read where a question is the same.
    """
    examples_of_split = {}
    for name, data in splits.items():
        examples = [(example.question, example.digests()) for example in read_examples(data)]
        examples_of_split[name] = examples
    questions = {question for examples in examples_of_split.values() for question, _ in examples}
    trained = set()
    for example in read_examples(training):
        if example.question in questions:
            trained.add((example.question, example.digests()))
    return {
        name: Overlap(sum(example in trained for example in examples), len(examples))
        for name, examples in examples_of_split.items()
    }


def read_examples(data: Data) -> Iterator[Example]:
    """Yields the questions of `data.train_split`, of every source."""
    for part in data.parts.values():
        if part.is_conversations:
            yield from _conversation_examples(part)
        else:
            yield from _record_examples(part)


def _record_examples(data: Data) -> Iterator[Example]:
    for record in sources.load(data, data.train_split):
        digest = hashlib.sha256(record.image).digest()
        for question in record.questions:
            yield Example(question, functools.partial(tuple, [digest]))


def _conversation_examples(data: Data) -> Iterator[Example]:
    source = pipeline.conversation_source(data, data.train_split)

    def digests(indices: Sequence[int]) -> Digests:
        return tuple(hashlib.sha256(source.image(index)[1]).digest() for index in indices)

    for conversation in source:
        yield Example(conversation.turns[0], functools.partial(digests, conversation.images))
