"""Results of the benchmarks: one form for all of them, and the machine they were measured on."""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers")
# Instruction sets that matrix products depend on.
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_tile")


@dataclass(frozen=True)
class Result:
    """One figure: the median of several turns with its range.

    `fastest` is the same figure of the fastest calls of all turns, which other work on the machine
    disturbs least.
    """

    name: str
    unit: str
    median: float
    lowest: float
    highest: float
    fastest: float | None = None

    @classmethod
    def of(
        cls, name: str, unit: str, values: Sequence[float], fastest: float | None = None
    ) -> "Result":
        return cls(name, unit, statistics.median(values), min(values), max(values), fastest)

    def __str__(self) -> str:
        text = f"{self.name:<52}{self.median:>8.2f}  ({self.lowest:.2f} to {self.highest:.2f}"
        if self.fastest is not None:
            text += f"; fastest calls {self.fastest:.2f}"
        return f"{text}) {self.unit}"


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON, too")


def write(results: Sequence[Result], file: Path | None) -> None:
    """Prints the results, and writes them to `file` unless it is None."""
    for result in results:
        print(result, flush=True)
    if file is not None:
        file.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")


def machine() -> dict:
    """Describes processor, cores, versions, and flags of this machine."""
    # Linux; elsewhere the processor's name may be all there is.
    lines = _cpuinfo()
    return {
        "processor": lines.get("model name") or platform.processor() or platform.machine(),
        "model": " ".join(lines.get(key, "?") for key in ("vendor_id", "cpu family", "model")),
        "instruction_sets": [x for x in INSTRUCTION_SETS if x in lines.get("flags", "").split()],
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "flags": {key: os.environ.get(key, "") for key in ("XLA_FLAGS", "GLIBC_TUNABLES")},
    }


def _cpuinfo() -> dict[str, str]:
    """Returns the first processor's lines of /proc/cpuinfo by name."""
    file = Path("/proc/cpuinfo")
    if not file.exists():
        return {}
    lines = {}
    for line in file.read_text().split("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        lines[name.strip()] = value.strip()
    return lines
