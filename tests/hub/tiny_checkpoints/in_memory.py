"""Checkpoints whose decoder has cross-attention to images."""

from pathlib import Path

from transformers import (
    GPT2Config,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    IdeficsImageProcessorPil,
    IdeficsProcessor,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaImageProcessorPil,
    MllamaProcessor,
    TrOCRConfig,
    TrOCRProcessor,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessorPil,
)

from tests.hub import tiny_tokenizers
from tests.hub.tiny_checkpoints.common import TEXT, TOWER, Folder, finish, load_tokenizer
from tests.hub.tiny_checkpoints.templates import LLAMA_CHAT

VIT = ViTConfig(**TOWER)


def mllama(path: Path, template: str | None = LLAMA_CHAT) -> Folder:
    tokenizer = load_tokenizer(path, tiny_tokenizers.llama3, model_type="mllama")
    images = MllamaImageProcessorPil(size={"height": 16, "width": 16}, max_image_tiles=4)
    text = {
        **TEXT,
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 4,
        "cross_attention_layers": [1, 3],
    }
    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_global_layers": 2,
        "attention_heads": 2,
    }
    vision |= {"intermediate_size": 24, "image_size": 16, "patch_size": 4, "max_num_tiles": 4}
    vision |= {"intermediate_layers_indices": [1], "vision_output_dim": 32}
    config = MllamaConfig(
        text_config=text | {"pad_token_id": 1, "bos_token_id": 0},
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids("<|image|>"),
        attn_implementation="eager",
    )
    return finish(
        MllamaForConditionalGeneration(config), MllamaProcessor(images, tokenizer), path, template
    )


def idefics(path: Path) -> Folder:
    added = {"420": tiny_tokenizers.token("<fake_token_around_image>")}
    added |= {"421": tiny_tokenizers.token("<image>")}
    tokenizer = load_tokenizer(
        path, tiny_tokenizers.llama, config={"model_type": "idefics"}, added_tokens_decoder=added
    )
    images = IdeficsImageProcessorPil(image_size=28)
    vision = {key: value for key, value in TOWER.items() if key != "hidden_size"}
    text = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}
    config = IdeficsConfig(
        **text | {"pad_token_id": 0},
        vocab_size=420,
        additional_vocab_size=len(tokenizer) - 420,
        cross_layer_interval=2,
        qk_layer_norms=True,
        use_resampler=True,
        vision_config=vision | {"embed_dim": TOWER["hidden_size"]},
        perceiver_config={
            "resampler_n_latents": 3,
            "resampler_depth": 2,
            "resampler_n_heads": 2,
            "resampler_head_dim": 10,
            "qk_layer_norms_perceiver": True,
        },
    )
    reader = IdeficsProcessor(images, tokenizer, image_size=28)
    return finish(IdeficsForVisionText2Text(config), reader, path)


def _encoder_decoder(path: Path, tokenizer, decoder, **special) -> Folder:
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(VIT, decoder, **special)
    reader = TrOCRProcessor(ViTImageProcessorPil(size={"height": 28, "width": 28}), tokenizer)
    return finish(VisionEncoderDecoderModel(config), reader, path)


def vit_gpt2(path: Path) -> Folder:
    tokenizer = load_tokenizer(path, tiny_tokenizers.gpt2_whole)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64}
    decoder = GPT2Config(vocab_size=len(tokenizer), eos_token_id=end, bos_token_id=end, **sizes)
    return _encoder_decoder(path, tokenizer, decoder, decoder_start_token_id=end, pad_token_id=end)


def trocr(path: Path) -> Folder:
    tokenizer = load_tokenizer(path, tiny_tokenizers.roberta)
    sizes = {
        "d_model": 32,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 48,
    }
    decoder = TrOCRConfig(
        vocab_size=len(tokenizer),
        cross_attention_hidden_size=24,
        max_position_embeddings=64,
        **sizes,
    )
    return _encoder_decoder(path, tokenizer, decoder, decoder_start_token_id=2, pad_token_id=1)
