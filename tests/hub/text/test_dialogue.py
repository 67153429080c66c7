"""Training conversations have the tokens of the inference prompt, and only answers are scored."""

import functools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.hub.test_processor import processor_of
from tests.hub.tiny_checkpoints import ABOUT_IMAGES, CAPTIONS, OF_TEXT, Folder, idefics3_whole
from vlm_jax.config import Data, Experiment, UserError
from vlm_jax.data import templates, tiling
from vlm_jax.data.forms.record import IMAGE_PLACEHOLDER
from vlm_jax.hub import load
from vlm_jax.hub.pretrained_parts import resolve_checkpoints
from vlm_jax.hub.text.chat_template import ChatTemplate
from vlm_jax.hub.text.dialogue import NO_TOKEN, Dialogue, content_parts
from vlm_jax.hub.text.prompts import ChatPrompt
from vlm_jax.structs import NO_IMAGE
from vlm_jax.train.initial import load_tokenizer

QUESTION, ANSWER = "what is it?", "a red car"
# In training an image is one square.
EVERY = ABOUT_IMAGES | {"idefics3": idefics3_whole} | CAPTIONS | OF_TEXT
# Its template is refused (`test_a_template_that_changes_a_question_is_refused`).
del EVERY["llava_onevision"]
# They have the prompt forms of Idefics3, Qwen2.5-VL and Mistral 3.
del EVERY["smolvlm"], EVERY["qwen3 vl"], EVERY["pixtral"]
# Tokens between the rows of an image, which training adds with the image tokens.
ROW_ENDS = {"fuyu": "|NEWLINE|", "mistral 3": "[IMG_BREAK]"}


@pytest.fixture(scope="module", autouse=True)
def unchecked_shapes():
    """Skips the check of tensor shapes, which traces every model: no weights are used here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "param_shapes", lambda cfg: {})
        patch.setattr(load, "check", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    @functools.cache
    def make(name: str) -> Folder:
        torch.manual_seed(0)
        return EVERY[name](tmp_path_factory.mktemp("checkpoint"))

    return make


def dialogue_of(name, folder) -> Dialogue:
    return Dialogue.load(folder, has_images=name not in OF_TEXT)


def without_images(tokens, slots) -> list[int]:
    return [int(i) for i, slot in zip(tokens, slots) if slot == NO_IMAGE]


@pytest.mark.parametrize("name", EVERY)
def test_training_tokens_are_those_of_the_inference_prompt(folder_of, name):
    """The tokens before the answer equal the inference prompt, and the answer ends the text."""
    folder = folder_of(name).path
    dialogue, processor = dialogue_of(name, folder), processor_of(folder)
    tokens = dialogue.encode(
        [QUESTION if name in OF_TEXT else f"{IMAGE_PLACEHOLDER}\n{QUESTION}", ANSWER]
    )
    first = tokens.is_scored.index(True)
    picture = Image.new("RGB", (40, 30), (200, 30, 40))
    batch = processor(QUESTION, [] if name in OF_TEXT else [picture], chat=True)
    slots = np.asarray(batch.image_token_index[0])
    expected = without_images(np.asarray(batch.tokens[0]), slots)
    # An image in the sequence is one placeholder here, and several tokens in the prompt.
    in_sequence = (slots != NO_IMAGE).any()
    prompt_ids = [
        i
        for i, is_image in zip(tokens.ids[:first], tokens.is_image)
        if not (is_image and (in_sequence or i < 0))
    ]
    if name in ROW_ENDS:
        expected = [i for i in expected if i != processor.tokenizer.token_to_id(ROW_ENDS[name])]
    assert prompt_ids == expected
    assert sum(tokens.is_image) == (name not in OF_TEXT)
    assert all(tokens.is_scored[first:])
    text = processor.tokenizer.decode(tokens.ids[first:])
    # Some tokenizers put spaces between single letters.
    assert "aredcar" in text.replace(" ", "").replace("\u2581", "")
    # Some templates write a line end after the end of text.
    writes_line_end = ("a chat without bos", "qwen3", "idefics3", "internvl", "qwen2.5 vl")
    assert tokens.ids[-1] in dialogue.eos_ids or name in writes_line_end

    prompt = ChatPrompt((QUESTION if name in OF_TEXT else f"{IMAGE_PLACEHOLDER}\n{QUESTION}",))
    as_chat = processor(prompt, [] if name in OF_TEXT else [picture], chat=True)
    np.testing.assert_array_equal(as_chat.tokens, batch.tokens)
    np.testing.assert_array_equal(as_chat.image_token_index, batch.image_token_index)


@pytest.mark.parametrize("name", ["mistral 3", "qwen2.5 vl"])
def test_the_rows_of_an_image_are_those_of_the_inference_prompt(folder_of, name):
    folder = folder_of(name).path
    data = Data(source="conversations", files=("talks.json",))
    cfg = resolve_checkpoints(Experiment(data=data, init_from=str(folder)))
    tiles = tiling.predict_tiles(40, 32, cfg.vision)
    turns = [f"{IMAGE_PLACEHOLDER}\n{QUESTION}"]
    row = templates.encode(cfg, load_tokenizer(cfg), turns, [tiles])
    batch = processor_of(folder)(QUESTION, [Image.new("RGB", (40, 32))], chat=True)
    slots = np.asarray(batch.image_token_index[0])
    np.testing.assert_array_equal(row["image_token_index"], slots)
    assert without_images(row["tokens"], slots) == without_images(batch.tokens[0], slots)


@pytest.mark.parametrize("name", ["llama", "mistral's chat"])
def test_several_turns_are_those_of_transformers(folder_of, name):
    """Ids equal `apply_chat_template`; everything after a generation prompt is scored, up to the
    next question.
    """
    folder = folder_of(name)
    turns = [QUESTION, ANSWER, "and the sky?", "blue, it's a line\nor two"]
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)
    ]
    settings = {"tokenize": True, "return_dict": True}
    expected = folder.reader.apply_chat_template(messages, **settings)["input_ids"]
    tokens = dialogue_of(name, folder.path).encode(turns)
    assert tokens.ids[: len(expected)] == expected
    prompt = folder.reader.apply_chat_template(
        messages[:3], add_generation_prompt=True, **settings
    )["input_ids"]
    batch = processor_of(folder.path)(ChatPrompt(tuple(turns[:3])), chat=True)
    assert np.asarray(batch.tokens[0]).tolist() == prompt
    assert set(tokens.ids[len(expected) :]) <= set(dialogue_of(name, folder.path).eos_ids)
    is_scored = np.zeros(len(tokens.ids), bool)
    for answered in (1, 3):
        before = folder.reader.apply_chat_template(
            messages[:answered], add_generation_prompt=True, **settings
        )
        through = folder.reader.apply_chat_template(messages[: answered + 1], **settings)
        is_scored[len(before["input_ids"]) : len(through["input_ids"])] = True
    is_scored[len(expected) :] = True
    np.testing.assert_array_equal(tokens.is_scored, is_scored)


def test_answers_that_a_later_question_changes_are_scored_up_to_their_end(folder_of):
    """Qwen3's template drops the empty block of reasoning of all answers but the last."""
    dialogue = dialogue_of("qwen3", folder_of("qwen3").path)
    text, spans = dialogue.script([QUESTION, ANSWER, "and the sky?", "blue"])
    answers = [text[start:end] for start, end in spans]
    assert answers == ["a red car<|im_end|>", "<think>\n\n</think>\n\nblue<|im_end|>\n"]


@pytest.mark.parametrize(
    ("source", "is_text"),
    [
        ("{% for m in messages %}<{{ m.role }}>{{ m.content }}|{% endfor %}", True),
        (
            "{% for m in messages %}<{{ m.role }}>"
            "{% for part in m.content %}{{ part.text }}{% endfor %}|{% endfor %}",
            False,
        ),
    ],
)
def test_a_system_turn_is_the_first_message_of_the_template(folder_of, tmp_path, source, is_text):
    dialogue = dialogue_of("llama", folder_of("llama").path)
    changed = replace(dialogue, template=ChatTemplate(source, tmp_path))
    text, spans = changed.script([QUESTION, ANSWER, "and?", "blue"], "be short")
    assert text == (
        f"<system>be short|<user>{QUESTION}|<assistant>{ANSWER}|<user>and?|<assistant>blue|"
    )
    assert [text[start:end].rpartition(">")[2] for start, end in spans] == [f"{ANSWER}|", "blue|"]
    assert changed._system_message("a")["content"] == (
        "a" if is_text else [{"type": "text", "text": "a"}]
    )


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}",
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}a",
    ],
)
def test_a_template_that_leaves_out_a_system_turn_is_refused(folder_of, tmp_path, source):
    dialogue = dialogue_of("llama", folder_of("llama").path)
    for changed in (
        replace(dialogue, template=ChatTemplate(source, tmp_path)),
        replace(dialogue, template=None),
    ):
        with pytest.raises(UserError, match="has no system turn, .* set data.template to vicuna"):
            changed.encode([QUESTION, ANSWER], "be short")


def test_images_keep_their_order_among_the_texts():
    turn = f"compare {IMAGE_PLACEHOLDER} with {IMAGE_PLACEHOLDER}\nplease"
    assert [part.get("text", IMAGE_PLACEHOLDER) for part in content_parts(turn)] == [
        "compare ",
        IMAGE_PLACEHOLDER,
        " with ",
        IMAGE_PLACEHOLDER,
        "please",
    ]


@pytest.mark.parametrize(("name", "in_text"), [("llava", True), ("vit and gpt2", False)])
def test_an_image_has_a_placeholder_where_the_family_writes_one(folder_of, name, in_text):
    tokens = dialogue_of(name, folder_of(name).path).encode(
        [f"{IMAGE_PLACEHOLDER}\n{IMAGE_PLACEHOLDER}\n{QUESTION}", ANSWER]
    )
    image_ids = [i for i, is_image in zip(tokens.ids, tokens.is_image) if is_image]
    assert len(image_ids) == 2
    assert (image_ids == [NO_TOKEN] * 2) != in_text


def test_marked_answers_lie_between_the_texts_of_images(folder_of, tmp_path):
    """Gemma 3's processor replaces the placeholders of the template by longer texts."""
    source = (
        "{{ bos_token }}{% for m in messages %}{% for part in m.content %}"
        "{% if part.type == 'image' %}<start_of_image>{% elif m.role == 'user' %}{{ part.text }}"
        "{% else %}{% generation %}{{ part.text }}|{% endgeneration %}{% endif %}"
        "{% endfor %}{% endfor %}"
    )
    dialogue = dialogue_of("gemma3", folder_of("gemma3").path)
    changed = replace(dialogue, template=ChatTemplate(source, tmp_path))
    question = f"{IMAGE_PLACEHOLDER}\n{QUESTION}"
    text, spans = changed.script([question, ANSWER, question, "blue"])
    assert text.count("\n\n<start_of_image><image_soft_token><end_of_image>\n\n") == 2
    assert [text[start:end] for start, end in spans] == [f"{ANSWER}|", "blue|"]


def test_a_template_that_rewrites_questions_is_refused(folder_of, tmp_path):
    folder = folder_of("llama").path
    dialogue = dialogue_of("llama", folder)
    source = (
        "{{ messages | length }}{% for m in messages %}{{ m['content'] }}<|eot_id|>{% endfor %}"
    )
    template = type(dialogue.template)(source, tmp_path / "chat_template.jinja")
    changed = replace(dialogue, template=template)
    with pytest.raises(UserError, match="answers cannot be marked: set data.template"):
        changed.encode([QUESTION, ANSWER])


def test_a_template_that_changes_a_question_is_refused(tmp_path):
    """LLaVA-OneVision's writes a space behind `assistant` once there is an answer."""
    folder = ABOUT_IMAGES["llava_onevision"](tmp_path).path
    dialogue = dialogue_of("llava_onevision", folder)
    difference = re.escape(r"'t|>assistant\n' to 't|>assistant \na red car<'")
    with pytest.raises(UserError, match=f"changes a question once it is answered, .*{difference}"):
        dialogue.encode([QUESTION, ANSWER])
    source = dialogue.template.source
    corrected = source.replace("m['role'] + ' '", "m['role'] + ' ' * (m['role'] == 'user')")
    corrected = replace(dialogue, template=ChatTemplate(corrected, tmp_path))
    turns = [QUESTION, ANSWER, "and the sky?", "blue"]
    text, spans = corrected.script(turns)
    assert [text[start:end] for start, end in spans] == ["a red car<|im_end|>", "blue<|im_end|>"]
    assert text.startswith(dialogue.prompt_text(turns[:1]))


@pytest.mark.parametrize("name", EVERY)
def test_a_training_batch_scores_the_answers_behind_the_prompts(folder_of, name):
    """For two prompts of different lengths, the tokens are the inference prompt and the answer."""
    folder = folder_of(name).path
    processor, dialogue = processor_of(folder), dialogue_of(name, folder)
    picture = Image.new("RGB", (40, 30), (200, 30, 40))
    images = [[], []] if name in OF_TEXT else [[picture], [picture]]
    prompts, answers = [QUESTION, "what colour is the sky?"], [ANSWER, "blue"]
    batch = processor(prompts, images, chat=True, answers=answers)
    prompt = processor(prompts[:1], images[:1], chat=True)
    targets, weights = np.asarray(batch.targets), np.asarray(batch.loss_weights) > 0
    turns = [QUESTION if name in OF_TEXT else f"{IMAGE_PLACEHOLDER}\n{QUESTION}", ANSWER]
    tokens = dialogue.encode(turns)
    ids = [i for i, is_scored in zip(tokens.ids, tokens.is_scored) if is_scored]
    if processor.template is None:
        ids = [*processor.tokenizer.encode(ANSWER, add_special_tokens=False), dialogue.eos_id]
    assert targets[0][weights[0]].tolist() == ids
    row = np.asarray(batch.tokens[0])[np.asarray(batch.segment_ids[0]) > 0]
    assert row.tolist() == [*np.asarray(prompt.tokens[0]).tolist(), *ids]
    if batch.block_ids is not None:  # an answer is causal
        assert not np.asarray(batch.block_ids[0])[-len(ids) :].any()


def test_answers_that_do_not_match_are_refused(folder_of):
    processor = processor_of(folder_of("llama").path)
    with pytest.raises(UserError, match="answers must be a list of 2 texts"):
        processor(["a", "b"], answers=["c"])


def test_a_template_that_leaves_out_images_is_refused(folder_of):
    """Otherwise a run would be trained without its images."""
    dialogue = dialogue_of("llava", folder_of("llava").path)
    template = ChatTemplate(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | length }}{% endfor %}",
        Path("chat_template.jinja"),
    )
    changed = replace(dialogue, template=template)
    with pytest.raises(UserError, match="writes 0 image tokens .* for the 1 images"):
        changed.encode([f"{IMAGE_PLACEHOLDER}\nwhat is it?", "a car"])
