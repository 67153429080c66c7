"""What a report consists of, and its two forms: Markdown with pictures beside it, and one HTML file."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from vlm_jax.runtime.workdir import write_atomic


@dataclass(frozen=True)
class Cell:
    """Of a table."""

    text: str
    shade: float | None = None  # 0 to 1: how dark it stands in a heat table
    is_number: bool = False


@dataclass(frozen=True)
class Table:
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""


@dataclass(frozen=True)
class Picture:
    name: str  # of its file
    caption: str
    png: bytes


@dataclass(frozen=True)
class Sample:
    """A question on which arms disagree."""

    picture: Picture
    question: str
    answer: str
    type: str
    said: Sequence[tuple[str, str, bool]]  # arm, its answer, whether that is right


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
    lead: Sequence[str]  # what stands above all sections
    sections: Sequence[Section]


def write(page: Page, folder: Path) -> None:
    """Writes report.html, report.md and the pictures of the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    for section in page.sections:
        for picture in (*section.pictures, *(sample.picture for sample in section.samples)):
            (folder / picture.name).write_bytes(picture.png)
    for name in ("report.html", "report.md"):
        write_atomic(folder / name, _template(name).render(page=page))


def _template(name: str) -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    escaped = name.endswith(".html")
    settings = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    environment = jinja2.Environment(
        loader=loader, autoescape=escaped, undefined=jinja2.StrictUndefined, **settings
    )
    environment.filters["inline"] = lambda png: base64.b64encode(png).decode()
    environment.filters["cell"] = lambda text: text.replace("|", "\\|").replace("\n", " ")
    return environment.get_template(f"{name}.jinja")
