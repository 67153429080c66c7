"""Conversations longer than a row: cut between images, counted, left out if no token is scored."""

import json
from dataclasses import replace

import numpy as np
import pytest

from vlm_jax.config import ConfigError, Train
from vlm_jax.data import (
    conversations,
    cuts,
    packing,
    pipeline,
    templates,
)
from vlm_jax.structs import NO_IMAGE
from vlm_jax.testing import (
    hybrid_in_tiles,
    tiny,
    variants,
    write_conversations,
)

KINDS = variants() | {
    "hybrid in tiles": hybrid_in_tiles(),
    "unified in tiles": tiny(vision=replace(tiny().vision, tiles=2)),
    "text alone": replace(tiny(), fusion=replace(tiny().fusion, kind="text_only")),
    "placeholder": tiny(
        "cross_attention", fusion=replace(tiny("cross_attention").fusion, placeholder=True)
    ),
    "bidirectional": replace(tiny(), fusion=replace(tiny().fusion, prefix="bidirectional")),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
TURNS = ["<image>\nwhat is it?", "red", "<image><image>and these?", "blue <image> and green"]
TILES = {"one tile": [1, 1, 1, 1], "two": [2, 1, 2, 2]}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_conversations(tmp_path_factory.mktemp("talks"), count=9)


@pytest.fixture(scope="module")
def experiments(data):
    longer = {name: replace(cfg.decoder, max_positions=512) for name, cfg in KINDS.items()}
    return {name: replace(cfg, data=data, decoder=longer[name]) for name, cfg in KINDS.items()}


@pytest.fixture(scope="module")
def tokenizer(experiments):
    return pipeline.train_tokenizer(experiments["unified in tiles"])


def with_text_length(cfg, text_length):
    return replace(cfg, data=replace(cfg.data, text_length=text_length))


@every_kind
@pytest.mark.parametrize("template", ["plain", "vicuna", "caption"])
def test_a_cut_is_a_beginning_with_whole_images(kind, template, experiments, tokenizer):
    cfg = replace(experiments[kind], data=replace(experiments[kind].data, template=template))
    tiles = TILES["two" if cfg.vision.cut_tiles > 1 else "one tile"]
    whole = templates.encode(cfg, tokenizer, TURNS, tiles)
    ends = [np.sum(whole["images_seen"] < number) for number in range(1, 5)]  # before each image
    sizes = [len(templates.image_fields(cfg, count, 0)["tokens"]) for count in tiles]
    for length in range(len(whole["tokens"]) + 2):
        cut = templates.cut(cfg, whole, tiles, length)
        kept = len(cut["tokens"])
        within = [end for end, size in zip(ends, sizes) if end < length < end + size]
        assert kept == (within[0] if within else min(length, len(whole["tokens"])))
        assert cut.keys() == whole.keys()
        for name, values in cut.items():
            np.testing.assert_array_equal(values, whole[name][:kept])


@every_kind
def test_an_element_has_the_images_whose_tokens_or_readers_it_has(kind, experiments, tokenizer):
    cfg = experiments[kind]
    conversation = conversations.Conversation("7", (5, 6, 7, 8), tuple(TURNS))
    tiles = 2 if cfg.vision.cut_tiles > 1 else 1
    longest = len(templates.encode(cfg, tokenizer, TURNS, [tiles] * 4)["tokens"])
    spare = cfg.row_length - cfg.data.text_length
    counts = set()
    for length in range(max(1, longest - spare), longest + 1):
        short = with_text_length(cfg, length)
        element = packing.encode_for_packing(short, tokenizer, lambda number: tiles, conversation)
        kept = min(longest, short.row_length)
        assert len(element["tokens"]) <= kept
        seen = element["images_seen"].max(initial=0) if cfg.fusion.has_images else 0
        assert element["images"].tolist() == [5, 6, 7, 8][:seen]
        slots = element["image_token_index"][element["image_token_index"] != NO_IMAGE]
        if cfg.fusion.image_in_sequence and cfg.vision.cut_tiles == 1:
            assert slots.tolist() == list(range(seen * cfg.image_tokens)), (
                "a placeholder without its image"
            )
        counts.add(int(seen))
    assert max(counts) == (4 if cfg.fusion.has_images else 0)


@every_kind
@pytest.mark.parametrize("bos_id", [None, 5])
def test_most_tokens_are_those_of_the_encoded_conversations_and_of_a_begin_token(
    kind, bos_id, experiments, tokenizer
):
    tiles = 2 if experiments[kind].vision.cut_tiles > 1 else 1
    talks = [TURNS, TURNS[:2], ["a", ""], ["", "<image>"], ["a \n b", "c"]]
    records = [conversations.Conversation("7", (), tuple(turns)) for turns in talks]
    for template in templates.TEMPLATES:
        changed = replace(experiments[kind].data, template=template, bos_id=bos_id)
        cfg = replace(experiments[kind], data=changed)
        counts = templates.max_token_counts(cfg, tokenizer, records)
        for turns, most in zip(talks, counts, strict=True):
            marks = sum(turn.count("<image>") for turn in turns)
            length = len(templates.encode(cfg, tokenizer, turns, [tiles] * marks)["tokens"])
            assert most - (bos_id is None) <= length <= most


@every_kind
@pytest.mark.parametrize("text_length", [1, 10, 20, 40, 80, 200])
def test_counts_are_those_of_all_encoded_conversations(
    kind, text_length, experiments, tokenizer, data, monkeypatch
):
    cfg = with_text_length(experiments[kind], text_length)
    source = conversations.load(data, "train")
    counter = packing.tile_counter(cfg, source)
    monkeypatch.setattr(cuts, "CHUNK_RECORDS", 4)
    counted = cuts.count(cfg, tokenizer, source)
    whole, kept = [], []
    for talk in source:
        tiles = [counter(number) for number in talk.images]
        whole.append(templates.encode(cfg, tokenizer, talk.turns, tiles))
        kept.append(packing.encode_for_packing(cfg, tokenizer, counter, talk))
    scored, left = ([fields["loss_weights"].sum() for fields in of] for of in (whole, kept))
    is_cut = [len(fields["tokens"]) > cfg.row_length for fields in whole]
    assert counted.records == 9
    assert len(counted.too_long) == sum(is_cut)
    assert counted.scored_tokens == sum(number for number, cut in zip(scored, is_cut) if cut)
    assert counted.lost_tokens == sum(scored) - sum(left)
    assert counted.unscored == [index for index, number in enumerate(left) if not number]
    longer = with_text_length(cfg, text_length + max(counted.longest - cfg.row_length, 0))
    assert not cuts.count(longer, tokenizer, source).too_long
    assert cuts.cut_message(longer, cuts.count(longer, tokenizer, source)) == ""


def question(index, length):
    turns = [
        {"from": "human", "value": "word " * length},
        {"from": "gpt", "value": f"answer {index}"},
    ]
    return {"id": f"a{index}", "conversations": turns}


@pytest.fixture
def short(data, tmp_path, tokenizer):
    """`short(lengths)`: an experiment on questions of these word counts, with rows of 60 tokens."""

    def make(lengths):
        talks = [question(index, length) for index, length in enumerate(lengths)]
        (tmp_path / "talks.json").write_text(json.dumps(talks))
        files = (str(tmp_path / "talks.json"),)
        return tiny(
            data=replace(data, files=files, dir=str(tmp_path / "sets"), text_length=60),
            train=Train(batch_size=2),
        )

    return make


def test_what_has_no_scored_token_left_is_never_learned_from(
    short, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(packing, "WINDOW_ROWS", 1)  # a batch is read ahead, not 64 rows
    cfg = short([2, 400, 3, 400, 400, 400, 2, 400])
    source, counted = pipeline.training_conversations(cfg, tokenizer)
    assert [talk.id for talk in source] == ["a0", "a2", "a6"]
    iterator = pipeline.training_iterator(cfg, tokenizer)
    for _ in range(4):
        held = pipeline.batch_ids(cfg, tokenizer, iterator.get_state())
        assert set(held) <= {"a0", "a2", "a6"}
        next(iterator)
    message = cuts.cut_message(cfg, counted)
    assert "5 of 8 conversations are longer than a row (data.text_length 60) and are cut" in message
    assert "5 have no scored token left and are left out" in message
    named = [f"{tmp_path}/talks.json: record {i} (id 'a{i}')" for i in (1, 3, 4)]
    assert f"{', '.join(named)} and 2 more." in message
    assert (
        f"With data.text_length {cfg.data.text_length + counted.longest - cfg.row_length} nothing"
        in message
    )


def test_what_is_too_long_is_dropped_with_its_count_and_its_tokens(short, tokenizer, tmp_path):
    cfg = short([2, 40, 3, 400, 2])
    cfg = replace(cfg, data=replace(cfg.data, too_long="drop"))
    source, counted = pipeline.training_conversations(cfg, tokenizer)
    assert [talk.id for talk in source] == ["a0", "a2", "a4"]
    message = cuts.cut_message(cfg, counted)
    named = ", ".join(f"{tmp_path}/talks.json: record {i} (id 'a{i}')" for i in (1, 3))
    assert message.startswith(
        "2 of 5 conversations are longer than a row (data.text_length 60) and are left out with "
        f"{counted.scored_tokens} scored tokens: {named}. With data.text_length "
    )


@pytest.mark.parametrize(("too_long", "expected"), [("truncate", (1, 1, 4)), ("drop", (0, 2, 10))])
def test_a_row_of_metrics_counts_what_is_cut_left_out_and_lost(too_long, expected):
    cfg = tiny(data=replace(tiny().data, too_long=too_long))
    counted = cuts.Cuts(5, too_long=[1, 3], scored_tokens=10, lost_tokens=4, unscored=[3])
    assert tuple(cuts.data_counts(cfg, counted).values()) == expected


def test_what_is_too_long_stops_the_run(short, tokenizer, tmp_path):
    cfg = short([2, 40, 3, 400, 2])
    cfg = replace(cfg, data=replace(cfg.data, too_long="error"))
    with pytest.raises(
        ConfigError, match=r"^2 of 5 .* \(data.too_long error\): .*record 1 .*, .*record 3 \(id"
    ):
        pipeline.training_iterator(cfg, tokenizer)
    fitting = short([2, 3])
    fitting = replace(fitting, data=replace(fitting.data, too_long="error"))
    assert len(pipeline.training_conversations(fitting, tokenizer)[0]) == 2


def test_nothing_to_learn_from_is_refused(short, tokenizer):
    cfg = short([400, 500])
    with pytest.raises(
        ConfigError,
        match="data.text_length 60 leaves nothing to learn from: none of the 2 .* is cut",
    ):
        pipeline.training_iterator(cfg, tokenizer)


def test_a_cut_answer_has_no_end(short, tokenizer):
    cfg = short([2])
    whole = templates.encode(cfg, tokenizer, ["a", "word " * 100], [])
    cut = templates.cut(cfg, whole, [], 60)
    assert cfg.data.eos_id in whole["targets"]
    assert cfg.data.eos_id not in cut["targets"]
    assert cut["loss_weights"][-1] == 1, (
        "the last token is scored for the token that comes next in the answer"
    )
