"""Maps of an answer as a picture: the image, then one overlay for each word."""

from collections.abc import Sequence
from pathlib import Path

from vlm_jax.infer.look.answer import WordMaps
from vlm_jax.infer.samples import pyplot, save_figure, wrap

COLUMNS = 6
MAX_WORDS = 23
CELL_INCHES = (1.9, 2.3)


def draw_maps(path: Path, answers: Sequence[WordMaps], method: str) -> None:
    """Draws the images and the maps of each model, in rows of `COLUMNS` cells.

    Of a longer answer, the first `MAX_WORDS` words are drawn, and the title says so.

    Args:
      answers: of one model, or of models to compare.
      method: combines layers and heads, one of `maps.METHODS`.
    """
    groups = [(answer, number) for answer in answers for number in range(len(answer.pictures))]
    heights = [-(-(1 + min(len(answer.words), MAX_WORDS)) // COLUMNS) for answer, _ in groups]
    columns = min(COLUMNS, 1 + max(len(answer.words) for answer in answers))
    size_inches = (columns * CELL_INCHES[0], sum(heights) * CELL_INCHES[1])
    figure, cells = pyplot.subplots(
        sum(heights), columns, figsize=size_inches, squeeze=False, layout="constrained"
    )
    for cell in cells.flat:
        cell.axis("off")
    first_row = 0
    for (answer, number), height in zip(groups, heights):
        _draw_group(cells[first_row : first_row + height].flat, answer, number, method)
        first_row += height
    save_figure(figure, path)


def _draw_group(cells, answer: WordMaps, number: int, method: str) -> None:
    """Draws one image of a prompt, and its map for each word."""
    picture, maps = answer.pictures[number], answer.combine(method)[number]
    drawn = answer.words[:MAX_WORDS]
    title = f"{wrap(answer.model)}\n{wrap(answer.prompt)}"
    if len(drawn) < len(answer.words):
        title += f"\nfirst {len(drawn)} of {len(answer.words)} words"
    pictures = [picture.pixels, *[picture.shade(weights) for weights in maps[: len(drawn)]]]
    for cell, pixels, text in zip(cells, pictures, [title, *map(wrap, drawn)]):
        cell.imshow(pixels, interpolation="nearest")
        # parse_math=False, because a model may write anything, "$" included.
        cell.set_title(text, fontsize=8, parse_math=False)
