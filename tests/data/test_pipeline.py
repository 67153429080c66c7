"""Batches are a function of seed and step; processes share an epoch; evaluation reads in order."""

import io
import json
import threading
from dataclasses import replace

import jax
import numpy as np
import pytest
from PIL import Image

from vlm_jax.config import (
    Data,
    Eval,
    Experiment,
    Fusion,
    Train,
    UserError,
)
from vlm_jax.data import images as image_files
from vlm_jax.data import (
    length_check,
    pipeline,
    questions,
    sources,
    tiling,
)
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.structs import ANY_LAYOUT, ONE_SEGMENT
from vlm_jax.testing import tiny, write_conversations


@pytest.fixture(scope="module")
def cfg(datasets_dir) -> Experiment:
    data = Data(dir=datasets_dir, train_split="train[:24]", augment=("mirror", "turn"))
    return Experiment(data=data, train=Train(batch_size=8))


@pytest.fixture(scope="module")
def tokenizer(cfg) -> Tokenizer:
    return pipeline.train_tokenizer(cfg)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def equal(batches, others) -> bool:
    same = jax.tree.map(np.array_equal, batches, others)
    return jax.tree.structure(batches) == jax.tree.structure(others) and all(jax.tree.leaves(same))


def image_keys(batches):
    """One key an image, whatever symmetry of the square it was given."""
    symmetries = [(turns, flip) for turns in range(4) for flip in (1, -1)]
    pictures = [picture for batch in batches for picture in batch.images[:, 0]]
    return [
        min(np.rot90(p, turns)[:, ::flip].tobytes() for turns, flip in symmetries) for p in pictures
    ]


def test_shapes_and_types(cfg, tokenizer):
    batch = next(pipeline.training_iterator(cfg, tokenizer))
    rows, length = 8, cfg.row_length
    there = {name: values for name, values in batch.__dict__.items() if values is not None}
    assert there.pop("layout") == ANY_LAYOUT
    shapes = dict.fromkeys(there, (rows, length))
    shapes |= {"images": (rows, 1, 64, 64, 3), "image_mask": (rows, length, 1)}
    assert {name: values.shape for name, values in there.items()} == shapes
    assert batch.__dict__.keys() - there.keys() - {"layout"} == {
        "image_rows",
        "tile_layouts",
        "tile_mask",
        "block_ids",
        "no_image_mask",
        "image_taps",
        "tap_weights",
        "source_ids",
        "patch_images",
        "patch_places",
        "rope_positions",
        "map_memory",
    }
    assert batch.images.dtype == np.float32
    assert batch.images.min() >= -1
    assert batch.images.max() <= 1


def test_a_restored_iterator_continues_exactly(cfg, tokenizer):
    iterator = pipeline.training_iterator(cfg, tokenizer)
    take(iterator, 2)
    state = iterator.get_state()
    expected = take(iterator, 5)  # across the end of an epoch of 3 batches
    other = pipeline.training_iterator(cfg, tokenizer)
    other.set_state(state)
    assert equal(take(other, 5), expected)


def test_the_seed_alone_decides(cfg, tokenizer):
    four = replace(cfg, data=replace(cfg.data, threads=4, prefetch=1))
    same, again = (take(pipeline.training_iterator(c, tokenizer), 4) for c in (cfg, four))
    assert equal(same, again)
    assert not equal(take(pipeline.training_iterator(replace(cfg, seed=1), tokenizer), 4), same)


def test_an_epoch_has_every_image_once_and_the_next_is_shuffled_anew(cfg, tokenizer):
    iterator = pipeline.training_iterator(cfg, tokenizer)
    first, second = image_keys(take(iterator, 3)), image_keys(take(iterator, 3))
    assert len(set(first)) == 24
    assert set(first) == set(second)
    assert first != second


def test_processes_share_each_batch_of_one_process(cfg, tokenizer):
    alone = take(pipeline.training_iterator(cfg, tokenizer), 4)
    shares = [take(pipeline.training_iterator(cfg, tokenizer, i, 2), 4) for i in range(2)]
    for whole, first, second in zip(alone, *shares, strict=True):
        assert equal([jax.tree.map(lambda x: x[:4], whole)], [first])
        assert equal([jax.tree.map(lambda x: x[4:], whole)], [second])


def test_processes_read_disjoint_images(cfg, tokenizer):
    first, second = (
        set(image_keys(take(pipeline.training_iterator(cfg, tokenizer, i, 2), 3))) for i in range(2)
    )
    assert not first & second
    assert len(first | second) == 24


def test_a_process_decodes_the_images_of_its_rows_only(cfg, tokenizer, monkeypatch):
    """Counts only this thread: threads of earlier iterators may still decode images ahead."""
    decoded, decode, own = [], image_files.decode, threading.get_ident()

    def counted(encoded, name, **options):
        if threading.get_ident() == own:
            decoded.append(name)
        return decode(encoded, name, **options)

    monkeypatch.setattr(image_files, "decode", counted)
    monkeypatch.setattr(tiling, "CACHE_BYTES", 0)
    cfg = replace(cfg, data=replace(cfg.data, prefetch=0, threads=0))
    share = next(pipeline.training_iterator(cfg, tokenizer, 1, 2))
    assert len(decoded) == len(share.tokens) == cfg.train.batch_size // 2


def test_a_broken_image_is_named_by_its_dataset_split_and_row(cfg, monkeypatch):
    records = sources.load(cfg.data, "test[10:]")
    read = sources.Records.__getitem__
    monkeypatch.setattr(
        sources.Records, "__getitem__", lambda rows, i: replace(read(rows, i), image=b"GIF89a")
    )
    said = (
        r"the image of row 7 of data.source easy_vqa, split 'test\[10:\]' is not a readable image"
    )
    with pytest.raises(UserError, match=said):
        pipeline.DecodedRecords(records, cfg.vision)[7]


def test_questions_of_a_row_belong_to_its_image_and_are_chosen_anew(cfg, tokenizer):
    cfg = replace(cfg, data=replace(cfg.data, augment=(), questions_per_row=3))
    records = pipeline.DecodedRecords(sources.load(cfg.data, cfg.data.train_split), cfg.vision)
    asked = {records[i].image.tobytes(): records[i] for i in range(len(records))}
    drawn = set()
    for batch in take(pipeline.training_iterator(cfg, tokenizer), 9):
        for tokens, branches, picture in zip(
            batch.tokens, batch.branch_ids, batch.images[:, 0], strict=True
        ):
            record = asked[np.round((picture + 1) * 127.5).astype(np.uint8).tobytes()]
            lines = [tokenizer.decode(tokens[branches == b]) for b in range(1, branches.max() + 1)]
            known = [f"{q}\n{a}" for q, a in zip(record.questions, record.answers, strict=True)]
            assert len(set(lines)) == len(lines) == min(3, len(set(known)))
            assert set(lines) <= set(known)
            drawn.add((record.image_id, *lines))
    assert len(drawn) > 60  # of 72 rows


def test_a_split_smaller_than_a_batch_repeats(cfg, tokenizer):
    small = replace(cfg, data=replace(cfg.data, train_split="train[:3]"))
    assert len(set(image_keys(take(pipeline.training_iterator(small, tokenizer), 1)))) == 3


def test_bad_settings_are_refused(cfg, tokenizer):
    with pytest.raises(UserError, match="train.batch_size 8"):
        pipeline.training_iterator(cfg, tokenizer, 0, 3)
    with pytest.raises(UserError, match="data.text_length 4"):
        next(
            pipeline.training_iterator(
                replace(cfg, data=replace(cfg.data, text_length=4)), tokenizer
            )
        )


def test_questions_that_do_not_fit_their_rows_are_counted(cfg, tokenizer):
    """A row that is one token too long leaves out its last question alone."""
    all_asked = replace(cfg, data=replace(cfg.data, questions_per_row=100))
    rows = length_check.sampled_rows(all_asked, tokenizer)
    lengths = [sum(len(prompt) + len(answer) for prompt, answer in row) for row in rows]
    longest = max(lengths)
    assert len(rows) == 24

    def said(text_length):
        return length_check.dropped_questions_message(
            replace(all_asked, data=replace(all_asked.data, text_length=text_length)), tokenizer
        )

    assert said(longest) == ""
    expected = (
        f"{lengths.count(longest)} of {sum(map(len, rows))} questions in 24 training rows (0."
    )
    assert said(longest - 1).startswith(expected)
    assert f"do not fit data.text_length {longest - 1} and are left out" in said(longest - 1)
    assert f"rows of {longest} tokens would fit all of these" in said(longest - 1)


def test_a_sample_of_rows_is_spread_over_the_split(cfg, tokenizer, monkeypatch):
    every = replace(cfg, data=replace(cfg.data, questions_per_row=100))
    rows = length_check.sampled_rows(every, tokenizer)
    monkeypatch.setattr(length_check, "SAMPLED_ROWS", 10)
    assert list(map(len, length_check.sampled_rows(every, tokenizer))) == list(map(len, rows[::3]))


def test_of_conversations_none_is_left_out(tmp_path):
    cfg = tiny(data=write_conversations(tmp_path))
    assert length_check.dropped_questions_message(cfg, pipeline.train_tokenizer(cfg)) == ""


def test_the_ids_of_a_batch_are_those_of_its_images(cfg, tokenizer):
    cfg = replace(cfg, data=replace(cfg.data, augment=()))
    data = pipeline.training_iterator(cfg, tokenizer)
    by_id = {record.image_id: record for record in sources.load(cfg.data, cfg.data.train_split)}
    for _ in range(5):  # over the end of the 24 images
        state = data.get_state()
        batch = next(data)
        for image, image_id in zip(
            batch.images[:, 0], pipeline.batch_ids(cfg, None, state), strict=True
        ):
            pixels = image_files.fit(image_files.decode(by_id[image_id].image, "image"), 64)
            assert np.array_equal(image, image_files.normalize(pixels, cfg.vision))


def test_the_place_in_the_data_is_the_same_for_any_number_of_processes(cfg, tokenizer):
    alone, first, second = (
        pipeline.training_iterator(cfg, tokenizer, *of) for of in [(0, 1), (0, 2), (1, 2)]
    )
    for _ in range(3):
        next(alone), next(first)
    assert alone.get_state() == first.get_state()
    second.set_state(alone.get_state())
    expected, shares = next(alone).tokens, (next(first).tokens, next(second).tokens)
    assert np.array_equal(np.concatenate(shares), expected)


def test_the_tokenizer_learns_from_the_training_split_alone(cfg, tokenizer, tmp_path):
    records = sources.load(cfg.data, "train[:24]")
    lines = [line for i in range(24) for line in records[i].questions + records[i].answers]
    Tokenizer.train(lines, cfg.decoder.vocab_size).save(tmp_path / "expected.json")
    tokenizer.save(tmp_path / "tokenizer.json")
    assert (tmp_path / "tokenizer.json").read_bytes() == (tmp_path / "expected.json").read_bytes()


def test_questions_are_read_in_order(cfg):
    everything = questions.load(cfg, "test")
    assert len(everything) == 9_673
    assert [q.image_id for q in everything] == sorted(q.image_id for q in everything)
    assert questions.load(cfg, "test", limit=5) == everything[:5]
    last = everything[-1]
    record = sources.load(cfg.data, "test")[999]
    assert (last.question, last.answer, last.type) == (
        record.questions[-1],
        record.answers[-1],
        record.types[-1],
    )
    picture = np.asarray(Image.open(io.BytesIO(record.image)).convert("RGB"))
    np.testing.assert_array_equal(last.images()[0], picture)


def test_rows_of_one_question_are_one_causal_segment_then_padding(cfg, tokenizer):
    alone = replace(cfg, data=replace(cfg.data, questions_per_row=1))
    batch = next(pipeline.training_iterator(alone, tokenizer))
    assert (batch.layout, batch.branch_ids) == (ONE_SEGMENT, None)
    lengths = (batch.segment_ids == 1).sum(axis=1, keepdims=True)
    slots = np.arange(cfg.row_length)
    np.testing.assert_array_equal(batch.segment_ids, slots < lengths)
    np.testing.assert_array_equal(batch.positions, np.where(slots < lengths, slots, 0))


def test_prompts_of_a_batch_all_end_in_the_last_slot(cfg, tokenizer):
    picture = np.full((64, 64, 3), 0.5, np.float32)
    prompts = ["red?", "is there a red shape in the image?"]
    batch = questions.prompt_batch(cfg, tokenizer, [[picture], [picture]], prompts)
    for row, prompt in enumerate(prompts):
        own = batch.tokens[row][batch.branch_ids[row] == 1]
        assert tokenizer.decode(own) == prompt + "\n"
        assert batch.segment_ids[row, -1] == 1
    assert batch.images.shape == (2, 1, 64, 64, 3)
    assert batch.targets is None
    assert questions.prompt_batch(
        cfg, tokenizer, [[picture]], ["red?"], length=120
    ).tokens.shape == (1, 120)


@pytest.mark.parametrize("kind", ["unified", "cross_attention"])
def test_rows_may_differ_in_their_number_of_images(cfg, tokenizer, kind):
    cfg = replace(cfg, fusion=Fusion(kind=kind))
    picture = np.full((64, 64, 3), 0.5, np.float32)
    batch = questions.prompt_batch(
        cfg, tokenizer, [[picture, picture], [picture], []], ["a", "a", "a"]
    )
    assert batch.images.shape == (3, 2, 64, 64, 3)
    assert batch.images[:, :, 0, 0, 0].tolist() == [[0.5, 0.5], [0.5, 0], [0, 0]]
    assert batch.image_mask[:, -1].tolist() == [[True, True], [True, False], [False, False]]
    slots = [128, 64, 0] if kind == "unified" else [0, 0, 0]
    assert (batch.image_token_index >= 0).sum(1).tolist() == slots


def test_a_batch_of_text_alone_has_no_images(cfg, tokenizer):
    batch = questions.prompt_batch(cfg, tokenizer, [[], []], ["red?", "is it?"])
    assert batch.images is None
    assert batch.image_mask.shape == (*batch.tokens.shape, 0)


def test_the_first_question_of_a_conversation_is_evaluated_with_its_images(tmp_path):
    cfg = tiny(data=write_conversations(tmp_path))
    asked = questions.load(cfg, "train")
    assert [question.image_count for question in asked] == [0, 1, 2] * 4
    assert [len(question.images()) for question in asked[:3]] == [0, 1, 2]
    assert asked[2].question.startswith("<image>\n<image>\nwhat do you see")
    assert asked[0].answer == "no image"
    assert questions.load(cfg, "train", limit=2) == asked[:2]
    tokenizer = pipeline.train_tokenizer(cfg)
    length = questions.row_length(cfg, tokenizer, asked[:3])
    for question in asked[:3]:
        pixels = [picture.astype(np.float32) for picture in question.images()]
        batch = questions.prompt_batch(cfg, tokenizer, [pixels], [question.question], length)
        assert batch.tokens.shape == (1, length)
        assert batch.images.shape == (1, 3, 16, 16, 3), "of one shape, to be compiled once"
        assert batch.image_mask[0, -1].sum() == question.image_count


def test_all_questions_of_a_conversation_are_evaluated_with_their_history(tmp_path):
    data = write_conversations(tmp_path)
    cfg = tiny(data=data, eval=Eval(turns="all"))
    talks = json.loads((tmp_path / "talks.json").read_text())
    talks[0] |= {"answers": ["none", "no image"], "choices": ["an image", "no image"]}
    talks[0]["conversations"] = talks[0]["conversations"][:2]
    (tmp_path / "talks.json").write_text(json.dumps(talks))
    asked = questions.load(cfg, "train")
    expected = []
    for talk in talks:
        texts = [turn["value"] for turn in talk["conversations"]]
        for number in range(0, len(texts), 2):
            expected.append((tuple(texts[:number]), texts[number], texts[number + 1]))
    assert [(one.history, one.question, one.answer) for one in asked] == expected
    assert len(asked) > len(talks)
    assert asked[0].references == ("none", "no image")
    assert asked[0].choices == ("an image", "no image")
    assert asked[1].references == (asked[1].answer,)
    assert "talks.json: record 0" in asked[0].location
    assert questions.load(cfg, "train", limit=5) == asked[:5]
    later = [one for one in asked if one.history and one.image_count]
    first = next(one for one in asked if one.image_id == later[0].image_id)
    assert later[0].images is first.images, "read and encoded once"
    tokenizer = pipeline.train_tokenizer(cfg)
    length = questions.row_length(cfg, tokenizer, asked)
    batch = questions.question_batch(cfg, tokenizer, later[:2], later[:2], length)
    alone = questions.prompt_row(
        cfg,
        tokenizer,
        later[0].question,
        [1] * later[0].image_count,
        length,
        history=later[0].history,
    )
    assert batch.tokens[0].tolist() == alone["tokens"].tolist()
