"""The form of a row: what stands where, what is scored, and the tokenizer under it."""

from dataclasses import replace

import numpy as np
import pytest

from vlm_jax.config import (
    Data,
    Experiment,
    Fusion,
    Projector,
    UserError,
    Vision,
)
from vlm_jax.data import text
from vlm_jax.data.fields import image_fields
from vlm_jax.data.tokenizer import (
    EOS,
    IMAGE,
    NEWLINE,
    PAD,
    SPECIALS,
    Tokenizer,
)

TEXTS = ["is there a red shape in the image?", "what color is the circle?", "yes", "no", "red"] * 3


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 300)


def experiment(fusion="unified", newline=False, text_length=9) -> Experiment:
    """Two by two image tokens."""
    return Experiment(
        data=Data(text_length=text_length),
        vision=Vision(image_size_px=16, patch_size_px=8, newline_token=newline),
        fusion=Fusion(kind=fusion),
    )


# Two questions of 2 and 1 tokens with answers of 2 and 3.
PAIRS = [([10, 11], [12, EOS]), ([20], [21, 22, EOS])]


def test_a_packed_row_drawn_by_hand():
    row = text.pack_row(experiment(), PAIRS)
    i, e, p = IMAGE, EOS, PAD
    drawn = {
        "tokens": [i, i, i, i, 10, 11, 12, e, 20, 21, 22, e, p],
        "positions": [0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7, 0],
        "segment_ids": [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0],
        "branch_ids": [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 0],
        "image_token_index": [0, 1, 2, 3, -1, -1, -1, -1, -1, -1, -1, -1, -1],
        "image_mask": [[1], [1], [1], [1], [1], [1], [1], [1], [1], [1], [1], [1], [0]],
        "targets": [i, i, i, p, 11, 12, e, p, 21, 22, e, p, p],
        "loss_weights": [0, 0, 0, 0, 0, 1, 1, 0, 1, 1, 1, 0, 0],
    }
    assert {name: values.tolist() for name, values in row.items()} == drawn
    types = {"image_mask": np.bool_, "loss_weights": np.float32}
    assert {name: values.dtype for name, values in row.items()} == {
        n: types.get(n, np.int32) for n in drawn
    }


@pytest.mark.parametrize("kind", ["cross_attention", "encoder_decoder"])
def test_without_image_tokens_branches_start_at_zero(kind):
    row = text.pack_row(experiment(kind), PAIRS)
    assert row["tokens"].tolist() == [10, 11, 12, EOS, 20, 21, 22, EOS, PAD]
    assert row["positions"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    assert row["branch_ids"].tolist() == [1, 1, 1, 1, 2, 2, 2, 2, 0]
    assert row["loss_weights"].tolist() == [0, 1, 1, 0, 1, 1, 1, 0, 0]
    assert set(row["image_token_index"]) == {-1}
    assert row["image_mask"][:, 0].tolist() == [True] * 8 + [False]


@pytest.mark.parametrize("kind", ["unified", "cross_attention"])
def test_a_text_of_the_image_replaces_it(kind):
    """The row is one without images, in the shapes of the rows with one."""
    cfg = experiment(kind)
    shown = text.pack_row(cfg, PAIRS)
    cfg = replace(cfg, data=replace(cfg.data, transcript=True))
    row, alone = text.pack_row(cfg, PAIRS), text.pack_row(experiment("text_only"), PAIRS)
    assert not row["image_mask"].any() and (row["image_token_index"] == -1).all()
    for name, values in row.items():
        assert values.shape == shown[name].shape
        if name != "image_mask":
            slots = len(alone[name])
            np.testing.assert_array_equal(values[:slots], alone[name])
    assert not text.prompt_row(cfg, [10, 11])["image_mask"].any()
    assert text.prompt_row(cfg, [10, 11])["tokens"].tolist() == [10, 11]


def test_newlines_end_the_rows_of_the_grid_and_take_no_image_token():
    cfg = experiment(newline=True)
    row = text.pack_row(cfg, PAIRS)
    assert row["tokens"][:6].tolist() == [IMAGE, IMAGE, NEWLINE, IMAGE, IMAGE, NEWLINE]
    assert row["image_token_index"][:7].tolist() == [0, 1, -1, 2, 3, -1, -1]
    assert row["positions"][[6, 10]].tolist() == [6, 6]


@pytest.mark.parametrize(
    "projector",
    [Projector(), Projector("pixel_shuffle"), Projector("resampler", queries=5)],
    ids=lambda p: p.kind,
)
@pytest.mark.parametrize("newline", [False, True])
@pytest.mark.parametrize("fusion", ["unified", "cross_attention"])
def test_an_image_takes_the_slots_that_the_config_says(projector, newline, fusion):
    cfg = replace(experiment(fusion, newline), projector=projector)
    ids = image_fields(cfg)["tokens"]
    assert len(ids) == cfg.image_slots_in_row
    assert np.sum(ids == IMAGE) == (cfg.image_tokens if fusion == "unified" else 0)
    assert len(text.pack_row(cfg, PAIRS)["tokens"]) == cfg.row_length


def test_pairs_that_do_not_fit_are_left_out_whole():
    row = text.pack_row(
        experiment("cross_attention", text_length=8), [PAIRS[0], ([7] * 4, [8]), PAIRS[1]]
    )
    assert row["tokens"].tolist() == [10, 11, 12, EOS, 20, 21, 22, EOS]
    with pytest.raises(UserError, match=r"data.text_length 3 .* 4 tokens"):
        text.pack_row(experiment(text_length=3), PAIRS)


def test_no_token_of_one_branch_predicts_another_branch():
    row = text.pack_row(experiment("cross_attention"), [PAIRS[0], ([], [30, EOS])])
    assert row["targets"].tolist() == [11, 12, EOS, PAD, EOS, PAD, PAD, PAD, PAD]
    assert row["loss_weights"].tolist() == [0, 1, 1, 0, 1, 0, 0, 0, 0]


def test_a_row_without_questions_scores_nothing():
    row = text.pack_row(experiment(), [])
    assert row["loss_weights"].sum() == 0
    assert row["segment_ids"].tolist() == [1] * 4 + [0] * 9


def test_scored_tokens_decode_to_the_answers(tokenizer):
    questions = [
        ("is there a red shape in the image?", "yes"),
        ("what color is the circle?", "dark red"),
    ]
    pairs = [(text.prompt_ids(tokenizer, q), text.answer_ids(tokenizer, a)) for q, a in questions]
    row = text.pack_row(experiment(text_length=80), pairs)
    for branch, (question, answer) in enumerate(questions, 1):
        own = row["branch_ids"] == branch
        scored = row["targets"][own & (row["loss_weights"] == 1)]
        assert tokenizer.decode(scored) == answer
        assert scored[-1] == EOS
        assert tokenizer.decode(row["tokens"][own]) == f"{question}\n{answer}"


def test_a_prompt_row_drawn_by_hand():
    row = text.prompt_row(experiment(), [10, 11], length=8)
    drawn = {
        "tokens": [PAD, PAD, IMAGE, IMAGE, IMAGE, IMAGE, 10, 11],
        "positions": [0, 0, 0, 1, 2, 3, 4, 5],
        "segment_ids": [0, 0, 1, 1, 1, 1, 1, 1],
        "branch_ids": [0, 0, 0, 0, 0, 0, 1, 1],
        "image_token_index": [-1, -1, 0, 1, 2, 3, -1, -1],
        "image_mask": [[0], [0], [1], [1], [1], [1], [1], [1]],
    }
    assert {name: values.tolist() for name, values in row.items()} == drawn
    with pytest.raises(UserError, match="has 6 tokens .* the 5"):
        text.prompt_row(experiment(), [10, 11], length=5)


def test_a_prompt_is_the_start_of_its_training_row():
    prompt, row = text.prompt_row(experiment(), PAIRS[0][0]), text.pack_row(experiment(), PAIRS[:1])
    for name, values in prompt.items():
        np.testing.assert_array_equal(values, row[name][: len(values)])


def test_prompts_with_no_image_and_with_two():
    none = text.prompt_row(experiment(), [10], tiles=())
    assert none["tokens"].tolist() == [10]
    assert none["image_mask"].shape == (1, 0)
    two = text.prompt_row(experiment(newline=True), [10], tiles=(1, 1))
    assert two["image_token_index"].tolist() == [0, 1, -1, 2, 3, -1, 4, 5, -1, 6, 7, -1, -1]
    assert two["positions"].tolist() == list(range(13))
    assert two["image_mask"].shape == (13, 2)
    assert two["image_mask"].all()


@pytest.mark.parametrize(
    "line", ["is there a red shape?", "Ünïcødé 图像 🙂\n\ttab", "<eos><image> <pad>", ""]
)
def test_any_text_comes_back(tokenizer, line):
    ids = tokenizer.encode(line)
    assert tokenizer.decode(ids) == line
    assert all(len(SPECIALS) <= i < len(tokenizer) for i in ids)


def test_decoding_stops_at_eos_and_skips_what_is_no_text(tokenizer):
    yes = tokenizer.encode("yes")
    assert tokenizer.decode([PAD, IMAGE, NEWLINE, 10_000, *yes, EOS, *yes]) == "yes"
    assert tokenizer.decode(np.array(yes)) == "yes"


def test_training_is_deterministic_and_bounded(tokenizer, tmp_path):
    Tokenizer.train(iter(TEXTS), 300).save(tmp_path / "again.json")
    tokenizer.save(tmp_path / "once.json")
    assert (tmp_path / "once.json").read_bytes() == (tmp_path / "again.json").read_bytes()
    assert 260 < len(tokenizer) <= 300
    assert len(Tokenizer.train(TEXTS, 260)) == 260


def test_a_saved_tokenizer_loads_equal(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    for line in [*TEXTS, "<eos>"]:
        assert loaded.encode(line) == tokenizer.encode(line)


def test_bad_tokenizers_are_refused(tmp_path):
    with pytest.raises(UserError, match="decoder.vocab_size 259"):
        Tokenizer.train(TEXTS, 259)
    with pytest.raises(UserError, match="missing.json"):
        Tokenizer.load(tmp_path / "missing.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UserError, match="bad.json"):
        Tokenizer.load(tmp_path / "bad.json")


def test_half_a_character_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"'is it \\udcff' is not text"):
        tokenizer.encode(b"is it \xff".decode(errors="surrogateescape"))
