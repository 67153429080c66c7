"""Checkpoints whose images keep their shape."""

import sys
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers
from transformers import (
    FuyuConfig,
    FuyuForCausalLM,
    FuyuProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralImageProcessorPil,
    PixtralVisionConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    TokenizersBackend,
)
from transformers.models.pixtral import image_processing_pil_pixtral

from tests.hub import tiny_tokenizers
from tests.hub.tiny_checkpoints.common import TEXT, Folder, WithoutVideos, finish, load_tokenizer
from tests.hub.tiny_checkpoints.templates import MISTRAL3_CHAT, QWEN2_VL_CHAT


class Qwen2_5_VLProcessor(WithoutVideos, transformers.Qwen2_5_VLProcessor):
    pass


class Qwen3VLProcessor(WithoutVideos, transformers.Qwen3VLProcessor):
    pass


def qwen2_5_vl(path: Path) -> Folder:
    tokenizer = load_tokenizer(path, tiny_tokenizers.qwen2_vl)
    images = Qwen2VLImageProcessorPil(
        patch_size=4, size={"shortest_edge": 256, "longest_edge": 2048}
    )
    rope = {"rope_type": "default", "rope_theta": 500.0, "mrope_section": [2, 1, 1]}
    vision = {
        "depth": 2,
        "num_heads": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "out_hidden_size": 32,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=TEXT | {"vocab_size": len(tokenizer), "rope_parameters": rope},
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
    )
    return finish(
        Qwen2_5_VLForConditionalGeneration(config),
        Qwen2_5_VLProcessor(images, tokenizer),
        path,
        QWEN2_VL_CHAT,
    )


def qwen3_vl(path: Path) -> Folder:
    tokenizer = load_tokenizer(path, tiny_tokenizers.qwen2_vl)
    images = Qwen2VLImageProcessorPil(
        patch_size=4,
        size={"shortest_edge": 256, "longest_edge": 2048},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    rope = {"rope_type": "default", "rope_theta": 500.0, "mrope_section": [2, 1, 1]}
    vision = {
        "depth": 2,
        "num_heads": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "out_hidden_size": 32,
        "patch_size": 4,
        "num_position_embeddings": 25,
        "deepstack_visual_indexes": [0],
    }
    text = TEXT | {"head_dim": 8, "vocab_size": len(tokenizer), "rope_parameters": rope}
    config = Qwen3VLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
    )
    return finish(
        Qwen3VLForConditionalGeneration(config),
        Qwen3VLProcessor(images, tokenizer),
        path,
        QWEN2_VL_CHAT,
    )


def _pixtral(path: Path, model, config, merged_side: int, **settings) -> Folder:
    # The processor imports a function of the backend that needs torchvision; Pillow's has it, too.
    module = "transformers.models.pixtral.image_processing_pixtral"
    sys.modules.setdefault(module, image_processing_pil_pixtral)
    from transformers.models.pixtral.processing_pixtral import PixtralProcessor

    tokenizer = load_tokenizer(path, tiny_tokenizers.mistral3)
    images = PixtralImageProcessorPil(size={"longest_edge": 64}, patch_size=4)
    reader = PixtralProcessor(images, tokenizer, patch_size=4, spatial_merge_size=merged_side)
    vision = PixtralVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=64,
        patch_size=4,
        rope_parameters={"rope_type": "axial", "rope_theta": 100.0},
    )
    text = MistralConfig(**TEXT, vocab_size=len(tokenizer), sliding_window=None, rms_norm_eps=1e-5)
    image = tokenizer.convert_tokens_to_ids("[IMG]")
    whole = config(
        vision_config=vision,
        text_config=text,
        image_token_index=image,
        tie_word_embeddings=False,
        **settings,
    )
    return finish(model(whole), reader, path, MISTRAL3_CHAT)


def mistral3(path: Path) -> Folder:
    return _pixtral(path, Mistral3ForConditionalGeneration, Mistral3Config, 2)


def pixtral(path: Path) -> Folder:
    features = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    return _pixtral(path, LlavaForConditionalGeneration, LlavaConfig, 1, **features)


class FuyuImageProcessorPil(transformers.FuyuImageProcessorPil):
    def patchify_image(self, image, patch_size=None):
        """The processor hands tensors over, which the Pillow backend does not take."""
        return torch.from_numpy(super().patchify_image(image.numpy(), patch_size))


def fuyu_processor() -> FuyuProcessor:
    """Patch tokens are pieces of the vocabulary, and every text starts with a space."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "|SPEAKER|",
        "|NEWLINE|",
    ]
    words = ["▁", *"abcdefghijklmnopqrst", "is", "at", "▁cat", "▁what"]
    scored = [(piece, 0.0) for piece in pieces] + [(word, -5.0) for word in words]
    backend = Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer = TokenizersBackend(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    images = FuyuImageProcessorPil(
        size={"height": 36, "width": 48}, patch_size={"height": 6, "width": 6}
    )
    return FuyuProcessor(images, tokenizer)


def fuyu(path: Path) -> Folder:
    processor = fuyu_processor()
    text = {**TEXT, "num_key_value_heads": 4, "vocab_size": 300}
    image = processor.tokenizer.convert_tokens_to_ids("|SPEAKER|")
    config = FuyuConfig(text_config=text, patch_size=6, image_size=48, image_token_id=image)
    return finish(FuyuForCausalLM(config), processor, path)
