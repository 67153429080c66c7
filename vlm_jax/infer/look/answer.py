"""The answer to one prompt, with the maps of its words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vlm_jax.hub.text.tokenizer import REPLACEMENT_CHAR
from vlm_jax.infer import rows
from vlm_jax.infer.answer import Request, question
from vlm_jax.infer.look import COMPUTED
from vlm_jax.infer.look.maps import append_answer, look
from vlm_jax.infer.look.pictures import Layout, Picture, join_views
from vlm_jax.infer.processor import Processor

END = "(end)"  # stands for the end token of an empty answer


@dataclass(frozen=True)
class WordMaps:
    """An answer of W words, and the attention of each word over the images of its prompt.

    A word of several tokens has the mean of their maps.
    """

    model: str  # its name
    prompt: str
    words: tuple[str, ...]
    layers: tuple[str, ...]
    pictures: tuple[Picture, ...]
    #: for each image: (W, L, N, rows, columns)
    weights: tuple[np.ndarray, ...]
    #: rollout and gradient, if computed -> for each image (W, rows, columns)
    combined: Mapping[str, tuple[np.ndarray, ...]]

    @property
    def answer(self) -> str:
        return "".join(self.words).strip()

    def combine(self, method: str) -> tuple[np.ndarray, ...]:
        """Returns for each image one map for each word, (W, rows, columns)."""
        if method == "mean":
            return tuple(weights.mean((1, 2)) for weights in self.weights)
        if method == "max":
            return tuple(weights.max((1, 2)) for weights in self.weights)
        return self.combined[method]


def look_at_answer(
    request: Request,
    params,
    name: str,
    layouts: Sequence[Layout],
    methods: Sequence[str] = (),
    ids: Sequence[int] | None = None,
    pad_to_multiple_of: int = 1,
) -> WordMaps:
    """Answers the prompt of a request, and returns the maps of the answer's words.

    The answer is generated, and then read again in one forward pass.

    Args:
      name: of the model.
      layouts: tiles of each image, of `pictures.image_layouts`.
      methods: which of rollout and gradient to compute.
      ids: tokens of the answer if it was generated before.
      pad_to_multiple_of: the length of the forward pass, S + A - 1, is rounded up to a multiple of
        it, so that several answers share compiled programs.

    Raises:
      ConfigError: the model reads no image, or the prompt has none.
      NonFiniteLogits: the model computes NaN.
    """
    if ids is None:
        (ids,) = request.answer_ids(params)
    words = split_words(request.processor, ids)
    count = max(tokens.stop for _, tokens in words)
    batch = append_answer(request.batch, ids[:count])
    free = -batch.tokens.shape[1] % pad_to_multiple_of
    batch = rows.pad_text(batch, after=free)
    computed = {name: name in methods for name in COMPUTED}
    (maps,) = look(request.model, params, batch, **computed)
    vision, scale = request.model.cfg.vision, request.processor.pixel_scale()
    pictures = join_views(vision, scale, batch, 0, layouts)
    slices = [tokens for _, tokens in words]
    combined = {}
    for method in methods:
        by_word = _mean_of_words(maps.combine(method), slices)
        combined[method] = tuple(picture.join(by_word) for picture in pictures)
    by_word = _mean_of_words(maps.weights, slices)
    return WordMaps(
        model=name,
        prompt=question(request.prompts[0]),
        words=tuple(text for text, _ in words),
        layers=maps.layers,
        pictures=tuple(pictures),
        weights=tuple(picture.join(by_word) for picture in pictures),
        combined=combined,
    )


def split_words(processor: Processor, ids: Sequence[int]) -> list[tuple[str, slice]]:
    """Splits an answer into words with the white space before them, and the tokens of each.

    Tokens that are parts of one character belong to one word. Of an answer without a word, it is
    the first token.
    """
    words, shown, start = [], 0, 0
    ends = [i for i, token in enumerate(ids) if token in processor.eos_ids]
    length = ends[0] if ends else len(ids)
    for i in range(length):
        # A stream would withhold text that later tokens may change: the tokens of a word would be
        # unknown.
        text = processor.decode(ids[: i + 1])
        if i + 1 < length:
            text = text.rstrip(REPLACEMENT_CHAR)
        piece, shown = text[shown:], max(shown, len(text))
        if not piece:
            continue
        if not words or piece[0].isspace():
            words.append((piece, slice(start, i + 1)))
        else:
            begin, tokens = words[-1]
            words[-1] = (begin + piece, slice(tokens.start, i + 1))
        start = i + 1
    return words or [(END, slice(0, 1))]


def _mean_of_words(maps: np.ndarray, words: Sequence[slice]) -> np.ndarray:
    """Maps of tokens (A, ...) -> maps of words (W, ...)."""
    return np.stack([maps[tokens].mean(0) for tokens in words])
