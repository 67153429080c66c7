"""Image files for the checkpoints."""

from pathlib import Path

import numpy as np
from PIL import Image


def pictures(folder: Path) -> dict[str, Path]:
    """Image files of odd sizes in every mode that cameras and drawings have."""
    rng = np.random.default_rng(0)
    color = Image.fromarray(rng.integers(0, 256, (37, 53, 3), np.uint8))
    alpha = Image.fromarray(rng.integers(0, 256, (31, 29, 4), np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    files = {
        "color": (color, "a.jpg", {}),
        "tall": (Image.fromarray(rng.integers(0, 256, (91, 17, 3), np.uint8)), "b.png", {}),
        "gray": (color.convert("L"), "c.jpg", {}),
        "palette": (color.quantize(16), "d.png", {}),
        "alpha": (alpha, "e.png", {}),
        "turned": (color, "f.jpg", {"exif": turned}),
    }
    for image, name, options in files.values():
        image.save(folder / name, **options)
    return {kind: folder / name for kind, (_, name, _) in files.items()}
