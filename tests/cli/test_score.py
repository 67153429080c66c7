"""The command `score`: JSON to stdout, one sentence for a mistake, and no accelerator code."""

import json
import re
import subprocess
import sys

import pytest

from vlm_jax.cli.main import main
from vlm_jax.infer.metrics.table import METRICS

LINES = [
    {"prediction": "2", "references": ["two"] * 3 + ["3"] * 7, "type": "number"},
    {"prediction": "3.", "references": ["two"] * 3 + ["3"] * 7, "type": "number", "id": 7},
    {"prediction": "", "references": ["red"] * 9 + ["blue"]},
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "answers.jsonl"
    # A byte order mark, an empty line and Windows line ends.
    path.write_text("\ufeff" + "\r\n\r\n".join(map(json.dumps, LINES)), newline="")
    return path


def score(capsys, *arguments):
    code = main(["score", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_scores_are_printed_as_json(file, capsys):
    code, out, err = score(capsys, "--predictions", file, "--metrics", "vqa_accuracy,anls")
    assert (code, err) == (0, "")
    scores = json.loads(out)
    assert scores["examples"] == 3
    # Left out, one of three "two" leaves 2 of 3.
    first = (3 * 2 / 3 + 7) / 10
    assert scores["vqa_accuracy"] == pytest.approx((first + 1 + 0) / 3)
    assert scores["vqa_accuracy_by_type"] == {"number": pytest.approx((first + 1) / 2)}
    assert scores["anls"] == pytest.approx((0 + 0.5 + 0) / 3)
    low, high = scores["anls_interval"]
    assert 0 <= low < scores["anls"] < high <= 1
    assert "vqaEval.py" in scores["metrics"]["vqa_accuracy"]["source"]
    assert "per_example" not in scores


def test_every_answer_has_its_scores(file, capsys):
    arguments = ("--predictions", file, "--metrics", "exact_match,text_vqa,bleu", "--per-example")
    _, out, _ = score(capsys, *arguments)
    lines = json.loads(out)["per_example"]
    assert [line["exact_match"] for line in lines] == [False, False, False]
    assert [line["text_vqa"] for line in lines] == pytest.approx([0.9, 1.0, 0.0])
    assert "bleu" not in lines[0], "one answer has no BLEU of the whole"


MISTAKES = {
    "not JSON": ('{"prediction": "a"', "is not valid JSON .column"),
    "a list": ("[1]", "must be an object with 'prediction'"),
    "no prediction": ('{"references": ["a"]}', "has no text 'prediction'"),
    "a number": ('{"prediction": 3, "references": ["3"]}', "has no text 'prediction'"),
    "no references": ('{"prediction": "a"}', "has no texts in 'references'"),
    "empty references": ('{"prediction": "a", "references": []}', "has no texts in 'references'"),
    "a text as references": ('{"prediction": "a", "references": "a"}', "has no texts in"),
    "a number as type": ('{"prediction": "a", "references": ["a"], "type": 1}', "has a 'type'"),
    "a text as choices": (
        '{"prediction": "a", "references": ["a"], "choices": "a"}',
        "has 'choices' that are not",
    ),
    "one reference": (
        '{"prediction": "a", "references": ["a"]}',
        "metric vqa_accuracy: the rule compares with several",
    ),
}


@pytest.mark.parametrize(("line", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_malformed_line_is_named(line, message, file, capsys):
    file.write_text(json.dumps(LINES[0]) + f"\n\n{line}\n")
    code, out, err = score(capsys, "--predictions", file, "--metrics", "vqa_accuracy")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {file}: line 3") and err.count("\n") == 1
    assert re.search(message, err), err


def test_other_mistakes_are_one_sentence(file, capsys):
    code, _, err = score(capsys, "--predictions", file, "--metrics", "vqa,anls")
    assert code == 2 and "'vqa' is not a metric" in err and all(name in err for name in METRICS)
    code, _, err = score(capsys, "--predictions", file.parent / "none.jsonl")
    assert code == 2 and "none.jsonl: No such file" in err
    file.write_text("\n")
    code, _, err = score(capsys, "--predictions", file)
    assert code == 2 and "has no predictions" in err
    file.write_bytes(b"\xff\xfe")
    code, _, err = score(capsys, "--predictions", file)
    assert code == 2 and "is not text in UTF-8" in err


def test_it_needs_no_accelerator_code(file):
    """Importing JAX alone takes seconds on some machines."""
    program = (
        "import sys; from vlm_jax.cli.main import main; code = main(sys.argv[1:]); "
        "sys.exit(code or bool({'jax', 'flax', 'scipy', 'tensorflow_datasets'} & set(sys.modules)))"
    )
    arguments = ["score", "--predictions", str(file), "--metrics", "vqa_accuracy,anls,cider"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True)
    assert done.returncode == 0, done.stderr
