"""Rows of `device.py`, and the JSON and Markdown files they are written to."""

import dataclasses
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

FAILURES = ("failed", "error")
MAX_CELL = 200  # characters of a table's cell


@dataclass(frozen=True)
class Row:
    """A check or a measurement: passed, failed, measured, error (an exception) or not run."""

    group: str
    name: str
    status: str
    values: dict = field(default_factory=dict)
    seconds: float = 0.0  # compilation included

    @property
    def table(self) -> str:
        return self.group.partition(":")[0]


class Report:
    """The rows so far, written to `folder` after each.

    Args:
      facts: of the device, its software and the commit.
    """

    def __init__(self, folder: Path, facts: dict):
        folder.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"[^a-z0-9]+", "_", facts["device"].lower()).strip("_")
        self.path = folder / name
        self.facts = facts
        self.rows: list[Row] = []

    def add(self, row: Row) -> None:
        self.rows.append(row)
        details = ", ".join(f"{key} {_cell(value)}" for key, value in row.values.items())
        print(
            f"{row.status:<9}{row.group}: {row.name} ({row.seconds:.0f} s)  {details}", flush=True
        )
        self.write()

    def summary(self) -> str:
        counts = Counter(row.status for row in self.rows)
        return ", ".join(f"{count} {status}" for status, count in counts.items())

    def write(self) -> None:
        document = {"device": self.facts, "rows": [dataclasses.asdict(row) for row in self.rows]}
        self.path.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
        self.path.with_suffix(".md").write_text(self.markdown())

    def markdown(self) -> str:
        lines = [f"# {self.facts['device']}", "", f"{self.summary()}.", ""]
        lines += [f"- {key}: {_cell(value)}" for key, value in self.facts.items()]
        for table in dict.fromkeys(row.table for row in self.rows):
            lines += ["", f"## {table}", *self._table(table)]
        return "\n".join(lines) + "\n"

    def _table(self, name: str) -> list[str]:
        rows = [row for row in self.rows if row.table == name]
        columns = list(dict.fromkeys(key for row in rows for key in row.values))
        header = [*("row", "status"), *columns]
        lines = [_line(header), _line(["---"] * len(header))]
        for row in rows:
            part = row.group.partition(":")[2]
            cells = [_cell(row.values.get(column, "")) for column in columns]
            lines.append(_line([f"{part} {row.name}".strip(), row.status, *cells]))
        return lines


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value) -> str:
    if value is None:
        return "not known"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "/").split())[:MAX_CELL]
