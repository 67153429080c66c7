"""The code that families/README.md quotes is the source's."""

import re
from pathlib import Path

FOLDER = Path("vlm_jax/hub/families")
SOURCES = (FOLDER / "gpt2.py", Path("tests/hub/families/test_gpt2.py"))


def test_quoted_code_is_in_the_source():
    source = "\n".join(path.read_text() for path in SOURCES)
    quotes = re.findall(r"```python\n(.*?)\n```", (FOLDER / "README.md").read_text(), re.DOTALL)
    assert len(quotes) == 6
    for quote in quotes:
        assert f"\n{quote}\n" in source, quote
