"""Maps of an answer as one HTML file, without links to anything else."""

import base64
import io
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from vlm_jax.infer.look import COMPUTED, METHODS
from vlm_jax.infer.look.answer import WordMaps
from vlm_jax.runtime.workdir import write_atomic

MAX_BYTES = 24 << 20  # of the maps of a model by layer and head, one byte each
TITLES = {  # of the methods of `look.METHODS`
    "mean": "mean of layers and heads",
    "max": "maximum of layers and heads",
    "rollout": "rollout through the layers",
    "gradient": "gradient-weighted relevance",
}
LARGEST = 255  # a map is stored as shares of its maximum, in this many steps


def write_page(path: Path, answers: Sequence[WordMaps], method: str) -> None:
    """Writes the file of `render_page`."""
    write_atomic(path, render_page(answers, method))


def render_page(answers: Sequence[WordMaps], method: str) -> str:
    """Returns the page with the maps of one model, or of models to compare side by side.

    The page begins with a method of combining layers and heads.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("look.html.jinja")
    panels = [_panel(answer) for answer in answers]
    # "<" would let a text of a model end the script that holds the data.
    data = json.dumps(panels).replace("<", "\\u003c")
    return template.render(answers=answers, panels=panels, method=method, data=data)


def merge_heads(answer: WordMaps) -> WordMaps:
    """Returns the maps as they are, or averaged over the heads if a page of them is too large."""
    if sum(weights.size for weights in answer.weights) <= MAX_BYTES:
        return answer
    means = tuple(weights.mean(2, keepdims=True) for weights in answer.weights)
    return replace(answer, weights=means)


def _panel(answer: WordMaps) -> dict[str, Any]:
    """Returns the data of a model for the page's script."""
    images = []
    for picture, weights in zip(answer.pictures, answer.weights):
        rows, columns = weights.shape[-2:]
        images.append({"source": _data_url(picture.pixels), "rows": rows, "columns": columns})
    methods = [name for name in METHODS if name not in COMPUTED or name in answer.combined]
    combined = {method: _pack(maps) for method, maps in answer.combined.items()}
    return {
        "methods": {name: TITLES[name] for name in methods},
        "words": answer.words,
        "layers": answer.layers,
        "heads": answer.weights[0].shape[2],
        "images": images,
        "weights": _pack(answer.weights),
        "combined": combined,
    }


def _pack(maps: Sequence[np.ndarray]) -> dict[str, str]:
    """Joins the cells of all images, (..., rows, columns) each, and stores them in 8 bits."""
    lead = maps[0].shape[:-2]
    cells = np.concatenate([x.reshape(math.prod(lead), -1) for x in maps], axis=1)
    peaks = cells.max(1, keepdims=True).astype("<f4")
    steps = np.round(cells / np.maximum(peaks, 1e-30) * LARGEST).astype(np.uint8)
    return {"peaks": _encode(peaks.tobytes()), "steps": _encode(steps.tobytes())}


def _data_url(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return f"data:image/png;base64,{_encode(file.getvalue())}"


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode()
