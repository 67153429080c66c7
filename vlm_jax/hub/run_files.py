"""Tokenizer, chat template, processor and generation files of an exported run.

A run that keeps the prompt format of the checkpoint it started from copies that checkpoint's files.
For other runs they are written here, so that transformers' processor makes the tokens and pixels of
the run's own pipeline.
"""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from vlm_jax.config import CheckpointError, Experiment
from vlm_jax.data.conversation_parts import TEMPLATES
from vlm_jax.data.forms.record import IMAGE_PLACEHOLDER
from vlm_jax.hub.families.family import Family, HfProcessor, Json
from vlm_jax.hub.images.conversion import (
    max_patches,
    processor_config,
    tile_settings,
    vision_settings,
)
from vlm_jax.hub.images.files import read_settings
from vlm_jax.hub.images.settings import QWEN2_VL
from vlm_jax.hub.images.tile_cutters import TILE_CUTTERS
from vlm_jax.hub.text.chat_template import ChatTemplate
from vlm_jax.hub.text.special_tokens import (
    TOKENIZER,
    TOKENIZER_CONFIG,
    read_json_if_exists,
    set_template,
)
from vlm_jax.hub.text.tokenizer import (
    GENERATION_CONFIG,
    IMAGE_TOKENS,
    HubTokenizer,
    add_image_token,
)

CHAT_TEMPLATE = "chat_template.jinja"
TEXT_FILES = (
    *(TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "sentencepiece.bpe.model", "vocab.json", "merges.txt"),
    *(CHAT_TEMPLATE, "chat_template.json"),
)
PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"


class TokenIds(NamedTuple):
    """The token ids in config.json and generation_config.json."""

    pad: int
    image: int
    eos: int
    bos: int | None


def keeps_prompt_format(cfg: Experiment, processor: Path | None) -> bool:
    """Returns whether the run uses the prompt format of the checkpoint files in `processor`."""
    return cfg.data.template == "checkpoint" and processor is not None and processor.is_dir()


def write_run_files(
    stage: Path, cfg: Experiment, family: Family, tokenizer: Path, processor: Path | None
) -> TokenIds:
    """Writes everything but config.json and the weights.

    Args:
      stage: folder to write to.
      family: of the exported checkpoint.
      tokenizer: tokenizer.json of the run.
      processor: the processor files of the checkpoint that the run started from; None: it started
        from none.

    Raises:
      CheckpointError: the tokenizer cannot be read.
    """
    keeps_format = keeps_prompt_format(cfg, processor)
    if keeps_format:
        ids = _copy_text_files(stage, cfg, processor)
    else:
        ids = _write_text_files(stage, cfg, family.processor, tokenizer)
    if cfg.fusion.has_images:
        _write_processor(stage, cfg, family.processor, processor)
    config = read_json_if_exists(processor / GENERATION_CONFIG) if keeps_format else {}
    _write_generation_config(stage, cfg, ids, config)
    return ids


def _copy_text_files(stage: Path, cfg: Experiment, processor: Path) -> TokenIds:
    for name in TEXT_FILES:
        if (processor / name).is_file():
            shutil.copy(processor / name, stage / name)
    pad, image, _, eos = cfg.data.special_ids
    tokenizer = HubTokenizer.load(processor)
    if tokenizer.image_id is not None:
        image = tokenizer.image_id
    elif has_image_placeholder(cfg):
        image = tokenizer.add_image_token()
        _add_image_files(stage, tokenizer)
    return TokenIds(pad, image, eos, tokenizer.bos_id)


def _add_image_files(stage: Path, tokenizer: HubTokenizer) -> None:
    """Gives the files of a text decoder an image token, and a chat template that writes it."""
    image = tokenizer.id_to_token(tokenizer.image_id)
    tokenizer.backend.save(str(stage / TOKENIZER))
    settings = read_json_if_exists(stage / TOKENIZER_CONFIG)
    extra = settings.get("extra_special_tokens")
    named = extra if isinstance(extra, dict) else {}
    settings["extra_special_tokens"] = named | {"image_token": image}
    _write_json(stage / TOKENIZER_CONFIG, settings)
    template = ChatTemplate.load(stage)
    if template is not None and not template.accepts_lists(tokenizer.special_tokens):
        (stage / CHAT_TEMPLATE).write_text(_flatten_content(image) + template.source)


def _flatten_content(image: str) -> str:
    """Returns Jinja code that turns messages of parts into messages of text.

    An image becomes its token and a line end, as in the training.
    """
    part_text = f"{_quoted(image + chr(10))} if part['type'] == 'image' else part['text']"
    return (
        "{%- set flat = namespace(messages=[]) -%}"
        "{%- for message in messages -%}{%- set flat.content = message['content'] -%}"
        "{%- if flat.content is not string -%}{%- set parts, flat.content = flat.content, '' -%}"
        f"{{%- for part in parts -%}}"
        f"{{%- set flat.content = flat.content + ({part_text}) -%}}{{%- endfor -%}}{{%- endif -%}}"
        "{%- set flat.messages = flat.messages"
        " + [{'role': message['role'], 'content': flat.content}] -%}"
        "{%- endfor -%}{%- set messages = flat.messages -%}"
    )


def _write_text_files(
    stage: Path, cfg: Experiment, hf_processor: HfProcessor | None, path: Path
) -> TokenIds:
    """Writes the run's tokenizer with an image token, its settings and its chat template."""
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise CheckpointError(f"cannot read the tokenizer {path}: {error}") from None
    pad, image, _, eos = cfg.data.special_ids
    if has_image_placeholder(cfg):
        image = _image_id(backend, image)
    bos = _bos_id(cfg)
    names = {"eos_token": eos, "pad_token": pad}
    if bos is not None:
        names["bos_token"] = bos
    texts = {name: backend.id_to_token(i) for name, i in names.items()}
    # Exactly one of processor, tokenizer and chat template must write the bos token.
    processor_adds_bos = hf_processor is not None and hf_processor.adds_bos
    set_template(backend, None if processor_adds_bos else texts.get("bos_token"), None)
    backend.save(str(stage / TOKENIZER))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    image_text = ""
    if has_image_placeholder(cfg):
        image_text = backend.id_to_token(image)
        settings["extra_special_tokens"] = {"image_token": image_text}
    _write_json(stage / TOKENIZER_CONFIG, settings | texts)
    template_adds_bos = not cfg.fusion.has_images or (
        processor_adds_bos and cfg.data.is_conversations
    )
    bos_text = texts.get("bos_token", "") if template_adds_bos else ""
    template = chat_template(cfg, image_text, bos_text, texts["eos_token"])
    (stage / CHAT_TEMPLATE).write_text(template)
    return TokenIds(pad, image, eos, bos)


def has_image_placeholder(cfg: Experiment) -> bool:
    """Returns whether a placeholder token marks an image in the text."""
    return cfg.fusion.image_in_sequence or cfg.fusion.placeholder


def _image_id(backend: Tokenizer, image: int) -> int:
    """Returns the id of the image token; adds one if the tokenizer has another token at `image`."""
    return image if backend.id_to_token(image) in IMAGE_TOKENS else add_image_token(backend)


def _bos_id(cfg: Experiment) -> int | None:
    """Returns the id of the token that begins every text; None: no token does."""
    if cfg.data.bos_id is not None:
        return cfg.data.bos_id
    is_caption = cfg.data.is_conversations and cfg.data.template == "caption"
    # The prompt of a caption is empty: its text begins with the end-of-text token.
    return cfg.data.eos_id if is_caption and not has_image_placeholder(cfg) else None


def chat_template(cfg: Experiment, image: str, bos: str, eos: str) -> str:
    """Builds the Jinja template of a format of data/conversation_parts.py or data/text.py."""
    if cfg.data.is_conversations:
        form = TEMPLATES[cfg.data.template]
        before, after = form.before_question, form.after_question
        gap, keeps_question = form.before_answer, form.keeps_question
        image_mark = f"{image}\n" if keeps_question else image
    else:
        before, after, gap, keeps_question, image_mark = "", "\n", "", True, image
    placeholder = _quoted(IMAGE_PLACEHOLDER)
    if keeps_question:
        user_string = f"{{{{ message['content'] | replace({placeholder}, {_quoted(image)}) }}}}"
        user_text = "{{ part['text'] }}"
    else:
        user_string = f"{{{{ {_quoted(image)} * message['content'].count({placeholder}) }}}}"
        user_text = ""
    return (
        f"{_literal(bos)}{{% for message in messages %}}"
        f"{{% if message['role'] == 'user' %}}{_literal(before)}"
        f"{{% if message['content'] is string %}}{user_string}{{% else %}}"
        f"{{% for part in message['content'] %}}"
        f"{{% if part['type'] == 'image' %}}{_literal(image_mark)}{{% else %}}{user_text}"
        f"{{% endif %}}"
        f"{{% endfor %}}{{% endif %}}{_literal(after)}"
        f"{{% else %}}{_literal(gap)}"
        f"{{% if message['content'] is string %}}{{{{ message['content'] }}}}{{% else %}}"
        f"{{% for part in message['content'] %}}{{{{ part['text'] }}}}{{% endfor %}}{{% endif %}}"
        f"{_literal(eos)}{{% endif %}}{{% endfor %}}"
    )


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _literal(text: str) -> str:
    """A Jinja expression of constant text; empty for an empty text."""
    return f"{{{{ {_quoted(text)} }}}}" if text else ""


def _write_processor(
    stage: Path, cfg: Experiment, hf_processor: HfProcessor | None, processor: Path | None
) -> None:
    """Copies the checkpoint's files if they prepare images as the run does; or writes new ones."""
    keeps_format = keeps_prompt_format(cfg, processor)
    if keeps_format:
        names = [name for name in (PREPROCESSOR, PROCESSOR) if (processor / name).is_file()]
        if names and _prepares_images_alike(cfg, processor):
            for name in names:
                shutil.copy(processor / name, stage / name)
            return
    preprocessor = processor_config(cfg.vision)
    if hf_processor is None:
        _write_json(stage / PREPROCESSOR, preprocessor)
        return
    preprocessor["processor_class"] = hf_processor.name
    if hf_processor.image_processor:
        preprocessor["image_processor_type"] = hf_processor.image_processor
        preprocessor |= tile_settings(hf_processor.image_processor, cfg.vision)
    if hf_processor.counts_image_tokens:
        preprocessor[hf_processor.token_count_key] = cfg.image_tokens
    _write_json(stage / PREPROCESSOR, preprocessor)
    settings = read_json_if_exists(processor / PROCESSOR) if keeps_format else {}
    settings = {key: value for key, value in settings.items() if key != "image_processor"}
    if hf_processor.counts_patches:
        settings |= _patch_settings(cfg)
    if hf_processor.counts_image_tokens:
        settings[hf_processor.token_count_key] = cfg.image_tokens
    if cfg.vision.max_map_tiles is not None:
        settings["vision_aspect_ratio"] = f"anyres_max_{cfg.vision.max_map_tiles}"
    _write_json(stage / PROCESSOR, settings | {"processor_class": hf_processor.name})


def _prepares_images_alike(cfg: Experiment, processor: Path) -> bool:
    """Returns whether the checkpoint's processor makes the pixels of the run."""
    settings = read_settings(processor)
    if settings.kind in TILE_CUTTERS or cfg.vision.tile_grids:
        # It may cut images into other tiles than the run.
        pinpoints = [list(size) for size in settings.image_grid_pinpoints]
        if tile_settings(settings.kind, cfg.vision) != {"image_grid_pinpoints": pinpoints}:
            return False
    expected = vision_settings(settings, cfg.vision)
    if cfg.vision.rgb_conversion == "composite":
        # No processor of transformers composites files: new settings would be no closer.
        del expected["rgb_conversion"]
    if keeps_image_size(settings.kind):
        return True
    if settings.kind == QWEN2_VL:
        expected["max_patches"] = max_patches(settings)
        return all(getattr(cfg.vision, name) == x for name, x in expected.items())
    sides = {settings.crop_size[0]} if settings.do_center_crop else set(settings.size.values())
    has_size = sides == {cfg.vision.image_size_px}
    return has_size and all(getattr(cfg.vision, name) == x for name, x in expected.items())


def keeps_image_size(image_processor: str) -> bool:
    """Returns whether an image processor class leaves images in sizes of their own."""
    return image_processor == "FuyuImageProcessor"


def _patch_settings(cfg: Experiment) -> Json:
    vision = cfg.vision
    drops_class_token = vision.class_token and not vision.keep_class_token
    return {
        "patch_size": vision.patch_size_px,
        "vision_feature_select_strategy": "default" if drops_class_token else "full",
        "num_additional_image_tokens": int(vision.class_token),
    }


def _write_generation_config(stage: Path, cfg: Experiment, ids: TokenIds, config: Json) -> None:
    """Completes the checkpoint's generation config, if any, with the run's token ids."""
    eos_ids = config.get("eos_token_id")
    if eos_ids is None:
        eos_ids = []
    elif not isinstance(eos_ids, list):
        eos_ids = [eos_ids]
    if ids.eos not in eos_ids:
        eos_ids = [ids.eos, *eos_ids]
    config = config | {"eos_token_id": eos_ids if len(eos_ids) > 1 else eos_ids[0]}
    token_ids = {"pad_token_id": ids.pad, "bos_token_id": ids.bos}
    if cfg.fusion.is_encoder_decoder:
        token_ids["decoder_start_token_id"] = ids.bos
    for name, i in token_ids.items():
        if i is not None and config.get(name) is None:
            config[name] = i
    _write_json(stage / GENERATION_CONFIG, config)


def _write_json(path: Path, content: Json) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def prompt_differences(cfg: Experiment, family: Family) -> list[str]:
    """Returns the fields that the family's processor in transformers does not support."""
    processor = family.processor
    if not cfg.fusion.has_images or processor is None:
        return []
    fields = []
    if cfg.vision.tile_grids and not cfg.vision.thumbnail:
        fields.append("vision.thumbnail False")
    is_written = processor.image_processor == QWEN2_VL
    if processor.keeps_image_size or (cfg.vision.is_native and not is_written):
        fields.append(f"vision.image_size_px {cfg.vision.image_size_px}")
    if cfg.data.template == "checkpoint":
        return fields
    if processor.needs_bos and _bos_id(cfg) is None:
        fields.append("data.bos_id None")
    if processor.needs_placeholder and not cfg.fusion.placeholder:
        fields.append("fusion.placeholder False")
    if processor.resize and cfg.vision.resize != processor.resize:
        fields.append(f"vision.resize {cfg.vision.resize}")
    if processor.has_prompt_format:
        fields.append(f"data.template {cfg.data.template}")
    return fields
