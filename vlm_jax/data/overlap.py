"""Questions of a validation split that are also in the training data, about the same images."""

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from vlm_jax.config import Data
from vlm_jax.data import pipeline, sources

Digests = tuple[bytes, ...]  # SHA-256 of the encoded images


class Example(NamedTuple):
    """A question of a record, or the first question of a conversation with all its images."""

    question: str
    digests: Callable[[], Digests]  # reads the images


def count_overlap(training: Data, validation: Data) -> tuple[int, int]:
    """Returns the number of questions of a validation split that are in the training, and of all.

    Both splits are `data.train_split`. Ids are not compared, because two files may use the same
    ones. Images of the training are read where a question is the same.
    """
    examples = [(example.question, example.digests()) for example in read_examples(validation)]
    questions = {question for question, _ in examples}
    trained = set()
    for example in read_examples(training):
        if example.question in questions:
            trained.add((example.question, example.digests()))
    return sum(example in trained for example in examples), len(examples)


def read_examples(data: Data) -> Iterator[Example]:
    """Yields the questions of `data.train_split`."""
    if data.is_conversations:
        yield from _conversation_examples(data)
    else:
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
