"""A Git LFS pointer is reported for every file of a checkpoint or of a dataset."""

import pytest
import torch

from tests.hub import tiny_checkpoints, tiny_tokenizers
from vlm_jax.config import UserError
from vlm_jax.data import images
from vlm_jax.data.forms.files import read_files
from vlm_jax.hub.load import inspect
from vlm_jax.hub.processor import HubProcessor
from vlm_jax.hub.tensors.folder import open_tensors
from vlm_jax.hub.text.tokenizer import HubTokenizer
from vlm_jax.testing import write_conversations

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0f' * 32}\nsize 17525357\n"


def refused(path, load) -> None:
    content = path.read_bytes()
    path.write_text(POINTER)
    with pytest.raises(UserError, match=f"^{path} is a Git LFS pointer, .* `git lfs pull`.$"):
        load()
    path.write_bytes(content)


def test_every_file_of_a_checkpoint(tmp_path):
    torch.manual_seed(0)
    tiny_checkpoints.llava(tmp_path)

    def load():
        with open_tensors(tmp_path) as tensors:
            HubProcessor.load(inspect(tmp_path, tensors))

    for path in tmp_path.iterdir():
        if path.name not in (
            "tokenizer.model",
            "added_tokens.json",
        ):  # not read beside tokenizer.json
            refused(path, load)
    load()


@pytest.mark.parametrize("kind", ["gpt2", "gpt2_with_older_files", "llama_legacy"])
def test_every_file_of_a_tokenizer_without_tokenizer_json(tmp_path, kind):
    getattr(tiny_tokenizers, kind)(tmp_path)
    for path in tmp_path.iterdir():
        refused(path, lambda: HubTokenizer.load(tmp_path))


def test_conversations_and_images(tmp_path):
    data = write_conversations(tmp_path, count=3)
    refused(tmp_path / "talks.json", lambda: list(read_files(data.files)))
    refused(tmp_path / "1_0.jpg", lambda: images.read_image(tmp_path / "1_0.jpg"))
