"""Checkpoints whose images are tiles in the decoder's sequence."""

from pathlib import Path

import transformers
from transformers import (
    CLIPVisionConfig,
    GotOcr2ImageProcessorPil,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from tests.hub import tiny_tokenizers
from tests.hub.tiny_checkpoints.common import (
    TEXT,
    TOWER,
    Folder,
    WithoutVideos,
    finish,
    load_tokenizer,
)
from tests.hub.tiny_checkpoints.templates import (
    IDEFICS3_CHAT,
    INTERNVL_CHAT,
    LLAVA_CHAT,
    ONEVISION_CHAT,
)


def llava_next(path: Path) -> Folder:
    tokenizer = load_tokenizer(path, tiny_tokenizers.llama)
    pinpoints = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        image_grid_pinpoints=pinpoints,
    )
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=MistralConfig(**TEXT, vocab_size=len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
    )
    options = {
        "patch_size": 7,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    return finish(
        LlavaNextForConditionalGeneration(config),
        LlavaNextProcessor(images, tokenizer, **options),
        path,
        LLAVA_CHAT,
    )


class LlavaOnevisionProcessor(WithoutVideos, transformers.LlavaOnevisionProcessor):
    pass


def llava_onevision(path: Path) -> Folder:
    tokenizer = load_tokenizer(path, tiny_tokenizers.qwen3)
    # Maps of three tiles and more are resized.
    options = {"vision_aspect_ratio": "anyres_max_2", "vision_feature_select_strategy": "full"}
    pinpoints = [[height, width] for height in (28, 56, 84) for width in (28, 56)]
    images = LlavaOnevisionImageProcessorPil(
        size={"height": 28, "width": 28}, image_grid_pinpoints=pinpoints
    )
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=Qwen2Config(**TEXT, vocab_size=len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
        **options,
    )
    return finish(
        LlavaOnevisionForConditionalGeneration(config),
        LlavaOnevisionProcessor(images, tokenizer, num_image_tokens=16, **options),
        path,
        ONEVISION_CHAT,
    )


def idefics3(path: Path, do_image_splitting: bool = True) -> Folder:
    tokenizer = load_tokenizer(path, tiny_tokenizers.idefics3)
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 84},
        max_image_size={"longest_edge": 28},
        do_image_splitting=do_image_splitting,
    )
    config = Idefics3Config(
        vision_config=TOWER,
        text_config=LlamaConfig(**TEXT, vocab_size=len(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return finish(
        Idefics3ForConditionalGeneration(config),
        Idefics3Processor(images, tokenizer, image_seq_len=4),
        path,
        IDEFICS3_CHAT,
    )


def idefics3_whole(path: Path) -> Folder:
    return idefics3(path, do_image_splitting=False)


class InternVLProcessor(WithoutVideos, transformers.InternVLProcessor):
    pass


def internvl(path: Path) -> Folder:
    tokenizer = load_tokenizer(path, tiny_tokenizers.internvl)
    images = GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, max_patches=4)
    config = InternVLConfig(
        vision_config=TOWER,
        text_config=Qwen2Config(**TEXT, vocab_size=len(tokenizer)),
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=4,
    )
    return finish(
        InternVLForConditionalGeneration(config),
        InternVLProcessor(images, tokenizer, image_seq_length=4),
        path,
        INTERNVL_CHAT,
    )
