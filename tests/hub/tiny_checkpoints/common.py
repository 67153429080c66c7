"""Sizes of the tiny models, and how a checkpoint folder is saved."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoTokenizer

from tests.hub.parity import randomized

TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
TOWER = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "image_size": 28,
    "patch_size": 7,
}


class WithoutVideos:
    """A processor without its processor of videos, which needs torchvision."""

    @classmethod
    def get_attributes(cls):
        return ["image_processor", "tokenizer"]


class Folder(NamedTuple):
    """A saved checkpoint; `reader` is transformers' processor, or its tokenizer without images."""

    path: Path
    model: torch.nn.Module
    reader: object

    @property
    def tokenizer(self):
        return getattr(self.reader, "tokenizer", self.reader)

    def answer(self, new_tokens: int, **inputs) -> str:
        """Returns transformers' greedy answer."""
        ids = self.model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)[0]
        skipped = 0 if "input_ids" not in inputs else inputs["input_ids"].shape[1]
        return self.tokenizer.decode(ids[skipped:], skip_special_tokens=True)


def finish(model: torch.nn.Module, reader, path: Path, template: str | None = None) -> Folder:
    if template:
        reader.chat_template = template
    reader.save_pretrained(path)
    model.generation_config.eos_token_id = None
    randomized(model)
    _silence_bytes(model, getattr(reader, "tokenizer", reader))
    model.save_pretrained(path)
    return Folder(path, model, reader)


def _silence_bytes(model: torch.nn.Module, tokenizer) -> None:
    """Makes tokens that are parts of a character unlikely: their text depends on what follows."""
    parts = [i for i in range(len(tokenizer)) if "\ufffd" in tokenizer.decode([i])]
    with torch.no_grad():
        head = getattr(model, "decoder", model).get_output_embeddings()
        head.weight[parts] = 0


def load_tokenizer(path: Path, build: Callable, **options):
    build(path, **options)
    return AutoTokenizer.from_pretrained(path)
