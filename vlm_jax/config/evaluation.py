"""The section `eval`: evaluation after the training and validation during it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Eval:
    split: str = "test"  # TFDS split to evaluate on; empty: no evaluation
    files: tuple[str, ...] = ()  # conversations: files to evaluate on instead of data.files
    source: str = ""  # name of a source of data.mixture to evaluate on; empty: all of them
    max_examples: int | None = None  # maximum number of examples to evaluate; None: all
    batch_size: int = 256  # number of questions in a batch
    max_new_tokens: int = 8  # maximum length of an answer in tokens
    #: rows of METRICS in infer/metrics/table.py, such as vqa_accuracy or anls
    metrics: tuple[str, ...] = ("exact_match",)
    #: conversations: questions to ask; all: each after the true turns before it
    turns: Literal["first", "all"] = "first"
    every_steps: int | None = None  # steps between validations on `splits`; None: no validation
    #: splits to validate on while training, each NAME=SPLIT, such as val=train[90%:] (a split of
    #: `files` if set), or NAME=FILE for conversations
    splits: tuple[str, ...] = ()
    #: first questions of each split that a validation answers and scores; 0: loss alone
    during_examples: int = 500

    @property
    def named_splits(self) -> dict[str, str]:
        """Name -> split or file, of `splits`."""
        pairs = [entry.partition("=") for entry in self.splits]
        return {name: split or name for name, _, split in pairs}

    @property
    def read_split(self) -> str:
        """The split to evaluate on: all of `files` unless `split` is a slice of 'train'.

        Empty: no evaluation.
        """
        if self.files and self.split in ("", Eval.split):
            return "train"
        return self.split

    @property
    def title(self) -> str:
        """The evaluated data, for messages."""
        return f"{self.read_split} of {', '.join(self.files)}" if self.files else self.read_split
