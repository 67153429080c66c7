"""Tiny random checkpoint folders with model, tokenizer, image processor and chat template."""

from tests.hub.tiny_checkpoints.common import TEXT, TOWER, Folder
from tests.hub.tiny_checkpoints.image_files import pictures
from tests.hub.tiny_checkpoints.in_memory import idefics, mllama, trocr, vit_gpt2
from tests.hub.tiny_checkpoints.shapes import fuyu, mistral3, pixtral, qwen2_5_vl, qwen3_vl
from tests.hub.tiny_checkpoints.squares import (
    blip_2,
    gemma3,
    llava,
    llava_without_a_template,
    paligemma,
    paligemma2,
)
from tests.hub.tiny_checkpoints.templates import LLAVA_CHAT
from tests.hub.tiny_checkpoints.text import gemma, llama, mistral_chat, qwen3, zephyr_chat
from tests.hub.tiny_checkpoints.tiles import (
    idefics3,
    idefics3_whole,
    internvl,
    llava_next,
    llava_onevision,
    smolvlm,
)

__all__ = [
    "ABOUT_IMAGES",
    "CAPTIONS",
    "Folder",
    "LLAVA_CHAT",
    "OF_TEXT",
    "TEXT",
    "TOWER",
    "blip_2",
    "fuyu",
    "gemma",
    "gemma3",
    "idefics",
    "idefics3",
    "idefics3_whole",
    "internvl",
    "llama",
    "llava",
    "llava_next",
    "llava_onevision",
    "llava_without_a_template",
    "mistral3",
    "mistral_chat",
    "mllama",
    "paligemma",
    "paligemma2",
    "pictures",
    "pixtral",
    "qwen2_5_vl",
    "qwen3",
    "qwen3_vl",
    "smolvlm",
    "trocr",
    "vit_gpt2",
    "zephyr_chat",
]

ABOUT_IMAGES = {
    "llava": llava,
    "llava without a template": llava_without_a_template,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "paligemma": paligemma,
    "paligemma 2": paligemma2,
    "gemma3": gemma3,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "internvl": internvl,
    "qwen2.5 vl": qwen2_5_vl,
    "qwen3 vl": qwen3_vl,
    "pixtral": pixtral,
    "mistral 3": mistral3,
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
