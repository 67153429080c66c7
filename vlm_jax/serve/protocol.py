"""Requests of `/v1/chat/completions` as in OpenAI's API, checked field by field.

Source: OpenAI's API reference, "Create chat completion"; `top_k` is an extension, as in vLLM.
"""

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace

from PIL import Image

from vlm_jax.data.forms.record import IMAGE_PLACEHOLDER
from vlm_jax.hub.text.prompts import ChatPrompt
from vlm_jax.infer.answer import AnswerOptions
from vlm_jax.infer.rows import TOP_LOGPROBS
from vlm_jax.serve.images import ImageReader
from vlm_jax.serve.limits import ApiError, Limits

MAX_STOP = 16
LARGEST = 2**31 - 1  # of a whole number
# Fields that change nothing here.
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
# Fields of other features -> the values that do not use them.
UNUSED = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none",),
    "response_format": ({"type": "text"},),
    "parallel_tool_calls": (True, False),
}
FIELDS = {
    *("model", "messages", "stream", "stream_options", "stop", "seed", "temperature", "top_p"),
    *("top_k", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs"),
}


@dataclass(frozen=True)
class ChatRequest:
    """A checked request."""

    model: str
    prompt: ChatPrompt
    images: list[Image.Image]
    options: AnswerOptions
    stream: bool
    include_usage: bool
    logprobs: bool
    top_logprobs: int


def parse_body(body: bytes) -> Mapping:
    """Returns the JSON object of a request.

    Raises:
      ApiError: the body is not a JSON object.
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is not JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise ApiError("the body must be a JSON object.")
    return fields


def parse_request(
    fields: Mapping, defaults: AnswerOptions, limits: Limits, read_image: ImageReader
) -> ChatRequest:
    """Checks the fields of a request.

    Args:
      defaults: options for fields that are absent or null.

    Raises:
      ApiError: a field is unknown, missing or malformed, or an image is refused.
      UserError: an option is out of range, or an image cannot be read.
    """
    fields = {name: value for name, value in fields.items() if value is not None}
    _check_names(fields)
    prompt, images = _parse_messages(_field(fields, "messages", list, None), limits, read_image)
    stream_options = _field(fields, "stream_options", dict, {})
    top_logprobs = _whole(fields, "top_logprobs", 0, TOP_LOGPROBS)
    has_logprobs = _field(fields, "logprobs", bool, False)
    if top_logprobs and not has_logprobs:
        raise ApiError("top_logprobs needs logprobs true.", param="top_logprobs")
    return ChatRequest(
        model=_field(fields, "model", str, None),
        prompt=prompt,
        images=images,
        options=_parse_options(fields, defaults),
        stream=_field(fields, "stream", bool, False),
        include_usage=_field(stream_options, "include_usage", bool, False),
        logprobs=has_logprobs,
        top_logprobs=top_logprobs,
    )


def _check_names(fields: Mapping) -> None:
    for name, value in fields.items():
        if name in UNUSED and value not in UNUSED[name]:
            raise ApiError(f"{name} {_shown(value)} is not supported.", param=name)
        if name not in FIELDS and name not in IGNORED and name not in UNUSED:
            raise ApiError(f"unknown field {name[:100]}.", param=name[:100])


def _parse_options(fields: Mapping, defaults: AnswerOptions) -> AnswerOptions:
    stop = fields.get("stop", defaults.stop)
    stop = (stop,) if isinstance(stop, str) else tuple(_as_list(stop, "stop"))
    if len(stop) > MAX_STOP:
        raise ApiError(f"stop has {len(stop)} texts: at most {MAX_STOP}.", param="stop")
    default_length = _whole(fields, "max_tokens", defaults.max_new_tokens, LARGEST, 1)
    options = replace(
        defaults,
        max_new_tokens=_whole(fields, "max_completion_tokens", default_length, LARGEST, 1),
        temperature=fields.get("temperature", defaults.temperature),
        top_k=_whole(fields, "top_k", defaults.top_k, LARGEST),
        top_p=fields.get("top_p", defaults.top_p),
        seed=fields.get("seed", secrets.randbits(32)),
        stop=stop,
    )
    options.check()
    return options


def _parse_messages(
    messages: list, limits: Limits, read_image: ImageReader
) -> tuple[ChatPrompt, list[Image.Image]]:
    """Returns the turns, which must alternate between user and assistant, and their images."""
    system, turns, images, characters = None, [], [], 0
    for number, message in enumerate(messages):
        name = f"messages[{number}]"
        if not isinstance(message, dict):
            raise ApiError(f"{name} must be an object.", param=name)
        role = _field(message, "role", str, None, f"{name}.")
        content = message.get("content")
        if role == "assistant" and isinstance(content, str):
            # A model may write it. In a turn it would be the place of an image.
            content = content.replace(IMAGE_PLACEHOLDER, "")
        text, message_images = _parse_content(content, name, limits, read_image)
        characters += len(text)
        images += message_images
        if characters > limits.max_text_characters:
            raise ApiError(
                f"the messages have more than {limits.max_text_characters} characters.",
                param="messages",
                code="context_length_exceeded",
            )
        if len(images) > limits.max_images:
            raise ApiError(f"there are more than {limits.max_images} images.", param="messages")
        if role in ("system", "developer") and number == 0:
            if message_images:
                raise ApiError(f"{name} has an image in its system turn.", param=name)
            system = text
            continue
        expected = ("user", "assistant")[len(turns) % 2]
        if role != expected:
            raise ApiError(
                f"{name} has the role {_shown(role)}, not {expected}: messages are an optional "
                "system message, then user and assistant in turn.",
                param=f"{name}.role",
            )
        if role == "assistant" and message_images:
            raise ApiError(f"{name} has an image in an answer.", param=name)
        for key in ("tool_calls", "function_call"):
            if message.get(key):
                raise ApiError(f"{name} has {key}, which is not supported.", param=f"{name}.{key}")
        turns.append(text)
    if len(turns) % 2 == 0:
        raise ApiError("the last message must have the role user.", param="messages")
    return ChatPrompt(tuple(turns), system), images


def _parse_content(
    content, name: str, limits: Limits, read_image: ImageReader
) -> tuple[str, list[Image.Image]]:
    """Returns the text of a message, with a placeholder at every image, and the images."""
    if isinstance(content, str):
        return _without_placeholder(content, name), []
    if not isinstance(content, list):
        raise ApiError(f"{name}.content must be text or a list of parts.", param=f"{name}.content")
    pieces, images = [], []
    for index, part in enumerate(content):
        part_name = f"{name}.content[{index}]"
        if not isinstance(part, dict):
            raise ApiError(f"{part_name} must be an object.", param=part_name)
        kind = part.get("type")
        if kind == "text":
            text = _field(part, "text", str, None, f"{part_name}.")
            pieces.append(_without_placeholder(text, part_name))
        elif kind == "image_url":
            if len(images) >= limits.max_images:
                raise ApiError(f"there are more than {limits.max_images} images.", param=part_name)
            url = part.get("image_url")
            url = url.get("url") if isinstance(url, dict) else url
            images.append(read_image(url, part_name))
            pieces.append(f"{IMAGE_PLACEHOLDER}\n")
        else:
            raise ApiError(
                f"{part_name} has the type {_shown(kind)}: choose text or image_url.",
                param=f"{part_name}.type",
            )
    return "".join(pieces), images


def _without_placeholder(text: str, name: str) -> str:
    if IMAGE_PLACEHOLDER in text:
        raise ApiError(
            f"{name} has {IMAGE_PLACEHOLDER} in its text: add images as image_url parts.",
            param=name,
        )
    return text


def _field(fields: Mapping, name: str, kind: type, default, path: str = ""):
    """Returns a field of a type; without a default, it must be present."""
    value = fields.get(name, default)
    if value is None:
        raise ApiError(f"{path}{name} is missing.", param=f"{path}{name}")
    if not isinstance(value, kind):
        raise ApiError(
            f"{path}{name} is {_shown(value)}: it must be a {KINDS[kind]}.", param=f"{path}{name}"
        )
    return value


KINDS = {str: "text", bool: "Boolean", list: "list", dict: "JSON object"}


def _whole(fields: Mapping, name: str, default: int, most: int, least: int = 0) -> int:
    value = fields.get(name, default)
    if type(value) is not int or not least <= value <= most:
        raise ApiError(
            f"{name} is {_shown(value)}: it must be a whole number from {least} to {most}.",
            param=name,
        )
    return value


def _as_list(value, name: str) -> list:
    if not isinstance(value, list | tuple):
        raise ApiError(f"{name} must be text or a list of texts.", param=name)
    return list(value)


def _shown(value) -> str:
    return json.dumps(value)[:80]
