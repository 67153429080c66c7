"""The page `data.html`: rows of the first batches as the model gets them.

It is one file without network access: its pictures are data URLs.
"""

import base64
import html
import io
import itertools
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from vlm_jax.config import ConfigError, Experiment, Vision
from vlm_jax.data import native, pipeline
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.hub.images.steps import PixelScale
from vlm_jax.infer.data_page.counts import Counts, describe_dataset
from vlm_jax.infer.data_page.examples import shift_scores
from vlm_jax.nn.fusion import self_attention_mask
from vlm_jax.runtime.workdir import write_atomic
from vlm_jax.structs import NO_IMAGE, PADDING, TRUNK, Batch

# By this line a page of this command is recognized, which may be overwritten.
GENERATOR = '<meta name="generator" content="vlm_jax data">'
TEMPLATE = Path(__file__).with_name("page.html")
MASK_PX = 480  # largest side of a drawn mask
COLORS = np.array([(47, 111, 214), (31, 138, 76), (184, 92, 0), (140, 70, 180)], np.uint8)
NO_COLOR = np.array((245, 245, 245), np.uint8)


@dataclass(frozen=True)
class Row:
    """A row of a batch as arrays of its S slots."""

    ids: list  # of its examples
    texts: list[str]  # of its tokens
    tokens: np.ndarray
    is_scored: np.ndarray
    segment_ids: np.ndarray
    branch_ids: np.ndarray
    positions: np.ndarray
    is_image: np.ndarray  # slots of image tokens in the sequence
    image_mask: np.ndarray  # (S, I)
    attention_mask: np.ndarray  # (S, S)
    pictures: list[Image.Image]  # of the I views; empty: text only

    @property
    def length(self) -> int:
        """Slots up to the last token."""
        return int(np.flatnonzero(self.segment_ids != PADDING)[-1]) + 1


def check_path(path: Path) -> None:
    """Raises ConfigError if a page cannot be written to `path`, or another file is there."""
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"--out {path} must be a file in a folder that exists.")
    if not path.exists():
        return
    with open(path, "rb") as file:
        is_page = GENERATOR.encode() in file.read(1000)
    if not is_page:
        raise ConfigError(
            f"--out {path} exists and was not written by this command: choose another name."
        )


def read_rows(cfg: Experiment, tokenizer: Tokenizer, count: int) -> list[Row]:
    """Returns `count` rows of the first batches of training."""
    batch_size = cfg.train.batch_size
    # Only the images of the rows to show are read: those of one of many processes.
    shown = max(n for n in range(1, min(count, batch_size) + 1) if batch_size % n == 0)
    step = batch_size // shown
    batches = pipeline.training_iterator(cfg, tokenizer, 0, step)
    rows: list[Row] = []
    while len(rows) < count:
        ids = pipeline.row_ids(cfg, tokenizer, batches.get_state())[:shown]
        rows += _split(cfg, tokenizer, next(batches), ids)
    return rows[:count]


def describe_padding(rows: list[Row]) -> str:
    """Returns a sentence about the slots without a token."""
    empty = sum(int(np.sum(row.segment_ids == PADDING)) for row in rows)
    slots = sum(len(row.tokens) for row in rows)
    return f"padding: {empty / slots:.1%} of the {slots:,} slots of {len(rows)} rows"


def write(path: Path, cfg: Experiment, counts: Counts, rows: list[Row]) -> None:
    """Writes the page of counts and rows."""
    content = "\n".join([*_write_counts(counts, rows), *_write_rows(cfg, rows)])
    title = html.escape(describe_dataset(cfg))
    template = string.Template(TEMPLATE.read_text())
    page = template.substitute(generator=GENERATOR, title=title, content=content)
    write_atomic(path, page)


def _split(cfg: Experiment, tokenizer: Tokenizer, batch: Batch, ids: list[list]) -> Iterator[Row]:
    is_scored = shift_scores(batch.loss_weights)
    inputs = jax.tree.map(jnp.asarray, batch.replace(images=None))
    attention = np.asarray(self_attention_mask(inputs))[:, 0]  # (B, S, S)
    branch_ids = batch.branch_ids
    if branch_ids is None:
        branch_ids = np.full_like(batch.segment_ids, TRUNK)
    for number in range(len(batch.tokens)):
        pictures = []
        if batch.images is not None:
            pictures = _to_pictures(batch, number, cfg.vision)
        yield Row(
            ids=ids[number],
            texts=[tokenizer.show_token(token) for token in batch.tokens[number]],
            tokens=batch.tokens[number],
            is_scored=is_scored[number],
            segment_ids=batch.segment_ids[number],
            branch_ids=branch_ids[number],
            positions=batch.positions[number],
            is_image=batch.image_token_index[number] != NO_IMAGE,
            image_mask=batch.image_mask[number],
            attention_mask=attention[number],
            pictures=pictures,
        )


def _to_pictures(batch: Batch, row: int, vision: Vision) -> list[Image.Image]:
    """Returns the views of a row, or its images at native resolution, as pictures."""
    views = batch.images[row]
    if vision.is_native:
        packed = (views, batch.patch_images[row], batch.patch_places[row])
        views = native.unpack(*packed, vision.patch_size_px)
    else:
        views = views.reshape(-1, *views.shape[-3:])
    scale = PixelScale(vision.image_mean, vision.image_std)
    return [Image.fromarray(scale.to_rgb(view)) for view in views]


# ---- HTML


def _write_counts(counts: Counts, rows: list[Row]) -> Iterator[str]:
    yield "<section><h2>Counts</h2><dl>"
    for name, value in counts.lines.items():
        yield f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>"
    yield "</dl>"
    yield f"<p>{html.escape(describe_padding(rows))}</p>"
    if counts.cut_message:
        yield f'<p class="warning">{html.escape(counts.cut_message)}</p>'
    yield "<h3>Tokens of an example</h3><table><tr><th>tokens<th>examples<th>"
    most = max(each.count for each in counts.histogram)
    for each in counts.histogram:
        yield (
            f"<tr><td>{each.first:,}&ndash;{each.last:,}<td>{each.count:,}"
            f'<td class="bar"><div style="width:{each.count / most:.1%}"></div>'
        )
    yield "</table></section>"


def _write_rows(cfg: Experiment, rows: list[Row]) -> Iterator[str]:
    yield "<section><h2>Rows</h2>"
    for number, row in enumerate(rows):
        is_open = " open" if number == 0 else ""
        used = int(np.sum(row.segment_ids != PADDING))
        yield (
            f"<details{is_open}><summary>Row {number + 1}: {used:,} of {len(row.tokens):,} slots, "
            f"{int(row.is_scored.sum()):,} scored</summary>"
        )
        for segment in range(1, int(row.segment_ids.max()) + 1):
            yield from _write_segment(row, segment)
        yield from _write_masks(cfg, row)
        yield "</details>"
    yield "</section>"


def _write_segment(row: Row, segment: int) -> Iterator[str]:
    slots = np.flatnonzero(row.segment_ids == segment)
    name = html.escape(str(row.ids[segment - 1]))
    yield f"<h3>Segment {segment}: {name}</h3>"
    views = np.flatnonzero(row.image_mask[slots].any(axis=0))
    if row.pictures and len(views):
        yield '<p class="pictures">'
        for view in views:
            source = _data_url(row.pictures[view])
            yield f'<img src="{source}" alt="image {view + 1}" title="image {view + 1}">'
        yield "</p>"
    yield '<div class="tokens" tabindex="0" role="group" aria-label="tokens">'
    yield "".join(_write_tokens(row, slots))
    yield '</div><p class="token" aria-live="polite"></p>'


def _write_tokens(row: Row, slots: np.ndarray) -> Iterator[str]:
    """Writes each token of text as an element, and consecutive tokens of images as one."""
    for (is_image, branch), group in itertools.groupby(
        slots, lambda slot: (bool(row.is_image[slot]), int(row.branch_ids[slot]))
    ):
        group = list(group)
        first, last = group[0], group[-1]
        kind = f" b{branch % 4}" if branch != TRUNK else ""
        place = f"branch {branch}" if branch != TRUNK else "trunk"
        if is_image:
            info = f"slots {first} to {last}: {len(group)} image tokens"
            yield f'<span class="image" data-info="{info}">{len(group)} image tokens</span>'
            continue
        for slot in group:
            scored = "scored" if row.is_scored[slot] else "not scored"
            info = (
                f"slot {slot}: id {row.tokens[slot]}, {scored}, {place}, "
                f"position {row.positions[slot]}"
            )
            tag = "mark" if row.is_scored[slot] else "span"
            text = html.escape(_visible(row.texts[slot]))
            yield f'<{tag} class="t{kind}" data-info="{info}">{text}</{tag}>'
            if "\n" in row.texts[slot]:
                yield "<br>"


def _visible(text: str) -> str:
    return text.replace(" ", "\u00b7").replace("\n", "\u21b5").replace("\t", "\u21e5")


def _write_masks(cfg: Experiment, row: Row) -> Iterator[str]:
    length = row.length
    owners = row.segment_ids[:length]
    yield '<div class="masks">'
    yield _write_mask(
        row.attention_mask[:length, :length], owners, "self-attention: row token, column token"
    )
    if cfg.fusion.image_in_memory:
        yield _write_mask(
            row.image_mask[:length], owners, "cross-attention: row token, column image"
        )
    yield "</div>"


def _write_mask(mask: np.ndarray, owners: np.ndarray, caption: str) -> str:
    """Draws a mask (tokens, keys); the color is the segment of the token."""
    colors = COLORS[(owners - 1) % len(COLORS)][:, None]
    pixels = np.where(mask[..., None], colors, NO_COLOR)
    picture = Image.fromarray(pixels.astype(np.uint8))
    height, width = mask.shape
    scale = min(MASK_PX / max(height, width), 8)
    size = (max(round(width * scale), 24), max(round(height * scale), 1))
    source = _data_url(picture.resize(size, Image.Resampling.NEAREST))
    text = html.escape(f"{caption} ({height} x {width})")
    return f'<figure><img src="{source}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def _data_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
