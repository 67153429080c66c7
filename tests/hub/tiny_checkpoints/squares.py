"""Checkpoints whose images are squares in the decoder's sequence."""

from pathlib import Path

from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    OPTConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from tests.hub import tiny_tokenizers
from tests.hub.tiny_checkpoints.common import TEXT, TOWER, Folder, finish, load_tokenizer
from tests.hub.tiny_checkpoints.templates import GEMMA3_CHAT, LLAVA_CHAT


def llava(path: Path, template: str | None = LLAVA_CHAT) -> Folder:
    tokenizer = load_tokenizer(path, tiny_tokenizers.llama)
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    options = {
        "patch_size": 7,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=LlamaConfig(**TEXT, vocab_size=len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return finish(
        LlavaForConditionalGeneration(config),
        LlavaProcessor(images, tokenizer, **options),
        path,
        template,
    )


def llava_without_a_template(path: Path) -> Folder:
    return llava(path, None)


def paligemma(path: Path, text=GemmaConfig, **settings) -> Folder:
    added = {"450": tiny_tokenizers.token("<image>")}
    tokenizer = load_tokenizer(path, tiny_tokenizers.gemma, added_tokens_decoder=added)
    images = SiglipImageProcessorPil(size={"height": 28, "width": 28})
    images.image_seq_length = 16
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=text(**TEXT, head_dim=16, vocab_size=1000, **settings),
        projection_dim=32,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    config._attn_implementation = "eager"
    return finish(
        PaliGemmaForConditionalGeneration(config), PaliGemmaProcessor(images, tokenizer), path
    )


def paligemma2(path: Path) -> Folder:
    return paligemma(path, Gemma2Config, sliding_window=8, query_pre_attn_scalar=24)


def gemma3(path: Path, template: str | None = GEMMA3_CHAT) -> Folder:
    tokenizer = load_tokenizer(path, tiny_tokenizers.gemma3)
    images = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    text = Gemma3TextConfig(
        **TEXT,
        head_dim=16,
        vocab_size=1000,
        sliding_window=3,
        layer_types=["sliding_attention", "full_attention"],
    )
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=text,
        mm_tokens_per_image=4,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    processor = Gemma3Processor(images, tokenizer, image_seq_length=4)
    return finish(Gemma3ForConditionalGeneration(config), processor, path, template)


def blip_2(path: Path) -> Folder:
    tokenizer = load_tokenizer(path, tiny_tokenizers.opt, model_type="blip-2")
    images = BlipImageProcessorPil(size={"height": 28, "width": 28})
    # It adds the image token to the tokenizer.
    reader = Blip2Processor(images, tokenizer, num_query_tokens=3)
    text = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=48,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=None,
    )
    config = Blip2Config(
        vision_config=TOWER,
        qformer_config={
            "hidden_size": 20,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 28,
        },
        text_config=text.to_dict(),
        num_query_tokens=3,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return finish(Blip2ForConditionalGeneration(config), reader, path)
