"""Cached generation says what the whole sequence, read again for every token, would say."""

import functools
import itertools
import re
from dataclasses import replace

import jax
import numpy as np
import pytest

from tests.nn.models import EXPERIMENTS
from vlm_jax import axes, sharding
from vlm_jax.config import ConfigError, Mesh, NonFiniteError
from vlm_jax.data import questions, text, tiling
from vlm_jax.data.tokenizer import SPECIALS, Tokenizer
from vlm_jax.infer.answer import AnswerOptions
from vlm_jax.infer.generate import (
    NonFiniteLogits,
    SamplingParams,
    _generate,
    choose,
    generate,
    prefill,
    stream,
)
from vlm_jax.nn.vlm import VLM
from vlm_jax.structs import NO_IMAGE, PADDING, Batch
from vlm_jax.testing import random_params

NEW = 6
NEVER = SamplingParams()  # no token ends: generation goes on
LENGTHS = (2, 7, 4)


def untied(cfg):
    """Unties the head: a random model with tied embeddings repeats one token."""
    return replace(cfg, decoder=replace(cfg.decoder, tie_word_embeddings=False))


def gated(cfg):
    """Adds gates with random values: without them, all answers repeat one token."""
    return replace(
        cfg, fusion=replace(cfg.fusion, gated=cfg.fusion.has_cross_blocks, qk_norm=False)
    )


# `fuyu` is `unified` without an encoder, and a newline is a token.
CONFIGS = {name: gated(untied(cfg)) for name, cfg in EXPERIMENTS.items() if name != "fuyu"}


def prompts(cfg):
    """Random prompts of three lengths and images; images cut into tiles have several shapes."""
    rng, side = np.random.default_rng(0), cfg.vision.image_size_px
    ids = [list(rng.integers(len(SPECIALS), cfg.decoder.vocab_size, length)) for length in LENGTHS]
    shapes = itertools.islice(itertools.cycle(tiling.layouts(cfg.vision.cut_tiles)), len(ids))
    images = [
        rng.uniform(-1, 1, (rows * side, columns * side, 3)).astype(np.float32)
        for rows, columns in shapes
    ]
    return ids, images


def question_batch(cfg, ids, images) -> Batch:
    """A row a prompt, which has one image."""
    length = cfg.image_slots_in_row + max(map(len, ids))
    rows = [
        text.prompt_row(cfg, prompt, (tiling.count_tiles(image, cfg.vision),), length)
        | {"images": tiling.stack_views([image], cfg.vision)}
        for prompt, image in zip(ids, images, strict=True)
    ]
    return Batch(**{name: np.stack([row[name] for row in rows]) for name in rows[0]})


@functools.cache
def generated(name, how=NEVER):
    """Answers of a model to the prompts, three rows in one batch."""
    cfg = CONFIGS[name]
    batch = question_batch(cfg, *prompts(cfg))
    return np.asarray(generate(cfg.model, random_params(cfg, 0.3), batch, NEW, how))


@functools.cache
def logits_of(name):
    """The compiled forward pass of a model: `logits_of(name)(batch)`."""
    cfg = CONFIGS[name]
    forward = jax.jit(lambda params, batch: VLM(cfg.model).apply({"params": params}, batch).logits)
    return functools.partial(forward, random_params(cfg, 0.3))


@functools.cache
def read_again(name, prompt, image):
    """Greedy tokens from NEW forward passes over a whole row, without a cache.

    Args:
      prompt, image: indices into `prompts`.
    """
    cfg = CONFIGS[name]
    ids, images = prompts(cfg)
    answer = []
    for _ in range(NEW):
        text_ids = [*ids[prompt], *answer]
        logits = logits_of(name)(right_padded(cfg, text_ids, images[image]))
        answer.append(int(np.argmax(logits[0, cfg.image_slots_in_row + len(text_ids) - 1])))
    return answer


def right_padded(cfg, ids, image) -> Batch:
    """One row as in training, padded behind the last token so that every call has one shape."""
    row = question_batch(cfg, [ids], [image])
    room = cfg.row_length - row.tokens.shape[1]
    padding = {"segment_ids": PADDING, "image_token_index": NO_IMAGE}
    fields = {
        name: values
        for name, values in row.__dict__.items()
        if isinstance(values, np.ndarray) and name != "images"
    }
    padded = {
        name: np.pad(
            values,
            [(0, 0), (0, room)] + [(0, 0)] * (values.ndim - 2),
            constant_values=padding.get(name, 0),
        )
        for name, values in fields.items()
    }
    return Batch(**padded, images=row.images)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_row_of_mixed_lengths_gets_its_most_likely_token_step_by_step(name):
    answers = generated(name)
    assert answers.tolist() == [read_again(name, row, row) for row in range(len(LENGTHS))]
    assert len(np.unique(answers)) > 5, "the answers are all alike: the test would show little"


@pytest.mark.parametrize("rows", [1, 2])
def test_a_token_copies_no_cached_keys_and_values(rows):
    cfg = CONFIGS["unified"]
    ids, images = prompts(cfg)
    batch = question_batch(cfg, ids[:rows], images[:rows])
    settings = {"new_tokens": NEW, "sampling": NEVER, "key": jax.random.key(0)}
    layers = jax.eval_shape(
        lambda *args: prefill(cfg.model, *args, **settings).cache.layers,
        *(random_params(cfg, 0.3), batch),
    )
    shapes = {x.shape for x in jax.tree.leaves(layers)}
    lowered = _generate.lower(cfg.model, random_params(cfg, 0.3), batch, **settings)
    loop = while_body(lowered.compile().as_text())
    for shape in shapes:
        dimensions = ",".join(map(str, shape))
        assert f"f32[{dimensions}]" in loop
        assert not re.findall(rf"= f32\[(?:1,)?{dimensions}\]\S* copy\(", loop)


def while_body(hlo: str) -> str:
    """Returns the text of the body of the last loop of a compiled program."""
    name = re.findall(r"body=(%[\w.-]+)", hlo)[-1]
    start = hlo.index(f"\n{name} (")
    return hlo[start : hlo.index("\n}", start)]


def test_a_batch_of_mixed_numbers_of_images_is_one_by_one():
    """tests/nn/test_vlm.py has every style, tests/infer/test_answer.py the styles of runs."""
    cfg = CONFIGS["cross_attention"]
    tokenizer = Tokenizer.train(["is it red ?", "what shape is there ?"], 280)
    images = list(np.random.default_rng(1).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32))
    shown, asked = [images[:1], [], images], ["is it red ?", "what shape", "red ?"]
    params = random_params(cfg, 0.3)

    def made(rows):
        batch = questions.prompt_batch(
            cfg, tokenizer, [shown[i] for i in rows], [asked[i] for i in rows]
        )
        return np.asarray(generate(cfg.model, params, batch, NEW, NEVER))

    together = made([0, 1, 2])
    # The third row has the most images, so it is padded with none in either batch.
    np.testing.assert_array_equal(together[:2], np.concatenate([made([0]), made([1])]))


SHARED = (1, 0, 1, 1, 0, 0, 0, 1)


# Image tokens in the sequence; in the sequence and in the keys of cross-attention.
@pytest.mark.parametrize("name", ["unified", "hybrid"])
def test_rows_that_share_an_image_say_what_they_say_with_one_each(name):
    """On eight devices; image rows are on other devices than the token rows that read them."""
    cfg = CONFIGS[name]
    ids, images = prompts(cfg)
    asked = [row % len(ids) for row in range(len(SHARED))]
    batch = question_batch(cfg, [ids[i] for i in asked], [images[i] for i in SHARED])
    batch = batch.replace(images=batch.images[[1, 0, 1, 1]], image_rows=np.array(SHARED, np.int32))
    mesh = axes.make_mesh(Mesh(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = sharding.place_rows(batch, mesh)
        answers = generate(cfg.model, random_params(cfg, 0.3), placed, NEW, NEVER)
    expected = [read_again(name, prompt, image) for prompt, image in zip(asked, SHARED)]
    assert np.asarray(answers).tolist() == expected
    assert len(np.unique(expected)) > 5, "the answers are all alike: the test would show little"


def test_a_row_ends_with_eos_and_the_others_go_on():
    free = generated("encoder_decoder")
    # The first row says it after one token, and would then say something else.
    eos = int(free[0, 1])
    assert free[0, 2] != eos
    expected = free.copy()
    for row in expected:
        if eos in row:
            row[list(row).index(eos) :] = eos
    assert (expected != eos).all(axis=1).any(), "a row goes on to the end"
    np.testing.assert_array_equal(
        generated("encoder_decoder", SamplingParams(eos=(eos,))), expected
    )


def test_the_image_decides():
    cfg = CONFIGS["unified"]
    ids, images = prompts(cfg)
    params = random_params(cfg, 0.3)
    made = [
        generate(cfg.model, params, question_batch(cfg, ids, picture), NEW, NEVER)
        for picture in (images, [-image for image in images])
    ]
    assert not np.array_equal(*made)


# Choosing


@pytest.mark.parametrize(
    "how", [NEVER, SamplingParams(temperature=1.0, top_k=50)], ids=["greedy", "sampled"]
)
def test_a_stream_is_the_same_tokens_one_by_one(how):
    cfg = CONFIGS["cross_attention"]
    batch, params = question_batch(cfg, *prompts(cfg)), random_params(cfg, 0.3)
    whole = np.asarray(generate(cfg.model, params, batch, NEW, how, jax.random.key(1)))
    np.testing.assert_array_equal(
        np.stack(list(stream(cfg.model, params, batch, NEW, how, jax.random.key(1))), 1), whole
    )


def test_a_stream_stops_when_every_row_has_ended():
    cfg = CONFIGS["encoder_decoder"]
    batch, params = question_batch(cfg, *prompts(cfg)), random_params(cfg, 0.3)
    every_token = SamplingParams(eos=tuple(range(cfg.decoder.vocab_size)))
    assert len(list(stream(cfg.model, params, batch, NEW, every_token))) == 1


LOGITS = jax.numpy.log(jax.numpy.array([[0.5, 0.3, 0.15, 0.05]]))


def test_a_temperature_near_0_takes_the_most_likely_token():
    """Logits overflowed, and the first token with one above 0 was taken."""
    how = AnswerOptions(temperature=1e-50).sampling(())
    assert choose(jax.numpy.array([[1.0, 2.0, 3.0]]), jax.random.key(0), how).tolist() == [2]


def chosen(how, draws=2000):
    keys = jax.random.split(jax.random.key(0), draws)
    tokens = np.asarray(jax.vmap(lambda key: choose(LOGITS, key, how)[0])(keys))
    return np.bincount(tokens, minlength=4) / draws


@pytest.mark.parametrize(
    ("how", "shares"),
    [
        (SamplingParams(), [1, 0, 0, 0]),
        (SamplingParams(temperature=1.0), [0.5, 0.3, 0.15, 0.05]),
        (SamplingParams(temperature=0.5), [0.685, 0.247, 0.062, 0.007]),
        (SamplingParams(temperature=1.0, top_k=2), [0.625, 0.375, 0, 0]),
        (SamplingParams(temperature=1.0, top_p=0.8), [0.625, 0.375, 0, 0]),
        (SamplingParams(temperature=1.0, top_p=0.81), [0.526, 0.316, 0.158, 0]),
        (SamplingParams(temperature=1.0, top_p=0.01), [1, 0, 0, 0]),
    ],
)
def test_tokens_are_drawn_as_often_as_they_are_likely(how, shares):
    np.testing.assert_allclose(chosen(how), shares, atol=0.04)
    assert ((chosen(how) > 0) == (np.array(shares) > 0)).all()


def test_generation_beyond_learned_positions_is_refused():
    cfg = CONFIGS["encoder_decoder"]
    ids, images = prompts(cfg)
    length = max(map(len, ids))
    cfg = replace(cfg, decoder=replace(cfg.decoder, positions="learned", max_positions=length + 1))
    batch = question_batch(cfg, ids, images)
    generate(cfg.model, random_params(cfg, 0.3), batch, 2, NEVER)  # the last token is not read
    with pytest.raises(
        ConfigError, match=f"{length + 2} tokens are too many: the model has {length + 1} positions"
    ):
        generate(cfg.model, random_params(cfg, 0.3), batch, 3, NEVER)


# Numbers that are not finite


def poisoned(cfg, path: tuple[str, ...], where, value=np.nan):
    """Random parameters with one value that is not finite."""
    params = random_params(cfg, 0.3)
    parameter = functools.reduce(lambda tree, name: tree[name], path, params)
    parameter[where] = value
    return params


@pytest.mark.parametrize(
    "how", [NEVER, SamplingParams(temperature=1.0, top_k=50)], ids=["greedy", "sampled"]
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_error(how, value):
    cfg = CONFIGS["cross_attention"]
    batch, params = (
        question_batch(cfg, *prompts(cfg)),
        poisoned(cfg, ("decoder", "free_head", "kernel"), (0, 0), value),
    )
    with pytest.raises(
        NonFiniteLogits, match="token 1 of row 1 are NaN or infinite: the weights are damaged"
    ) as error:
        generate(cfg.model, params, batch, NEW, how)
    assert isinstance(error.value, NonFiniteError)
    with pytest.raises(NonFiniteLogits, match="token 1 of row 1"):
        list(stream(cfg.model, params, batch, NEW, how))


def test_the_token_and_the_row_are_named_and_rows_that_have_ended_do_not_count():
    """The embedding of a token is NaN that only the third row makes, as its second."""
    cfg = CONFIGS["cross_attention"]
    free = generated("cross_attention")
    ids, images = prompts(cfg)
    token = next(
        i for i in free[2, :-1] if i not in free[:2] and not any(i in prompt for prompt in ids)
    )
    number = free[2].tolist().index(token) + 2  # the token after it
    params = poisoned(cfg, ("decoder", "embedding", "table"), token)
    batch = question_batch(cfg, ids, images)
    for run in (generate, lambda *args: list(stream(*args))):
        with pytest.raises(NonFiniteLogits, match=f"token {number} of row 3 ") as error:
            run(cfg.model, params, batch, NEW, NEVER)
        assert (error.value.token, error.value.row) == (number, 2)
    ends = SamplingParams(eos=(int(token),))
    np.testing.assert_array_equal(
        generate(cfg.model, params, batch, NEW, ends), generated("cross_attention", ends)
    )


def test_half_precision_is_named_where_it_may_be_the_reason():
    assert "overflow float16: load the parameters in float32" in str(
        NonFiniteLogits(2, 0, np.dtype("float16"))
    )
    assert "overflow" not in str(NonFiniteLogits(2, 0, np.dtype("float32")))
    assert "token 2 of 'why?' are" in str(NonFiniteLogits(2, 0, np.dtype("float32")).about("why?"))
