"""The form of a conversation: what stands where, and what is scored."""

from dataclasses import replace

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from vlm_jax.config import UserError
from vlm_jax.data import packing, templates, text
from vlm_jax.data.conversations import Conversation, Conversations
from vlm_jax.data.tokenizer import (
    EOS,
    IMAGE,
    PAD,
    Tokenizer,
)
from vlm_jax.structs import NO_IMAGE
from vlm_jax.testing import tiny

TURNS = ["<image>\nwhat is it?", "a cat", "and <image> here?", "a dog"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["USER: what is it? ASSISTANT: a cat", "and here? a dog"] * 4, 300)


def experiment(kind="unified", template="plain", **data):
    cfg = tiny(kind)
    return replace(cfg, data=replace(cfg.data, template=template, **data))


def pieces(tokenizer, fields):
    """Text of a conversation, with i for an image token and $ for the end, and its scored part."""
    marks = {IMAGE: "i", EOS: "$"}
    text = [marks.get(int(i)) or tokenizer.decode([i]) for i in fields["tokens"]]
    scored = [piece for piece, is_target in zip(text[1:], fields["loss_weights"]) if is_target]
    return "".join(text), "".join(scored)


@pytest.mark.parametrize(
    ("template", "text", "scored"),
    [
        ("plain", "iiii\nwhat is it?\na cat$and iiii here?\na dog$", "a cat$a dog$"),
        (
            "vicuna",
            "USER: iiii\nwhat is it? ASSISTANT: a cat$USER: and iiii here? ASSISTANT: a dog$",
            " a cat$ a dog$",
        ),
        ("caption", "iiiia cat$iiiia dog$", "a cat$a dog$"),
    ],
)
def test_the_templates_written_out(tokenizer, template, text, scored):
    fields = templates.encode(experiment(template=template), tokenizer, TURNS, (1, 1))
    assert pieces(tokenizer, fields) == (text, scored)
    assert fields["targets"].tolist() == [*fields["tokens"][1:], PAD]
    assert fields["loss_weights"][-1] == 0


def test_a_system_turn_comes_before_the_first_question_and_is_not_scored(tokenizer):
    cfg = experiment(template="vicuna", text_length=40)
    fields = templates.encode(cfg, tokenizer, TURNS, (1, 1), "be short")
    expected = (
        "be short USER: iiii\nwhat is it? ASSISTANT: a cat$USER: and iiii here? ASSISTANT: a dog$"
    )
    assert pieces(tokenizer, fields) == (expected, " a cat$ a dog$")
    talk = Conversation("7", (0, 1), tuple(TURNS), system="be short")
    packed = packing.encode_for_packing(cfg, tokenizer, lambda index: 1, talk)
    assert packed["tokens"].tolist() == fields["tokens"].tolist()[: cfg.row_length]
    prompt = templates.prompt_row(cfg, tokenizer, TURNS[0], (1,), system="be short")["tokens"]
    assert prompt.tolist() == fields["tokens"][: len(prompt)].tolist()


@pytest.mark.parametrize("template", ["plain", "caption"])
def test_a_template_without_a_system_turn_names_the_record_that_has_it(template):
    source = Conversations((), [], None, 0, first_system="a.json: record 3")
    with pytest.raises(UserError, match=f"{template} has no .*, but a.json: record 3 has.*vicuna"):
        templates.check_system_turns(experiment(template=template), source)
    templates.check_system_turns(experiment(template="vicuna"), source)


@pytest.mark.parametrize("template", ["plain", "caption"])
def test_a_system_turn_of_a_prompt_is_refused_by_a_template_without_one(tokenizer, template):
    """The text of the turn was followed by the word None."""
    cfg = experiment(template=template)
    with pytest.raises(UserError, match=f"{template} has no system turn, but a prompt has.*vicuna"):
        templates.prompt_row(cfg, tokenizer, "what is it?", (), system="be short")


def a_space_before_a_text() -> Tokenizer:
    """As SentencePiece has it."""
    bpe = tokenizers.Tokenizer(models.Unigram())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<unk>", "<s>", "</s>", "<im>"], unk_token="<unk>"
    )
    bpe.train_from_iterator(["USER: what is it? ASSISTANT: a cat", "and here? a dog"], trainer)
    return Tokenizer(bpe, (0, 3, 0, 2))


def trimmed_offsets() -> Tokenizer:
    """A byte-level tokenizer whose offsets begin after a token's space and omit white space."""
    bpe = Tokenizer.train(["what is it?\n a cat"] * 4, 300)._bpe
    bpe.post_processor = processors.ByteLevel(trim_offsets=True)
    return Tokenizer(bpe)


@pytest.mark.parametrize("make", [a_space_before_a_text, trimmed_offsets])
@pytest.mark.parametrize("template", ["plain", "vicuna"])
def test_the_answers_alone_are_scored_with_any_tokenizer(make, template):
    tokenizer = make()
    cfg = experiment(template=template, special_ids=tokenizer._special_ids)
    fields = templates.encode(cfg, tokenizer, ["<image>\nwhat is it?", "a cat"], (1,))
    scored = fields["targets"][fields["loss_weights"] == 1]
    assert tokenizer.decode(scored).strip() == "a cat"
    assert scored[-1] == tokenizer.eos_id
    prompt = templates.prompt_row(cfg, tokenizer, "<image>\nwhat is it?", (1,))["tokens"]
    assert len(prompt) + len(scored) == len(fields["tokens"])


@pytest.mark.parametrize(
    ("kind", "slots"), [("unified", 8), ("cross_attention", 0), ("encoder_decoder", 0)]
)
def test_images_stand_where_their_marks_are(tokenizer, kind, slots):
    fields = templates.encode(experiment(kind), tokenizer, TURNS, (1, 1))
    there = fields["image_token_index"] != NO_IMAGE
    assert fields["image_token_index"][there].tolist() == list(range(slots))
    assert (fields["tokens"][there] == IMAGE).all()
    assert fields["images_seen"][there].tolist() == [1] * (slots // 2) + [2] * (slots // 2)
    assert fields["images_seen"][[0, -1]].tolist() == [1, 2]


def test_before_a_mark_no_image_is_seen(tokenizer):
    fields = templates.encode(
        experiment("cross_attention"), tokenizer, ["look <image> here", "a"], (1,)
    )
    before = len(tokenizer.encode("look "))
    assert fields["images_seen"].tolist() == [0] * before + [1] * (len(fields["tokens"]) - before)


def test_a_conversation_begins_with_its_bos(tokenizer):
    with_bos = templates.encode(experiment(bos_id=7), tokenizer, TURNS, (1, 1))
    without = templates.encode(experiment(), tokenizer, TURNS, (1, 1))
    assert with_bos["tokens"].tolist() == [7, *without["tokens"]]
    assert with_bos["loss_weights"].tolist() == [0, *without["loss_weights"]]


@pytest.mark.parametrize("question", ["<image>", "<image><image>", "hello", ""])
@pytest.mark.parametrize("bos_id", [None, 7])
@pytest.mark.parametrize("template", ["plain", "vicuna", "caption"])
@pytest.mark.parametrize(
    "kind", ["unified", "cross_attention", "encoder_decoder", "hybrid", "text_only"]
)
def test_the_first_token_of_an_answer_is_predicted_from_the_prompt_and_all_its_images(
    tokenizer, kind, template, bos_id, question
):
    cfg, tiles = experiment(kind, template, bos_id=bos_id), (1,) * question.count("<image>")
    fields = templates.encode(cfg, tokenizer, [question, "a cat"], tiles)
    row = templates.prompt_row(cfg, tokenizer, question, tiles)
    length = len(row["tokens"])
    assert length
    np.testing.assert_array_equal(row["tokens"], fields["tokens"][:length])
    scored = fields["loss_weights"] == 1
    assert scored.tolist() == [False] * (length - 1) + [True] * (len(scored) - length) + [False]
    assert fields["images_seen"][length - 1] == len(tiles)
    assert row["image_mask"][-1].all()


def test_a_begin_token_stands_only_where_a_prompt_has_no_other(tokenizer):
    def text(kind, template, turns, **data):
        fields = templates.encode(experiment(kind, template, **data), tokenizer, turns, (1, 1))
        return pieces(tokenizer, fields)[0]

    assert text("cross_attention", "caption", TURNS) == "$a cat$a dog$"
    assert text("unified", "caption", ["hello", "hi", *TURNS[:2]]) == "$hi$iiiia cat$"
    assert text("cross_attention", "caption", TURNS, bos_id=EOS) == "$a cat$a dog$"
    assert text("unified", "caption", TURNS) == "iiiia cat$iiiia dog$"
    assert text("cross_attention", "plain", ["<image>", "a cat"]) == "\na cat$"


def test_every_caption_is_predicted_with_its_own_image(tokenizer):
    fields = templates.encode(
        experiment("cross_attention", "caption", bos_id=7), tokenizer, TURNS, (1, 1)
    )
    first = 1 + len(tokenizer.encode("a cat"))  # <bos> a cat <eos> a dog <eos>
    assert fields["images_seen"].tolist() == [1] * first + [2] * (len(fields["tokens"]) - first)


def test_the_tag_before_a_caption_reads_the_whole_image(tokenizer):
    cfg = experiment("cross_attention", "caption")
    cfg = replace(cfg, vision=replace(cfg.vision, tiles=2))
    row = templates.prompt_row(cfg, tokenizer, "", (2,))
    views = np.eye(cfg.vision.views, dtype=bool)
    np.testing.assert_array_equal(row["image_mask"], [*views[:-1], [True] * cfg.vision.views])


def test_a_tokenizer_without_white_space_begins_too():
    bpe = Tokenizer.train(["a cat"] * 4, 300)._bpe
    bpe.normalizer = normalizers.Strip()
    assert text.prompt_ids(Tokenizer(bpe), "") == [EOS]
    row = templates.prompt_row(experiment("cross_attention"), Tokenizer(bpe), "", (1,))
    assert row["tokens"].tolist() == [EOS]


def test_a_bidirectional_prefix_ends_where_the_first_answer_begins(tokenizer):
    cfg = experiment()
    cfg = replace(cfg, fusion=replace(cfg.fusion, prefix="bidirectional"))
    fields = templates.encode(cfg, tokenizer, TURNS, (1, 1))
    prefix = np.argmax(fields["loss_weights"]) + 1
    assert fields["block_ids"].tolist() == [1] * prefix + [0] * (len(fields["tokens"]) - prefix)


def test_every_image_is_a_block_of_its_own(tokenizer):
    cfg = experiment()
    cfg = replace(cfg, fusion=replace(cfg.fusion, prefix="bidirectional_images"))
    fields = templates.encode(cfg, tokenizer, TURNS, (1, 1))
    blocks = fields["block_ids"]
    assert (blocks == 0).tolist() == (fields["image_token_index"] == NO_IMAGE).tolist()
    assert blocks[blocks > 0].tolist() == [1] * cfg.image_tokens + [2] * cfg.image_tokens


def test_a_prompt_is_the_start_of_its_conversation(tokenizer):
    cfg = experiment(template="vicuna", bos_id=7)
    fields = templates.encode(cfg, tokenizer, TURNS[:2], (1,))
    row = templates.prompt_row(cfg, tokenizer, TURNS[0], (1,))
    length = len(row["tokens"])
    for name in ("tokens", "image_token_index"):
        np.testing.assert_array_equal(row[name], fields[name][:length])
    assert fields["loss_weights"][length - 1] == 1, (
        "its last token is where the answer is scored from"
    )
    np.testing.assert_array_equal(row["image_mask"][:, 0], fields["images_seen"][:length] > 0)
    unmarked = templates.prompt_row(cfg, tokenizer, "what is it?", (1,), length + 3)
    np.testing.assert_array_equal(unmarked["tokens"], [PAD] * 3 + row["tokens"].tolist())
    assert unmarked["segment_ids"].tolist() == [0] * 3 + [1] * length


def test_a_prompt_that_does_not_fit_is_refused(tokenizer):
    with pytest.raises(UserError, match="1 <image> placeholders for 2 images"):
        templates.prompt_row(experiment(), tokenizer, "<image> a", (1, 1))
    with pytest.raises(UserError, match="its answer has 2 <image> placeholders for 1 images"):
        templates.prompt_row(experiment(), tokenizer, "a", (1,), answer="a tag, <image>")
    with pytest.raises(UserError, match="more than the 3 of its batch"):
        templates.prompt_row(experiment(), tokenizer, "<image> a", (1,), 3)


@pytest.mark.parametrize("template", ["plain", "vicuna", "caption"])
def test_a_later_question_is_asked_as_it_is_trained_on(tokenizer, template):
    """Its prompt, the true turns before it included, is the beginning of the training tokens."""
    cfg = experiment(template=template)
    trained = templates.encode(cfg, tokenizer, TURNS, (1, 1))
    prompt = templates.prompt_row(cfg, tokenizer, TURNS[2], (1, 1), history=TURNS[:2])
    length = len(prompt["tokens"])
    assert prompt["tokens"].tolist() == trained["tokens"][:length].tolist()
    assert trained["loss_weights"][length - 1] == 1, "the next token is the answer's first"
    assert not trained["loss_weights"][:length].all()
    assert prompt["image_mask"][-1].all(), "both images are seen"
