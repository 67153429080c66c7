"""Runs every benchmark on this machine and writes the tables of docs/performance.md.

    python experiments/benchmarks/all.py [--only train_step decode ...]

Takes 20 to 30 minutes on two cores; leave the machine alone meanwhile. The results go to
`experiments/benchmarks/results/cpu/PROCESSOR.json`, with the machine and its load before and after.
The table of the document has one column for each of these files. `--table` writes it anew without
measuring. `--big_vision DIR` is handed to `train_step.py`.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import report

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results" / "cpu"
DOCUMENT = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
# Script -> arguments: fewer turns than the script's own default.
BENCHMARKS = {
    "train_step": ["--turns", "5"],
    "lora": ["--turns", "5"],
    "decode": ["--turns", "3"],
    "serve": ["--turns", "3"],
    "questions": ["--turns", "5"],
    "start": ["--pairs", "3"],
    "loading": [],
    "input_pipeline": [],
    "packing": [],
    "native": [],
    "step": ["--turns", "3"],
    "metrics": [],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    parser.add_argument("--table", action="store_true", help="only write the document's table")
    parser.add_argument("--big_vision", metavar="DIR", help="for train_step.py")
    options = parser.parse_args()
    if options.big_vision is not None:
        BENCHMARKS["train_step"] += ["--big_vision", options.big_vision]
    if not options.table:
        failed = measure(options.only)
        if failed:
            raise SystemExit(f"failed, and keep their earlier results: {', '.join(failed)}")
    DOCUMENT.write_text(with_table(DOCUMENT.read_text(), table(load())))
    print(f"Wrote the table of {DOCUMENT.relative_to(ROOT)}.")


def measure(names: list[str]) -> list[str]:
    """Runs the benchmarks one after the other; returns the names of those that failed.

    The processor's file is written after each of them. Earlier results of the same processor stay
    where a benchmark was not run or failed.
    """
    start, load_before, failed = time.monotonic(), os.getloadavg()[0], []
    machine = report.machine()
    file = RESULTS / f"{slug(machine)}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    earlier = json.loads(file.read_text()) if file.exists() else {"results": {}, "commits": {}}
    results, commits = earlier["results"], earlier["commits"]
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            output = Path(folder) / f"{name}.json"
            command = [sys.executable, HERE / f"{name}.py", *BENCHMARKS[name], "--json", output]
            print(f"{time.monotonic() - start:5.0f} s  {name}", flush=True)
            if subprocess.run(command, cwd=ROOT).returncode:
                failed.append(name)
                continue
            results[name] = json.loads(output.read_text())
            commits[name] = commit()
            measured = {
                "machine": machine,
                "date": date.today().isoformat(),
                "commits": commits,  # of each script, when it ran
                "load_before": load_before,
                # Includes the load of the benchmarks themselves.
                "load_after": os.getloadavg()[0],
                "seconds": round(time.monotonic() - start),
                "results": results,
            }
            file.write_text(json.dumps(measured, indent=1) + "\n")
            print(f"Wrote {file.relative_to(ROOT)}.")
    return failed


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def slug(machine: dict) -> str:
    """Returns a file name for a processor: its name and model number."""
    name = f"{machine['processor']} {machine['model'].split()[-1]} {machine['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def load() -> list[dict]:
    """Returns the results of every processor."""
    return [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))]


def table(processors: list[dict]) -> str:
    """Returns one Markdown table: a row for each figure, a column for each processor."""
    if not processors:
        return "Not measured yet."
    heads = [title(measured) for measured in processors]
    lines = [f"| | {' | '.join(heads)} | command |", f"|---|{'---|' * (len(heads) + 1)}"]
    for script in BENCHMARKS:
        # The newest names of a figure come from whichever processor has it.
        figures = {}
        for column, measured in enumerate(processors):
            for result in measured["results"].get(script, []):
                row = figures.setdefault((result["name"], result["unit"]), {})
                row[column] = report.Result(**result)
        for (name, unit), row in figures.items():
            cells = [cell(row.get(column)) for column in range(len(processors))]
            lines.append(f"| {name}, {unit} | {' | '.join(cells)} | `{script}.py` |")
    return "\n".join(lines)


def title(measured: dict) -> str:
    """Returns the head of a column: what was measured, and when."""
    machine = measured["machine"]
    sets = [name for name in ("avx512f", "amx_tile") if name in machine["instruction_sets"]]
    return (
        f"{machine['processor']} (model {machine['model'].split()[-1]}; "
        f"{', '.join(sets) or 'AVX2'}), {machine['cores']} cores, {measured['date']}"
    )


def cell(result: report.Result | None) -> str:
    """Returns median (range; fastest calls)."""
    if result is None:
        return "not measured"
    text = f"{result.median:.2f} ({result.lowest:.2f} to {result.highest:.2f}"
    return f"{text}; {result.fastest:.2f})" if result.fastest is not None else f"{text})"


def with_table(document: str, new: str) -> str:
    """Returns the document with the text between the two marks replaced."""
    before, rest = document.split(BEGIN)
    return f"{before}{BEGIN}\n{new}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    main()
