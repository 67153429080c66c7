"""A mixture is one stream: a function of seed and step, of its shares, and of nothing else."""

from collections import Counter
from dataclasses import replace

import jax
import numpy as np
import pytest

from vlm_jax.config import Source, Train, UserError
from vlm_jax.config.validate import validate
from vlm_jax.data import mixture, packing, pipeline, questions, templates
from vlm_jax.structs import PADDING
from vlm_jax.testing import on_easy_vqa, tiny, write_conversations

# Grain shuffles a few records slowly.
COUNTS = {"talks": 48, "dialogues": 24, "captions": 36}
TEMPLATES = {"talks": "plain", "dialogues": "vicuna", "captions": "caption"}
WEIGHTS = {"talks": 3.0, "dialogues": 2.0, "captions": 1.0}


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    """Batches of 4 rows with conversations of three sources, one template each."""
    sources = []
    for seed, (name, count) in enumerate(COUNTS.items()):
        data = write_conversations(tmp_path_factory.mktemp(name), count, seed)
        template = TEMPLATES[name]
        own = {"files": data.files, "image_dir": data.image_dir, "template": template}
        sources.append(Source(name, weight=WEIGHTS[name], **own))
    data = replace(data, files=(), image_dir="", mixture=tuple(sources))
    cfg = tiny(data=data, train=Train(batch_size=4))
    return replace(cfg, decoder=replace(cfg.decoder, max_positions=128))


@pytest.fixture(scope="module")
def tokenizer(cfg):
    return pipeline.train_tokenizer(cfg)


@pytest.fixture(scope="module", autouse=True)
def window():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(packing, "WINDOW_ROWS", 10)
        yield


@pytest.fixture(scope="module")
def batches(cfg, tokenizer):
    return take(pipeline.training_iterator(cfg, tokenizer), 9)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def equal(some, others):
    return all(map(np.array_equal, jax.tree.leaves(some), jax.tree.leaves(others)))


def segments(batch):
    """The tokens of each conversation of a batch, and the source of each token."""
    for tokens, ids, sources in zip(batch.tokens, batch.segment_ids, batch.source_ids, strict=True):
        for segment in range(1, ids.max() + 1):
            yield tuple(tokens[ids == segment].tolist()), sources[ids == segment].tolist()


def encoded(cfg, tokenizer):
    """Tokens of each conversation in the form of its source -> names of its source."""
    names = {}
    for part in pipeline.conversation_parts(cfg, tokenizer):
        for talk in part.examples:
            fields = packing.encode_for_packing(part.cfg, tokenizer, lambda index: 1, talk)
            names.setdefault(tuple(fields["tokens"].tolist()), set()).add(part.name)
    return names


def test_every_token_knows_its_source_and_has_its_template(cfg, tokenizer, batches):
    known, names = encoded(cfg, tokenizer), list(COUNTS)
    rows_of_several = 0
    for batch in batches:
        for tokens, sources in segments(batch):
            assert len(set(sources)) == 1
            assert names[sources[0]] in known[tokens]
        for ids, sources in zip(batch.segment_ids, batch.source_ids, strict=True):
            rows_of_several += len(set(sources[ids != PADDING])) > 1
    assert rows_of_several > 20, "a row holds conversations of several sources"


def test_the_images_of_a_row_are_those_of_its_conversations(cfg, tokenizer):
    """Each image is of one color, which the answer of its conversation names."""
    iterator = pipeline.training_iterator(cfg, tokenizer)
    ids = pipeline.row_ids(cfg, tokenizer, iterator.get_state())
    batch = next(iterator)
    parts = {part.name: part for part in pipeline.conversation_parts(cfg, tokenizer)}
    checked = 0
    for row, labels in enumerate(ids):
        for segment, label in enumerate(labels, 1):
            name, _, talk_id = label.partition("/")
            part = parts[name]
            (talk,) = [talk for talk in part.examples if talk.id == talk_id]
            read = packing.pixel_reader(part.cfg, part.examples)
            own = batch.image_mask[row][batch.segment_ids[row] == segment].any(axis=0)
            assert own.sum() == len(talk.images)
            for pixels, index in zip(batch.images[row][own], talk.images, strict=True):
                expected = packing.image_files.normalize(read(index), cfg.vision)
                np.testing.assert_array_equal(pixels, expected)
                checked += 1
    assert checked > 4


def test_examples_are_shared_by_the_weights_and_each_source_has_epochs_of_its_own(cfg, tokenizer):
    parts = pipeline.conversation_parts(cfg, tokenizer)
    epochs = [part.shuffled().map(lambda talk, name=part.name: (name, talk.id)) for part in parts]
    stream = mixture.mix(cfg, epochs)
    for count in (6, 60, 600):
        drawn = Counter(stream[index] for index in range(count))
        of_source = Counter(name for name, _ in drawn.elements())
        for name, weight in WEIGHTS.items():
            assert abs(of_source[name] - count * weight / 6) <= 1
            times = [number for (source, _), number in drawn.items() if source == name]
            assert max(times) - min(times) <= 1 or len(times) < COUNTS[name]


def test_the_stream_is_that_of_the_seed(cfg, tokenizer, batches):
    other_threads = replace(cfg, data=replace(cfg.data, threads=0, prefetch=0))
    assert equal(take(pipeline.training_iterator(other_threads, tokenizer), 3), batches[:3])
    other = replace(cfg, seed=1)
    assert not equal(take(pipeline.training_iterator(other, tokenizer), 1), batches[:1])


@pytest.mark.parametrize("done", [0, 1, 4])
def test_a_restored_iterator_continues_exactly(cfg, tokenizer, batches, done):
    iterator = pipeline.training_iterator(cfg, tokenizer)
    take(iterator, done)
    other = pipeline.training_iterator(cfg, tokenizer)
    other.set_state(iterator.get_state())
    assert equal(take(other, 4), batches[done : done + 4])


def test_any_number_of_processes_continues_the_batches_of_one(cfg, tokenizer, batches):
    shares = [pipeline.training_iterator(cfg, tokenizer, i, 2) for i in range(2)]
    for batch in batches[:3]:
        for i, share in enumerate(shares):
            assert equal(next(share), jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], batch))
    assert shares[0].get_state() == shares[1].get_state()
    alone = pipeline.training_iterator(cfg, tokenizer)
    alone.set_state(shares[0].get_state())
    assert equal(take(alone, 2), batches[3:5])


def test_a_further_source_leaves_the_order_of_the_others(cfg, tokenizer):
    fewer = replace(cfg, data=replace(cfg.data, mixture=cfg.data.mixture[1:]))

    def order(cfg):
        parts = pipeline.conversation_parts(cfg, tokenizer)
        return [talk.id for part in parts if part.name == "captions" for talk in part.shuffled()]

    assert order(cfg) == order(fewer)


def test_validation_has_every_conversation_of_every_source_once(cfg, tokenizer):
    held_out = replace(cfg, data=cfg.validation_data("train[:10]"))
    drawn = Counter()
    for batch in pipeline.validation_batches(held_out, tokenizer):
        is_scored = batch.loss_weights.any(axis=1)
        scored = jax.tree.map(lambda x, rows=is_scored: x[rows], batch)
        drawn.update(tuple(sources) for _, sources in segments(scored))
    of_source = Counter()
    for sources, count in drawn.items():
        of_source[sources[0]] += count
    assert of_source == {0: 10, 1: 10, 2: 10}


def test_questions_are_asked_in_the_form_of_their_source(cfg, tokenizer):
    """The tokens of a question are the first tokens of its conversation in training."""
    asked = questions.load(cfg, "train", limit=9)
    assert [question.source for question in asked] == list(COUNTS) * 3
    assert [question.type for question in asked] == list(COUNTS) * 3
    length = questions.row_length(cfg, tokenizer, asked)
    batch = questions.question_batch(cfg, tokenizer, asked, asked, length)
    known = encoded(cfg, tokenizer)
    for row, question in enumerate(asked):
        tokens = tuple(batch.tokens[row][batch.segment_ids[row] != PADDING].tolist())
        starts = [names for whole, names in known.items() if whole[: len(tokens)] == tokens]
        assert any(question.source in names for names in starts)
        template = replace(cfg, data=replace(cfg.data, template=TEMPLATES[question.source]))
        expected = templates.prompt_row(
            template, tokenizer, question.question, [1] * question.image_count, length
        )
        assert expected["tokens"].tolist() == batch.tokens[row].tolist()


def test_an_error_names_its_source(cfg, tokenizer):
    sources = [replace(cfg.data.mixture[0], train_split="dev"), *cfg.data.mixture[1:]]
    wrong = replace(cfg, data=replace(cfg.data, mixture=tuple(sources)))
    with pytest.raises(
        UserError, match="data.mixture talks: data.train_split 'dev' does not exist"
    ):
        pipeline.training_iterator(wrong, tokenizer)


@pytest.fixture(scope="module")
def pictures(datasets_dir):
    """Rows of one image with its questions, of two sources; the first is mirrored and shifted."""
    cfg = on_easy_vqa(tiny())
    sources = (
        Source("moved", train_split="train[:16]", augment=("mirror", "shift"), weight=1.0),
        Source("still", train_split="train[16:40]", weight=3.0),
    )
    data = replace(cfg.data, dir=datasets_dir, mixture=sources)
    return replace(cfg, data=data, train=Train(batch_size=8))


def test_one_source_alone_may_be_evaluated(pictures):
    """The questions of its dataset are asked, in the form of the source."""
    asked = replace(pictures.eval, source="still", split="train[:8]", max_examples=12)
    mixed = questions.to_evaluate(replace(pictures, eval=asked))
    part = replace(pictures.parts["still"], eval=replace(asked, source=""))
    assert [replace(question, source="") for question in mixed] == questions.to_evaluate(part)
    assert {question.source for question in mixed} == {"still"}
    for source, message in (("stil", "perhaps you meant still"), ("x", "choose moved, still")):
        with pytest.raises(UserError, match=f"eval.source '{source}'.*{message}"):
            validate(replace(pictures, eval=replace(asked, source=source)))
    with pytest.raises(UserError, match="eval.source still has no effect without data.mixture"):
        validate(replace(pictures, data=pictures.data.alone(), eval=asked))


def test_rows_of_questions_are_mixed_too(pictures):
    tokenizer = pipeline.train_tokenizer(pictures)
    iterator = pipeline.training_iterator(pictures, tokenizer)
    ids = pipeline.row_ids(pictures, tokenizer, iterator.get_state())
    state = (next(iterator), iterator.get_state())[1]
    whole = take(iterator, 2)
    other = pipeline.training_iterator(pictures, tokenizer, 1, 2)
    other.set_state(state)
    assert equal(take(other, 2), [jax.tree.map(lambda x: x[4:], batch) for batch in whole])

    batch = next(pipeline.training_iterator(pictures, tokenizer))
    parts = pipeline.record_parts(pictures)
    moved = 0
    for row, (label,) in enumerate(ids):
        name, _, image_id = label.partition("/")
        (number,) = [part.number for part in parts if part.name == name]
        assert set(batch.source_ids[row]) == {number}
        decoded = pipeline.DecodedRecords(parts[number].examples, pictures.vision)
        images = {
            str(record.image_id): record.image
            for record in map(decoded.__getitem__, range(len(decoded)))
        }
        pixels = packing.image_files.normalize(images[image_id], pictures.vision)
        is_same = np.array_equal(batch.images[row, 0], pixels)
        assert is_same or name == "moved"
        moved += not is_same
    assert moved
    assert Counter(label.partition("/")[0] for (label,) in ids) == {"moved": 2, "still": 6}
