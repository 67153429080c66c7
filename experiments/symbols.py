"""Draws 1,960 pictures of symbols, and tables of their names: an example of your own data.

python experiments/symbols.py --folder symbols

The folder gets `pictures/`, and `train.csv` and `test.csv` with the columns image, question and
answer. A picture of the test table has a color and a size that its symbol does not have in the
other table.
"""

import csv
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import tyro
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

FONT = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
CHARACTERS = range(0x2600, 0x27C0)  # Unicode's Miscellaneous Symbols and Dingbats
COLORS = {"red": "#d02030", "green": "#108040", "blue": "#2040d0", "violet": "#8030a0"}
SIZES_PX = (32, 36, 40, 44, 48)
IMAGE_PX = 64


@dataclass(frozen=True)
class Options:
    folder: Path  # to write


def symbols() -> dict[str, str]:
    """Returns the characters of the font whose names have at most two words, with their names."""
    drawn = TTFont(FONT).getBestCmap()
    names = {}
    for code in CHARACTERS:
        name = unicodedata.name(chr(code), "").lower()
        if code in drawn and name and name.count(" ") < 2 and "-" not in name:
            names[chr(code)] = name
    return names


def draw(character: str, color: str, size_px: int) -> Image.Image:
    image = Image.new("RGB", (IMAGE_PX, IMAGE_PX), "white")
    font = ImageFont.truetype(str(FONT), size_px)
    center = (IMAGE_PX // 2, IMAGE_PX // 2)
    ImageDraw.Draw(image).text(center, character, color, font, anchor="mm")
    return image


def write_pictures(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Writes every picture; yields its table, train or test, and its row."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for index, (character, name) in enumerate(symbols().items()):
        for place, (color, value) in enumerate(COLORS.items()):
            for number, size_px in enumerate(SIZES_PX):
                image = f"pictures/{name.replace(' ', '_')}_{color}_{size_px}.png"
                draw(character, value, size_px).save(folder / image)
                is_test = (index + place + number) % len(SIZES_PX) == 0
                row = {"image": image, "question": "what is it?", "answer": f"{color} {name}"}
                yield ("test" if is_test else "train"), row


def main(options: Options) -> None:
    rows = list(write_pictures(options.folder))
    for table in ("train", "test"):
        with open(options.folder / f"{table}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, ["image", "question", "answer"])
            writer.writeheader()
            writer.writerows(row for name, row in rows if name == table)
    print(f"{len(rows)} pictures are in {options.folder}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
