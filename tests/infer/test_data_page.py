"""The command `data` shows the tokens, scores and masks of training."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from vlm_jax.cli.main import main
from vlm_jax.config import Source, UserError
from vlm_jax.data import packing, pipeline
from vlm_jax.infer.data_page import counts, examples, page
from vlm_jax.testing import hybrid_in_tiles, variants, write_conversations

KINDS = variants() | {"hybrid": hybrid_in_tiles()}
CONFIG = """
from dataclasses import replace
from vlm_jax.config import Data
from vlm_jax.testing import tiny
def get_config():
    cfg = tiny()
    decoder = replace(cfg.decoder, max_positions=512)
    return replace(cfg, data={data!r}, decoder=decoder, eval=replace(cfg.eval, split=""))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return replace(write_conversations(tmp_path_factory.mktemp("talks"), count=9), text_length=60)


@pytest.fixture
def config(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.py").write_text(CONFIG.format(data=data))
    return "small.py"


def experiment(kind, data):
    cfg = KINDS[kind]
    return replace(cfg, data=data, decoder=replace(cfg.decoder, max_positions=512))


def test_json_has_the_examples_that_are_packed(config, data, capsys):
    assert main(["data", "--config", config, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    cfg = experiment("unified", data)
    tokenizer = pipeline.train_tokenizer(cfg)
    source, _ = pipeline.training_conversations(cfg, tokenizer)
    assert len(lines) == len(source)
    for line, conversation in zip(lines, source):
        fields = packing.encode_for_packing(cfg, tokenizer, lambda index: 1, conversation)
        assert list(line) == ["id", "tokens", "scored", "images", "segments"]
        assert line["tokens"] == fields["tokens"].tolist()
        weights = fields["loss_weights"][:-1]
        assert line["scored"] == [0, *weights.astype(int).tolist()]
        scored = np.flatnonzero(line["scored"])
        assert [line["tokens"][i] for i in scored] == fields["targets"][scored - 1].tolist()
        assert line["images"] == list(conversation.images)
        assert set(line["segments"]) == {1}
    assert main(["data", "--config", config, "--json", "--rows", "2"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == lines[:2]


@pytest.mark.parametrize(
    ("kind", "is_conversations"), [*((kind, True) for kind in KINDS), ("unified", False)]
)
def test_the_page_has_the_rows_of_training(kind, is_conversations, data, datasets_dir, tmp_path):
    cfg = experiment(kind, data)
    if not is_conversations:
        few = replace(KINDS[kind].data, dir=datasets_dir, text_length=60, train_split="train[:16]")
        cfg = replace(cfg, data=few)
    tokenizer = pipeline.train_tokenizer(cfg)
    batch = next(pipeline.training_iterator(cfg, tokenizer))
    rows = page.read_rows(cfg, tokenizer, 3)
    # Of 8 rows 2 are shown of each batch.
    for row, number in zip(rows, (0, 1)):
        assert row.tokens.tolist() == batch.tokens[number].tolist()
        assert np.array_equal(row.is_scored[1:], batch.loss_weights[number][:-1] > 0)
        assert np.array_equal(row.image_mask, batch.image_mask[number])
        assert len(row.pictures) == batch.images.shape[1]
        others = row.segment_ids[:, None] != row.segment_ids
        assert not (row.attention_mask & others).any()
        assert len(row.ids) == (row.segment_ids.max() if is_conversations else 1)
    result = counts.count(cfg, tokenizer, examples.read(cfg, tokenizer))
    assert sum(each.count for each in result.histogram) == (9 if is_conversations else 16)
    page.write(tmp_path / "data.html", cfg, result, rows)
    text = (tmp_path / "data.html").read_text()
    assert text.count("<mark class=") == sum(int(row.is_scored.sum()) for row in rows)
    assert not re.search(r'(?:src|href)="(?!data:)|url\(|@import', text)


def test_texts_are_escaped(data, tmp_path):
    talk = [{"from": "human", "value": "<b>&"}, {"from": "gpt", "value": "<script>$x"}]
    path = tmp_path / "talks.json"
    path.write_text(json.dumps([{"id": "<i>$title", "conversations": talk}]))
    files = (str(path),)
    cfg = experiment("unified", replace(data, files=files, dir=str(tmp_path / "sets")))
    tokenizer = pipeline.train_tokenizer(cfg)
    rows = page.read_rows(cfg, tokenizer, 1)
    result = counts.count(cfg, tokenizer, examples.read(cfg, tokenizer))
    page.write(tmp_path / "data.html", cfg, result, rows)
    text = (tmp_path / "data.html").read_text()
    assert "&lt;i&gt;$title" in text
    assert "<b>" not in text
    assert text.count("<script>") == 1


def test_a_page_replaces_pages_alone(config, tmp_path, capsys):
    for _ in range(2):
        assert main(["data", "--config", config, "--rows", "1"]) == 0
    printed = capsys.readouterr()
    assert "9, each a conversation" in printed.out
    assert "data.html" in printed.out
    (tmp_path / "data.html").write_text("mine")
    assert main(["data", "--config", config]) == 2
    assert "was not written by this command" in capsys.readouterr().err
    assert (tmp_path / "data.html").read_text() == "mine"
    with pytest.raises(UserError, match="must be a file in a folder that exists"):
        page.check_path(tmp_path / "missing" / "data.html")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "0"], "--rows is 0: it must be at least 1"),
        (["--json", "--out", "a.html"], "--json writes no page"),
        ([], "data needs --config FILE"),
    ],
)
def test_mistakes_are_one_sentence(arguments, message, capsys):
    assert main(["data", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_sources_of_a_mixture_are_named_and_counted(data, tmp_path):
    sources = (Source("asked", weight=1.0), Source("told", weight=3.0, template="vicuna"))
    cfg = experiment("unified", replace(data, mixture=sources))
    tokenizer = pipeline.train_tokenizer(cfg)
    read = list(examples.read(cfg, tokenizer))
    assert [example.as_json()["source"] for example in read] == ["asked"] * 9 + ["told"] * 9
    assert [example.id for example in examples.read(cfg, tokenizer, 2)] == ["talk 0", "talk 1"]
    result = counts.count(cfg, tokenizer, read)
    tokens = sum(len(example.tokens) for example in read[9:])
    expected = f"9 examples, {tokens:,} tokens; 75.0% of the examples of the training"
    assert result.lines["source told"] == expected
    rows = page.read_rows(cfg, tokenizer, 2)
    assert {name.partition("/")[0] for row in rows for name in row.ids} == {"asked", "told"}
    page.write(tmp_path / "data.html", cfg, result, rows)
    assert "told: conversations train" in (tmp_path / "data.html").read_text()
