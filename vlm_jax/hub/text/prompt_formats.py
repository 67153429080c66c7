"""Prompts with images, as written by transformers 5.23 (`models/*/processing_*.py`).

llava      <s> USER: <image> <image> <image> <image> what is it? ASSISTANT:
           N tokens for every <image> of the text
llava_next the same, with a number of tokens for each image of its own
paligemma  <image> <image> <image> <image> <bos> what is it? \\n
           N tokens for every image, at the start unless the text has placeholders
gemma3     <bos> \\n\\n <start_of_image> N x <image_soft_token> <end_of_image> \\n\\n what is it?
           <start_of_image> in the text marks an image
idefics3   <fake_token_around_image> <global-img> N x <image> <fake_token_around_image> what is it?
           N tokens for every tile, <row_1_col_1> and so on, then for the whole image, <global-img>
internvl   <img> N x <IMG_CONTEXT> </img> what is it?
           N tokens for every tile, then for the whole image
qwen2_vl   <|vision_start|> N x <|image_pad|> <|vision_end|> what is it?
           N tokens for every image, a square of its patches each
mistral3   [IMG] [IMG] [IMG_BREAK] [IMG] [IMG] [IMG_END] what is it?
           one token per square of patches, one per row of them; llava with Pixtral's encoder alike
fuyu       |SPEAKER| |SPEAKER| |NEWLINE| |SPEAKER| |SPEAKER| |NEWLINE| <s> what is it? <0x04>
           one token per patch, one per row of patches
mllama     <|image|> <|begin_of_text|> what is it?
           one token per image, and a cross-attention mask
blip-2     <image> <image> <image> <image> </s> what is it?
           N tokens for every image, at the start unless the text has placeholders
idefics    <s> <fake_token_around_image> <image> <fake_token_around_image> what is it?
           one token per image, and an image attention mask
"""

import os
from pathlib import Path

from vlm_jax.config import CheckpointError
from vlm_jax.hub.tensors.folder import read_json
from vlm_jax.hub.text.formats.common import (
    PREPROCESSOR,
    PROCESSOR,
    PlaceholderFormat,
    TextFormat,
)
from vlm_jax.hub.text.formats.grids import (
    Idefics3Format,
    InternVLFormat,
    PixtralFormat,
    Qwen2VLFormat,
)
from vlm_jax.hub.text.formats.in_memory import EncoderDecoderFormat, IdeficsFormat, MllamaFormat
from vlm_jax.hub.text.formats.in_sequence import (
    Blip2Format,
    FuyuFormat,
    Gemma3Format,
    LlavaFormat,
    PaliGemmaFormat,
    TileMapFormat,
)
from vlm_jax.hub.text.special_tokens import read_json_if_exists
from vlm_jax.hub.text.tokenizer import HubTokenizer
from vlm_jax.hub.text.tokenizer_files import CONFIG

FORMATS = {
    "blip-2": Blip2Format,
    "llava": LlavaFormat,
    "llava_next": TileMapFormat,
    "llava_onevision": TileMapFormat,
    "paligemma": PaliGemmaFormat,
    "gemma3": Gemma3Format,
    "idefics3": Idefics3Format,
    "smolvlm": Idefics3Format,
    "internvl": InternVLFormat,
    "qwen2_vl": Qwen2VLFormat,
    "qwen2_5_vl": Qwen2VLFormat,
    "qwen3_vl": Qwen2VLFormat,
    "mistral3": PixtralFormat,
    "fuyu": FuyuFormat,
    "mllama": MllamaFormat,
    "idefics": IdeficsFormat,
    "vision-encoder-decoder": EncoderDecoderFormat,
}


def has_own_format(folder: str | os.PathLike) -> bool:
    """True if the family in a folder has its own prompt format, without a chat template."""
    config = read_json(Path(os.path.expanduser(folder)) / CONFIG)
    return FORMATS.get(config.get("model_type"), TextFormat).has_own_format


def load_prompt_format(
    folder: str | os.PathLike, tokenizer: HubTokenizer, has_images: bool = False
) -> TextFormat:
    """Loads the prompt format of the checkpoint in a folder.

    Args:
      has_images: the model takes images; a text decoder then gets an image placeholder.

    Raises:
      CheckpointError: config.json is missing, a file is damaged, or no file states the number of
        tokens of an image.
    """
    folder = Path(os.path.expanduser(folder))
    config, processor = read_json(folder / CONFIG), read_json_if_exists(folder / PROCESSOR)
    images = processor.get("image_processor") or read_json_if_exists(folder / PREPROCESSOR)
    default = PlaceholderFormat if has_images else TextFormat
    text_format = FORMATS.get(config.get("model_type"), default)
    try:
        return text_format.read(tokenizer, config, processor, images)
    except (KeyError, TypeError, AttributeError, ZeroDivisionError):
        raise CheckpointError(
            f"neither {folder / PROCESSOR} nor a file beside it states how many tokens an image "
            "takes."
        ) from None
