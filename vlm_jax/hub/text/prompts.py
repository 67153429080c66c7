"""Prompts before and after they are tokenized: texts, conversations, and the arrays of a batch."""

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vlm_jax.config import CheckpointError, ConfigError
from vlm_jax.hub.image_inputs import IMAGE_MASKS


@dataclass(frozen=True)
class ChatPrompt:
    """A question to answer, with the turns before it in its conversation."""

    turns: tuple[str, ...]  # question, answer, ..., question; <image> is the place of an image
    system: str | None = None  # text of the system turn

    @property
    def text(self) -> str:
        """All turns, to count the images."""
        return "\n".join(self.turns)


@dataclass(frozen=True)
class Prompt:
    """Token ids of one prompt and its attention inputs; T tokens, I images, J tiles."""

    input_ids: np.ndarray  # (T,) int32
    # (T,) int32. PaliGemma: 0: attends to the whole prompt. Gemma 3: 1: an image token.
    token_type_ids: np.ndarray | None = None
    answer_type: int = 0  # token_type_ids of an answer
    # (T, I, J) int32; 1: the token attends to this tile of this image.
    cross_attention_mask: np.ndarray | None = None
    # (T, I) int32; 1: the token attends to this image.
    image_attention_mask: np.ndarray | None = None

    def with_answer(self, ids: Sequence[int]) -> "Prompt":
        """Appends an answer, whose tokens attend to the same images as the prompt's last token."""
        types, count = self.token_type_ids, len(ids)
        if types is not None:
            types = np.pad(types, (0, count), constant_values=self.answer_type)
        masks = {}
        for name in IMAGE_MASKS:
            mask = getattr(self, name)
            if mask is not None:
                masks[name] = np.concatenate([mask, np.repeat(mask[-1:], count, axis=0)])
        return replace(
            self,
            input_ids=np.concatenate([self.input_ids, to_ids(ids)]),
            token_type_ids=types,
            **masks,
        )


Prompts = str | ChatPrompt | Sequence[str | ChatPrompt]


def as_prompt_list(prompts: Prompts) -> Sequence[str | ChatPrompt]:
    """Returns a list of prompts, of which a single one is the only item.

    Raises:
      ConfigError: it is empty, an item is not a text, or a conversation does not end with a
        question.
    """
    prompts = [prompts] if isinstance(prompts, str | ChatPrompt) else prompts
    is_list = isinstance(prompts, list | tuple) and len(prompts) > 0
    if not is_list or not all(isinstance(prompt, str | ChatPrompt) for prompt in prompts):
        raise ConfigError(
            f"prompts is {reprlib.repr(prompts)}: it must be text, or a list of texts."
        )
    for prompt in prompts:
        if isinstance(prompt, ChatPrompt) and len(prompt.turns) % 2 == 0:
            raise ConfigError(
                f"a conversation has {len(prompt.turns)} turns: questions and answers alternate, "
                "and the last turn must be a question."
            )
    return prompts


def check_answers(answers: Sequence[str], prompts: Sequence[str | ChatPrompt]) -> None:
    """Raises CheckpointError unless there is one answer per prompt, and each is a text."""
    if isinstance(answers, str) or len(answers) != len(prompts):
        raise CheckpointError(
            f"answers must be a list of {len(prompts)} texts, one for each prompt."
        )
    for index, answer in enumerate(answers):
        if not isinstance(answer, str):
            raise CheckpointError(f"answers[{index}] is {reprlib.repr(answer)}, not a text.")


def stack_prompts(
    prompts: Sequence[Prompt], pad_id: int, multiple: int = 1
) -> dict[str, np.ndarray]:
    """Stacks prompts as inputs of a model, by name; shorter ones are padded on the left.

    Args:
      multiple: T is rounded up to a multiple of it.

    Returns:
      input_ids, attention_mask and, for a family that has them, token_type_ids (B, T) int32, and
      cross_attention_mask (B, T, I, J) or image_attention_mask (B, T, I) int32.
    """
    longest = max(len(prompt.input_ids) for prompt in prompts)
    shape = (len(prompts), longest + -longest % multiple)
    ids = np.full(shape, pad_id, np.int32)
    attention_mask, types = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for row, prompt in enumerate(prompts):
        start = shape[1] - len(prompt.input_ids)
        ids[row, start:] = prompt.input_ids
        attention_mask[row, start:] = 1
        if prompt.token_type_ids is not None:
            types[row, start:] = prompt.token_type_ids
    inputs = {"input_ids": ids, "attention_mask": attention_mask}
    if any(prompt.token_type_ids is not None for prompt in prompts):
        inputs["token_type_ids"] = types
    for name in IMAGE_MASKS:
        masks = [getattr(prompt, name) for prompt in prompts]
        if any(mask is not None for mask in masks):
            inputs[name] = _stack_masks(masks, shape)
    return inputs


def _stack_masks(masks: Sequence[np.ndarray | None], shape: tuple[int, int]) -> np.ndarray:
    """Stacks masks (T, I, ...) of images as (B, T, I, ...); a prompt without images has none.

    Missing images are 0, up to the number of images of the prompt that has most.
    """
    sizes = np.max([mask.shape[1:] for mask in masks if mask is not None], axis=0)
    stacked = np.zeros((*shape, *sizes), np.int32)
    for row, mask in zip(stacked, masks, strict=True):
        if mask is not None:
            row[shape[1] - len(mask) :, : mask.shape[1]] = mask
    return stacked


def to_ids(ids: Sequence[int]) -> np.ndarray:
    return np.array(ids, np.int32)
