"""The files beside the weights of an exported run: tokenizer, chat template, processor and generation settings.

A run that keeps the prompt form of the checkpoint it began with takes over that checkpoint's files. For other runs they
are written here, so that transformers' processor makes the tokens and pixels of the run's own pipeline.
"""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer

from vlm_jax.config import CheckpointError, Experiment
from vlm_jax.data.conversation_files import IMAGE_PLACEHOLDER
from vlm_jax.data.templates import TEMPLATES
from vlm_jax.hub.families.family import Json
from vlm_jax.hub.images.settings import processor_config, read_settings, vision_settings
from vlm_jax.hub.text.special_tokens import (
    TOKENIZER,
    TOKENIZER_CONFIG,
    read_if_there,
    set_template,
)
from vlm_jax.hub.text.tokenizer import GENERATION_CONFIG, IMAGE_TOKENS, HubTokenizer

TEXT_FILES = (
    *(TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "sentencepiece.bpe.model", "vocab.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json"),
)
PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
PROCESSOR_CLASSES = {
    "llava": "LlavaProcessor",
    "mllama": "MllamaProcessor",
    "paligemma": "PaliGemmaProcessor",
    "fuyu": "FuyuProcessor",
    "vision-encoder-decoder": "TrOCRProcessor",
}


class TokenIds(NamedTuple):
    """The ids that config.json and generation_config.json name."""

    pad: int
    image: int
    eos: int
    begin: int | None


def keeps_form(cfg: Experiment, processor: Path | None) -> bool:
    """Whether the run's prompts are those of the checkpoint whose files `processor` holds."""
    return cfg.data.template == "checkpoint" and processor is not None and processor.is_dir()


def write_run_files(
    stage: Path, cfg: Experiment, model_type: str, tokenizer: Path, processor: Path | None
) -> TokenIds:
    """Writes everything but config.json and the weights.

    Args:
      stage: the folder to write in.
      tokenizer: tokenizer.json of the run.
      processor: the files of the checkpoint that the run began with; None: it began with none.

    Raises:
      CheckpointError: the tokenizer cannot be read.
    """
    if keeps_form(cfg, processor):
        ids = _copy_text_files(stage, cfg, processor)
    else:
        ids = _write_text_files(stage, cfg, model_type, tokenizer)
    if cfg.fusion.has_images:
        _write_processor(stage, cfg, model_type, processor)
    starts = {"decoder_start_token_id": ids.begin} if cfg.fusion.is_encoder_decoder else {}
    _write_generation_config(stage, ids, starts, processor if keeps_form(cfg, processor) else None)
    return ids


def _copy_text_files(stage: Path, cfg: Experiment, processor: Path) -> TokenIds:
    for name in TEXT_FILES:
        if (processor / name).is_file():
            shutil.copy(processor / name, stage / name)
    pad, image, _, eos = cfg.data.special_ids
    tokenizer = HubTokenizer.load(processor)
    image = image if tokenizer.image_id is None else tokenizer.image_id
    return TokenIds(pad, image, eos, tokenizer.bos_id)


def _write_text_files(stage: Path, cfg: Experiment, model_type: str, path: Path) -> TokenIds:
    """A tokenizer.json of the run with an image token, the names of its tokens, and a chat template of its form."""
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise CheckpointError(f"cannot read the tokenizer {path}: {error}") from None
    pad, image, _, eos = cfg.data.special_ids
    if reads_image_tokens(cfg):
        image = _image_id(backend, image)
    begin = _begin_id(cfg)
    names = {"eos_token": eos, "pad_token": pad} | ({} if begin is None else {"bos_token": begin})
    texts = {name: backend.id_to_token(i) for name, i in names.items()}
    # MllamaProcessor writes bos itself; the tokenizers of the other processors do.
    adds_bos = model_type != "mllama"
    set_template(backend, texts.get("bos_token") if adds_bos else None, None)
    backend.save(str(stage / TOKENIZER))
    image_text = backend.id_to_token(image) if reads_image_tokens(cfg) else ""
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    extra = {"extra_special_tokens": {"image_token": image_text}} if image_text else {}
    _write_json(stage / TOKENIZER_CONFIG, settings | texts | extra)
    writes_bos = not cfg.fusion.has_images or (model_type == "mllama" and cfg.data.is_conversations)
    bos = texts.get("bos_token", "") if writes_bos else ""
    (stage / "chat_template.jinja").write_text(
        chat_template(cfg, image_text, bos, texts["eos_token"])
    )
    return TokenIds(pad, image, eos, begin)


def reads_image_tokens(cfg: Experiment) -> bool:
    """Whether a token stands for an image in the text."""
    return cfg.fusion.image_in_sequence or cfg.fusion.placeholder


def _image_id(backend: Tokenizer, image: int) -> int:
    """The id of the image token, which is added where the tokenizer has none at `image`."""
    text = backend.id_to_token(image)
    if text in IMAGE_TOKENS:
        return image
    backend.add_special_tokens([AddedToken(IMAGE_TOKENS[0], normalized=False, special=True)])
    return backend.token_to_id(IMAGE_TOKENS[0])


def _begin_id(cfg: Experiment) -> int | None:
    """The token that begins every text; None where none does."""
    if cfg.data.bos_id is not None:
        return cfg.data.bos_id
    begins_empty = (
        cfg.data.template == "caption" and cfg.data.is_conversations and not reads_image_tokens(cfg)
    )
    return cfg.data.eos_id if begins_empty else None


def chat_template(cfg: Experiment, image: str, bos: str, eos: str) -> str:
    """The Jinja template of a form in data/templates.py or, for sets of questions, of data/text.py."""
    if cfg.data.is_conversations:
        form = TEMPLATES[cfg.data.template]
        before, after, gap, keeps_question = form.before, form.after, form.gap, form.keeps_question
        mark = f"{image}\n" if keeps_question else image
    else:
        before, after, gap, keeps_question, mark = "", "\n", "", True, image
    whole = f"replace({_quoted(IMAGE_PLACEHOLDER)}, {_quoted(image)})"
    if keeps_question:
        string, part = f"{{{{ message['content'] | {whole} }}}}", "{{ part['text'] }}"
    else:
        string, part = (
            f"{{{{ {_quoted(image)} * message['content'].count({_quoted(IMAGE_PLACEHOLDER)}) }}}}",
            "",
        )
    return (
        f"{_literal(bos)}{{% for message in messages %}}"
        f"{{% if message['role'] == 'user' %}}{_literal(before)}"
        f"{{% if message['content'] is string %}}{string}{{% else %}}"
        f"{{% for part in message['content'] %}}"
        f"{{% if part['type'] == 'image' %}}{_literal(mark)}{{% else %}}{part}{{% endif %}}"
        f"{{% endfor %}}{{% endif %}}{_literal(after)}"
        f"{{% else %}}{_literal(gap)}"
        f"{{% if message['content'] is string %}}{{{{ message['content'] }}}}{{% else %}}"
        f"{{% for part in message['content'] %}}{{{{ part['text'] }}}}{{% endfor %}}{{% endif %}}"
        f"{_literal(eos)}{{% endif %}}{{% endfor %}}"
    )


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _literal(text: str) -> str:
    return f"{{{{ {_quoted(text)} }}}}" if text else ""


def _write_processor(stage: Path, cfg: Experiment, model_type: str, processor: Path | None) -> None:
    """The checkpoint's own files where they say what the run does, or else new ones."""
    names = [
        name for name in (PREPROCESSOR, PROCESSOR) if processor and (processor / name).is_file()
    ]
    if keeps_form(cfg, processor) and names and _prepares_alike(cfg, processor):
        for name in names:
            shutil.copy(processor / name, stage / name)
        return
    whole = (
        {"processor_class": PROCESSOR_CLASSES[model_type]}
        if model_type in PROCESSOR_CLASSES
        else {}
    )
    images = processor_config(cfg.vision) | whole
    if model_type == "paligemma":
        images["image_seq_length"] = cfg.image_tokens
    _write_json(stage / PREPROCESSOR, images)
    if whole:
        kept = read_if_there(processor / PROCESSOR) if keeps_form(cfg, processor) else {}
        kept = {key: value for key, value in kept.items() if key != "image_processor"}
        _write_json(stage / PROCESSOR, kept | _processor(cfg, model_type) | whole)


def _prepares_alike(cfg: Experiment, processor: Path) -> bool:
    settings = read_settings(processor)
    wanted = vision_settings(settings, cfg.vision)
    if model_has_any_size(settings.kind):
        return True
    sides = {settings.crop_size[0]} if settings.do_center_crop else set(settings.size.values())
    return sides == {cfg.vision.image_size_px} and all(
        getattr(cfg.vision, name) == x for name, x in wanted.items()
    )


def model_has_any_size(kind: str) -> bool:
    """Whether a processor leaves images in sizes of their own."""
    return kind == "FuyuImageProcessor"


def _processor(cfg: Experiment, model_type: str) -> Json:
    if model_type != "llava":
        return {}
    vision = cfg.vision
    drops_class = vision.class_token and not vision.keep_class_token
    return {
        "patch_size": vision.patch_size_px,
        "vision_feature_select_strategy": "default" if drops_class else "full",
        "num_additional_image_tokens": int(vision.class_token),
    }


def _write_generation_config(
    stage: Path, ids: TokenIds, starts: Json, processor: Path | None
) -> None:
    config = read_if_there(processor / GENERATION_CONFIG) if processor else {}
    ends = config.get("eos_token_id")
    ends = list(ends) if isinstance(ends, list) else [] if ends is None else [ends]
    if ids.eos not in ends:
        ends = [ids.eos, *ends]
    config |= {"eos_token_id": ends if len(ends) > 1 else ends[0]}
    named = {"pad_token_id": ids.pad, "bos_token_id": ids.begin, **starts}
    for name, i in named.items():
        if i is not None and config.get(name) is None:
            config[name] = i
    _write_json(stage / GENERATION_CONFIG, config)


def _write_json(path: Path, content: Json) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def prompt_differences(cfg: Experiment, model_type: str) -> list[str]:
    """What of a run's prompts and pixels the processor of a family in transformers does otherwise, in fields."""
    if not cfg.fusion.has_images:
        return []
    wrong = (
        [f"vision.image_size_px {cfg.vision.image_size_px}"] if model_type == "fuyu" else []
    )  # theirs has any size
    if cfg.data.template == "checkpoint":
        return wrong
    if model_type in ("mllama", "vision-encoder-decoder") and _begin_id(cfg) is None:
        wrong.append("data.bos_id None")
    if model_type == "mllama" and not cfg.fusion.placeholder:
        wrong.append("fusion.placeholder False")
    if model_type == "mllama" and cfg.vision.resize != "pad":
        wrong.append(f"vision.resize {cfg.vision.resize}")
    if model_type in ("paligemma", "fuyu"):
        wrong.append(f"data.template {cfg.data.template}")
    return wrong
