"""Contents of a report, written as Markdown with pictures beside it and as one HTML file."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from vlm_jax.runtime.workdir import write_atomic


@dataclass(frozen=True)
class Cell:
    """A table cell."""

    text: str
    # Darkness in a heat table, 0 to 1.
    shade: float | None = None
    is_number: bool = False


def number_cell(text: str) -> Cell:
    """Returns a cell that is aligned like a number."""
    return Cell(text, is_number=True)


@dataclass(frozen=True)
class Table:
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""


@dataclass(frozen=True)
class Picture:
    name: str  # file name
    caption: str
    png: bytes


@dataclass(frozen=True)
class Answer:
    """An arm's answer to a question."""

    arm: str
    text: str
    correct: bool


@dataclass(frozen=True)
class Sample:
    """A question on which arms disagree."""

    picture: Picture
    question: str
    answer: str
    type: str
    answers: Sequence[Answer]


@dataclass(frozen=True)
class Section:
    title: str
    text: Sequence[str] = ()  # paragraphs
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    samples: Sequence[Sample] = ()


@dataclass(frozen=True)
class Page:
    title: str
    lead: Sequence[str]  # paragraphs above all sections
    sections: Sequence[Section]


def write(page: Page, folder: Path) -> None:
    """Writes report.html, report.md and the pictures of the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    for section in page.sections:
        sample_pictures = [sample.picture for sample in section.samples]
        for picture in (*section.pictures, *sample_pictures):
            (folder / picture.name).write_bytes(picture.png)
    for name in ("report.html", "report.md"):
        write_atomic(folder / name, _template(name).render(page=page))


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=name.endswith(".html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["inline"] = lambda png: base64.b64encode(png).decode()
    environment.filters["cell"] = lambda text: text.replace("|", "\\|").replace("\n", " ")
    return environment.get_template(f"{name}.jinja")
