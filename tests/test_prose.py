"""The voice of CONTRIBUTING.md in docstrings and documents, as far as a pattern can check it."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
QUESTION = re.compile(r"(What|Which|Whether|Where|How|Of|Whose)\b")
UNUSUAL = re.compile(r"\bat the (?:most|least)\b|\bin the place of\b|\bso many\b|\btold apart\b")
QUOTED = re.compile(r'"[^"\n]*"|`[^`\n]*`|```.*?```', re.S)
MAX_README_LINES = 150
TO_BE_WRITTEN = "vlm_jax/data/builders/stripes.py"  # by the reader of docs/datasets.md


def docstrings() -> list[tuple[str, str]]:
    """(file:line, docstring) of every module, class and function of the package."""
    found = []
    for path in sorted((ROOT / "vlm_jax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text:
                    line = getattr(node, "lineno", 1)
                    found.append((f"{path.relative_to(ROOT)}:{line}", text))
    return found


def test_docstrings_begin_with_a_verb_or_a_noun():
    assert not [place for place, text in docstrings() if QUESTION.match(text)]


def test_no_unusual_idioms():
    texts = docstrings() + [(path.name, path.read_text()) for path in DOCUMENTS]
    assert not [place for place, text in texts if UNUSUAL.search(QUOTED.sub("", text))]


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_README_LINES


def test_paths_in_documents_exist():
    """Paths with a folder, relative to the repository, the package or the document."""
    missing = []
    for document in [*DOCUMENTS, ROOT / "vlm_jax/hub/families/README.md"]:
        text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.M | re.S)
        text = text.replace(TO_BE_WRITTEN, "")
        for path in re.findall(r"`((?:[\w.-]+/)+[\w.-]*)`", text):
            bases = (ROOT, ROOT / "vlm_jax", document.parent, ROOT / "experiments/benchmarks")
            if re.search(r"\.(py|md|sh|txt|ipynb)$", path) and not any(
                (base / path).exists() for base in bases
            ):
                missing.append((document.name, path))
        for path in re.findall(r"\]\((?!http)([^)#]+)", text):
            if not (document.parent / path).exists():
                missing.append((document.name, path))
    assert not missing
