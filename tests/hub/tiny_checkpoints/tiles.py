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
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
)
from transformers.models.smolvlm import processing_smolvlm

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


def _idefics3(path: Path, config, model, images, processor, splits: bool = True) -> Folder:
    tokenizer = load_tokenizer(path, tiny_tokenizers.idefics3)
    pixels = images(
        size={"longest_edge": 84}, max_image_size={"longest_edge": 28}, do_image_splitting=splits
    )
    settings = config(
        vision_config=TOWER,
        text_config=LlamaConfig(**TEXT, vocab_size=len(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    reader = processor(pixels, tokenizer, image_seq_len=4)
    return finish(model(settings), reader, path, IDEFICS3_CHAT)


IDEFICS3 = (
    *(Idefics3Config, Idefics3ForConditionalGeneration),
    *(Idefics3ImageProcessorPil, Idefics3Processor),
)


def idefics3(path: Path) -> Folder:
    return _idefics3(path, *IDEFICS3)


def idefics3_whole(path: Path) -> Folder:
    return _idefics3(path, *IDEFICS3, splits=False)


class SmolVLMProcessor(WithoutVideos, processing_smolvlm.SmolVLMProcessor):
    # Its own reads the settings of videos.
    apply_chat_template = transformers.ProcessorMixin.apply_chat_template

    def __init__(self, image_processor, tokenizer, image_seq_len=169, chat_template=None):
        # A package that writes the numbers of frames of videos as words.
        processing_smolvlm.num2words = str
        super().__init__(image_processor, tokenizer, None, image_seq_len, chat_template)


def smolvlm(path: Path) -> Folder:
    models = SmolVLMConfig, SmolVLMForConditionalGeneration
    return _idefics3(path, *models, SmolVLMImageProcessorPil, SmolVLMProcessor)


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
