"""Checkpoints without images."""

from pathlib import Path

from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.hub import tiny_tokenizers
from tests.hub.tiny_checkpoints.common import TEXT, Folder, finish, load_tokenizer
from tests.hub.tiny_checkpoints.templates import LLAMA_CHAT, MISTRAL_CHAT, QWEN3_CHAT


def llama(path: Path, template: str = LLAMA_CHAT) -> Folder:
    tokenizer = load_tokenizer(path, tiny_tokenizers.llama3)
    model = LlamaForCausalLM(LlamaConfig(**TEXT, vocab_size=len(tokenizer)))
    return finish(model, tokenizer, path, template)


def mistral_chat(path: Path) -> Folder:
    tokenizer = load_tokenizer(path, tiny_tokenizers.llama)
    model = LlamaForCausalLM(LlamaConfig(**TEXT, vocab_size=len(tokenizer)))
    return finish(model, tokenizer, path, MISTRAL_CHAT)


def zephyr_chat(path: Path) -> Folder:
    """A tokenizer that writes bos, and a template that does not."""
    tokenizer = load_tokenizer(path, tiny_tokenizers.llama)
    model = LlamaForCausalLM(LlamaConfig(**TEXT, vocab_size=len(tokenizer)))
    return finish(
        model, tokenizer, path, "{% for m in messages %}User: {{ m['content'] }}</s>\n{% endfor %}"
    )


def gemma(path: Path) -> Folder:
    tokenizer = load_tokenizer(path, tiny_tokenizers.gemma)
    model = GemmaForCausalLM(GemmaConfig(**TEXT, head_dim=16, vocab_size=len(tokenizer)))
    return finish(model, tokenizer, path)


def qwen3(path: Path) -> Folder:
    tokenizer = load_tokenizer(path, tiny_tokenizers.qwen3)
    model = Qwen3ForCausalLM(Qwen3Config(**TEXT, head_dim=16, vocab_size=len(tokenizer)))
    return finish(model, tokenizer, path, QWEN3_CHAT)
