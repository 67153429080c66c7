"""Tiny random checkpoint folders with model, tokenizer, image processor and chat template."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, normalizers
from transformers import (
    AutoTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    FuyuConfig,
    FuyuForCausalLM,
    FuyuProcessor,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GotOcr2ImageProcessorPil,
    GPT2Config,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    IdeficsImageProcessorPil,
    IdeficsProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaProcessor,
    MistralConfig,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaImageProcessorPil,
    MllamaProcessor,
    OPTConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLImageProcessorPil,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    TokenizersBackend,
    TrOCRConfig,
    TrOCRProcessor,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessorPil,
)

from tests.hub import tiny_tokenizers
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
VIT = ViTConfig(**TOWER)

# Chat templates as checkpoints have them: with bos and without, of strings, of lists, of both.
LLAMA_CHAT = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<|image|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL_CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}"
)
# The last answer has an empty block of reasoning, which earlier answers lose.
QWEN3_CHAT = (
    "{% set last = namespace(question=-1) %}{% for m in messages if m['role'] == 'user' %}"
    "{% set last.question = messages.index(m) %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.index0 > last.question %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The system turn begins the first question; texts lose the white space around them.
GEMMA3_CHAT = (
    "{{ bos_token }}{% set first = namespace(text='', messages=messages) %}"
    "{% if messages[0]['role'] == 'system' %}{% set first.messages = messages[1:] %}"
    "{% if messages[0]['content'] is string %}"
    "{% set first.text = messages[0]['content'] + '\n\n' %}{% else %}"
    "{% set first.text = messages[0]['content'][0]['text'] + '\n\n' %}{% endif %}{% endif %}"
    "{% for m in first.messages %}{{ '<start_of_turn>' }}"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}{{ '\n' }}"
    "{{ first.text if loop.first else '' }}"
    "{% if m['content'] is string %}{{ m['content'] | trim }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}{{ '<start_of_image>' }}"
    "{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
IDEFICS3_CHAT = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}"
    "{{ ':' if m['content'][0]['type'] == 'image' else ': ' }}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}{{ '<image>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<end_of_utterance>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
INTERNVL_CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN2_VL_CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAVA_CHAT = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for part in m['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
ONEVISION_CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' }}"
    "{% for part in m['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>' }}{% endfor %}"
    "{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\n' + part['text'] }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


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


def _finished(model: torch.nn.Module, reader, path: Path, template: str | None = None) -> Folder:
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


def _tokenizer(path: Path, build: Callable, **options):
    build(path, **options)
    return AutoTokenizer.from_pretrained(path)


def llama(path: Path, template: str = LLAMA_CHAT) -> Folder:
    tokenizer = _tokenizer(path, tiny_tokenizers.llama3)
    model = LlamaForCausalLM(LlamaConfig(**TEXT, vocab_size=len(tokenizer)))
    return _finished(model, tokenizer, path, template)


def mistral_chat(path: Path) -> Folder:
    tokenizer = _tokenizer(path, tiny_tokenizers.llama)
    model = LlamaForCausalLM(LlamaConfig(**TEXT, vocab_size=len(tokenizer)))
    return _finished(model, tokenizer, path, MISTRAL_CHAT)


def zephyr_chat(path: Path) -> Folder:
    """A tokenizer that writes bos, and a template that does not."""
    tokenizer = _tokenizer(path, tiny_tokenizers.llama)
    model = LlamaForCausalLM(LlamaConfig(**TEXT, vocab_size=len(tokenizer)))
    return _finished(
        model, tokenizer, path, "{% for m in messages %}User: {{ m['content'] }}</s>\n{% endfor %}"
    )


def gemma(path: Path) -> Folder:
    tokenizer = _tokenizer(path, tiny_tokenizers.gemma)
    model = GemmaForCausalLM(GemmaConfig(**TEXT, head_dim=16, vocab_size=len(tokenizer)))
    return _finished(model, tokenizer, path)


def qwen3(path: Path) -> Folder:
    tokenizer = _tokenizer(path, tiny_tokenizers.qwen3)
    model = Qwen3ForCausalLM(Qwen3Config(**TEXT, head_dim=16, vocab_size=len(tokenizer)))
    return _finished(model, tokenizer, path, QWEN3_CHAT)


def llava(path: Path, template: str | None = LLAVA_CHAT) -> Folder:
    tokenizer = _tokenizer(path, tiny_tokenizers.llama)
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
    return _finished(
        LlavaForConditionalGeneration(config),
        LlavaProcessor(images, tokenizer, **options),
        path,
        template,
    )


def llava_without_a_template(path: Path) -> Folder:
    return llava(path, None)


def llava_next(path: Path) -> Folder:
    tokenizer = _tokenizer(path, tiny_tokenizers.llama)
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
    return _finished(
        LlavaNextForConditionalGeneration(config),
        LlavaNextProcessor(images, tokenizer, **options),
        path,
        LLAVA_CHAT,
    )


class LlavaOnevisionProcessor(transformers.LlavaOnevisionProcessor):
    @classmethod
    def get_attributes(cls):
        """Without the processor of videos, which needs torchvision."""
        return ["image_processor", "tokenizer"]


def llava_onevision(path: Path) -> Folder:
    tokenizer = _tokenizer(path, tiny_tokenizers.qwen3)
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
    return _finished(
        LlavaOnevisionForConditionalGeneration(config),
        LlavaOnevisionProcessor(images, tokenizer, num_image_tokens=16, **options),
        path,
        ONEVISION_CHAT,
    )


def paligemma(path: Path, text=GemmaConfig, **settings) -> Folder:
    added = {"450": tiny_tokenizers.token("<image>")}
    tokenizer = _tokenizer(path, tiny_tokenizers.gemma, added_tokens_decoder=added)
    images = SiglipImageProcessorPil(size={"height": 28, "width": 28})
    images.image_seq_length = 16
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=text(**TEXT, head_dim=16, vocab_size=1000, **settings),
        projection_dim=32,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    config._attn_implementation = "eager"
    return _finished(
        PaliGemmaForConditionalGeneration(config), PaliGemmaProcessor(images, tokenizer), path
    )


def paligemma2(path: Path) -> Folder:
    return paligemma(path, Gemma2Config, sliding_window=8, query_pre_attn_scalar=24)


def gemma3(path: Path, template: str | None = GEMMA3_CHAT) -> Folder:
    tokenizer = _tokenizer(path, tiny_tokenizers.gemma3)
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
    return _finished(Gemma3ForConditionalGeneration(config), processor, path, template)


def idefics3(path: Path, do_image_splitting: bool = True) -> Folder:
    tokenizer = _tokenizer(path, tiny_tokenizers.idefics3)
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
    return _finished(
        Idefics3ForConditionalGeneration(config),
        Idefics3Processor(images, tokenizer, image_seq_len=4),
        path,
        IDEFICS3_CHAT,
    )


def idefics3_whole(path: Path) -> Folder:
    return idefics3(path, do_image_splitting=False)


class InternVLProcessor(transformers.InternVLProcessor):
    @classmethod
    def get_attributes(cls):
        """Without the processor of videos, which needs torchvision."""
        return ["image_processor", "tokenizer"]


def internvl(path: Path) -> Folder:
    tokenizer = _tokenizer(path, tiny_tokenizers.internvl)
    images = GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, max_patches=4)
    config = InternVLConfig(
        vision_config=TOWER,
        text_config=Qwen2Config(**TEXT, vocab_size=len(tokenizer)),
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=4,
    )
    return _finished(
        InternVLForConditionalGeneration(config),
        InternVLProcessor(images, tokenizer, image_seq_length=4),
        path,
        INTERNVL_CHAT,
    )


class Qwen2_5_VLProcessor(transformers.Qwen2_5_VLProcessor):
    @classmethod
    def get_attributes(cls):
        """Without the processor of videos, which needs torchvision."""
        return ["image_processor", "tokenizer"]


def qwen2_5_vl(path: Path) -> Folder:
    tokenizer = _tokenizer(path, tiny_tokenizers.qwen2_vl)
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
    return _finished(
        Qwen2_5_VLForConditionalGeneration(config),
        Qwen2_5_VLProcessor(images, tokenizer),
        path,
        QWEN2_VL_CHAT,
    )


class FuyuImageProcessorPil(transformers.FuyuImageProcessorPil):
    def patchify_image(self, image, patch_size=None):
        """The processor hands tensors over, which the Pillow backend does not take."""
        return torch.from_numpy(super().patchify_image(image.numpy(), patch_size))


def fuyu(path: Path) -> Folder:
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
    text = {**TEXT, "num_key_value_heads": 4, "vocab_size": 300}
    image = tokenizer.convert_tokens_to_ids("|SPEAKER|")
    config = FuyuConfig(text_config=text, patch_size=6, image_size=48, image_token_id=image)
    return _finished(FuyuForCausalLM(config), FuyuProcessor(images, tokenizer), path)


def mllama(path: Path, template: str | None = LLAMA_CHAT) -> Folder:
    tokenizer = _tokenizer(path, tiny_tokenizers.llama3, model_type="mllama")
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
    return _finished(
        MllamaForConditionalGeneration(config), MllamaProcessor(images, tokenizer), path, template
    )


def blip_2(path: Path) -> Folder:
    tokenizer = _tokenizer(path, tiny_tokenizers.opt, model_type="blip-2")
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
    return _finished(Blip2ForConditionalGeneration(config), reader, path)


def idefics(path: Path) -> Folder:
    added = {"420": tiny_tokenizers.token("<fake_token_around_image>")}
    added |= {"421": tiny_tokenizers.token("<image>")}
    tokenizer = _tokenizer(
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
    return _finished(IdeficsForVisionText2Text(config), reader, path)


def _encoder_decoder(path: Path, tokenizer, decoder, **special) -> Folder:
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(VIT, decoder, **special)
    reader = TrOCRProcessor(ViTImageProcessorPil(size={"height": 28, "width": 28}), tokenizer)
    return _finished(VisionEncoderDecoderModel(config), reader, path)


def vit_gpt2(path: Path) -> Folder:
    tokenizer = _tokenizer(path, tiny_tokenizers.gpt2_whole)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64}
    decoder = GPT2Config(vocab_size=len(tokenizer), eos_token_id=end, bos_token_id=end, **sizes)
    return _encoder_decoder(path, tokenizer, decoder, decoder_start_token_id=end, pad_token_id=end)


def trocr(path: Path) -> Folder:
    tokenizer = _tokenizer(path, tiny_tokenizers.roberta)
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


ABOUT_IMAGES = {
    "llava": llava,
    "llava without a template": llava_without_a_template,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "paligemma": paligemma,
    "paligemma 2": paligemma2,
    "gemma3": gemma3,
    "idefics3": idefics3,
    "internvl": internvl,
    "qwen2.5 vl": qwen2_5_vl,
    "fuyu": fuyu,
    "mllama": mllama,
    "idefics": idefics,
    "blip-2": blip_2,
}
CAPTIONS = {"vit and gpt2": vit_gpt2, "trocr": trocr}
OF_TEXT = {
    "llama": llama,
    "mistral's chat": mistral_chat,
    "a chat without bos": zephyr_chat,
    "gemma": gemma,
    "qwen3": qwen3,
}


def pictures(folder: Path) -> dict[str, Path]:
    """Image files of odd sizes in every mode that cameras and drawings have."""
    rng = np.random.default_rng(0)
    color = Image.fromarray(rng.integers(0, 256, (37, 53, 3), np.uint8))
    alpha = Image.fromarray(rng.integers(0, 256, (31, 29, 4), np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    files = {
        "color": (color, "a.jpg", {}),
        "tall": (Image.fromarray(rng.integers(0, 256, (91, 17, 3), np.uint8)), "b.png", {}),
        "gray": (color.convert("L"), "c.jpg", {}),
        "palette": (color.quantize(16), "d.png", {}),
        "alpha": (alpha, "e.png", {}),
        "turned": (color, "f.jpg", {"exif": turned}),
    }
    for image, name, options in files.values():
        image.save(folder / name, **options)
    return {kind: folder / name for kind, (_, name, _) in files.items()}
