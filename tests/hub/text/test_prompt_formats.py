"""Prompts equal those of transformers' processors for the same tokenizer and images."""

import json

import numpy as np
import pytest
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    IdeficsImageProcessorPil,
    IdeficsProcessor,
    LlavaProcessor,
    MllamaImageProcessorPil,
    MllamaProcessor,
    PaliGemmaProcessor,
    SiglipImageProcessorPil,
)

from tests.hub import tiny_tokenizers as tiny
from tests.hub.tiny_checkpoints.shapes import fuyu_processor
from vlm_jax.config import UserError
from vlm_jax.hub.image_inputs import IMAGE_MASKS
from vlm_jax.hub.text.prompt_formats import load_prompt_format
from vlm_jax.hub.text.prompts import Prompt, stack_prompts
from vlm_jax.hub.text.tokenizer import HubTokenizer

RNG = np.random.default_rng(0)
NAMES = ("input_ids", "attention_mask", "token_type_ids", *IMAGE_MASKS)


def picture(height: int = 20, width: int = 30) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), np.uint8))


def format_of(processor, folder, **config):
    processor.save_pretrained(folder)
    tiny.write(folder, config=config)
    return load_prompt_format(folder, HubTokenizer.load(folder))


def tokenizer_in(folder, build, **options):
    build(folder, **options)
    return AutoTokenizer.from_pretrained(folder)


def assert_prompt(prompt: Prompt, reference) -> None:
    stacked = {name: value[0] for name, value in stack_prompts([prompt], pad_id=0).items()}
    assert set(stacked) == {name for name in NAMES if name in reference}
    for name, values in stacked.items():
        np.testing.assert_array_equal(values, np.asarray(reference[name])[0], err_msg=name)


def assert_stacked(prompts: list[Prompt], reference, pad_id: int) -> None:
    stacked = stack_prompts(prompts, pad_id)
    assert set(stacked) == {name for name in NAMES if name in reference}
    for name, values in stacked.items():
        assert values.dtype == np.int32
        np.testing.assert_array_equal(values, np.asarray(reference[name]), err_msg=name)


def refusal(write, *arguments) -> str:
    with pytest.raises(UserError) as error:
        write(*arguments)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)
    return str(error.value)


# ---- LLaVA: an image is as many tokens as it has patches


@pytest.fixture
def llava(tmp_path):
    tokenizer = tokenizer_in(tmp_path, tiny.llama)
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 42}, crop_size={"height": 28, "width": 42}
    )
    options = {
        "patch_size": 7,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    return LlavaProcessor(images, tokenizer, **options)


LLAVA_TEXTS = [
    ("what is it?", 0),
    ("USER: <image>\nwhat's  it? ASSISTANT:", 1),
    ("<image><image> A<image>", 3),
]


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_llava(llava, strategy, tmp_path):
    llava.vision_feature_select_strategy = strategy
    prompt_format = format_of(llava, tmp_path, model_type="llava")
    image = prompt_format.tokenizer.token_to_id("<image>")
    for text, count in LLAVA_TEXTS:
        prompt = prompt_format.prompt(text, [(28, 42)] * count)
        assert_prompt(prompt, llava(images=[picture()] * count or None, text=text))
        assert (prompt.input_ids == image).sum() == count * (24 + (strategy == "full"))


def test_llava_in_batches_and_after_a_chat_template(llava, tmp_path):
    prompt_format = format_of(llava, tmp_path, model_type="llava")
    texts, counts = zip(*LLAVA_TEXTS)
    options = {"padding": True, "padding_side": "left", "add_special_tokens": False}
    reference = llava(images=[picture()] * sum(counts), text=list(texts), **options)
    prompts = [
        prompt_format.prompt(text, [(28, 42)] * count, add_special_tokens=False)
        for text, count in LLAVA_TEXTS
    ]
    assert_stacked(prompts, reference, llava.tokenizer.pad_token_id)


@pytest.mark.parametrize("vision, tokens", [("clip_vision_model", 16), ("siglip_vision_model", 15)])
def test_llava_without_a_processor_config_follows_the_model(llava, vision, tokens, tmp_path):
    vision_config = {"model_type": vision, "patch_size": 7}
    format_of(llava, tmp_path, model_type="llava", vision_config=vision_config)
    (tmp_path / "processor_config.json").unlink()
    prompt_format = load_prompt_format(tmp_path, HubTokenizer.load(tmp_path))
    prompt = prompt_format.prompt("<image>", [(28, 28)], add_special_tokens=False)
    assert prompt.input_ids.tolist() == [prompt_format.tokenizer.token_to_id("<image>")] * tokens


@pytest.mark.parametrize(
    "text, images", [("<image> x", 2), ("<image><image>", 1), ("x", 1), ("<image>", 0)]
)
def test_llava_refuses_a_wrong_number_of_images(llava, text, images, tmp_path):
    prompt_format = format_of(llava, tmp_path, model_type="llava")
    message = refusal(prompt_format.prompt, text, [(28, 28)] * images)
    assert f"{text.count('<image>')} image tokens" in message and f"{images} images" in message


# ---- PaliGemma: images, <bos>, the prompt, and a line end


@pytest.fixture
def paligemma(tmp_path):
    tokenizer = tokenizer_in(
        tmp_path, tiny.gemma, added_tokens_decoder={"450": tiny.token("<image>")}
    )
    images = SiglipImageProcessorPil(size={"height": 28, "width": 28})
    images.image_seq_length = 4
    return PaliGemmaProcessor(images, tokenizer)


PALIGEMMA = {
    "model_type": "paligemma",
    "vision_config": {"image_size": 28, "patch_size": 14},
}
PALIGEMMA_TEXTS = [
    ("answer en what is it?", 1),
    ("<image>answer en", 1),
    ("<image><image> A", 2),
    ("two", 2),
    ("a<image>b<image>c\n", 2),
    ("", 1),
]


@pytest.mark.parametrize("text, count", PALIGEMMA_TEXTS)
def test_paligemma(paligemma, text, count, tmp_path):
    prompt_format = format_of(paligemma, tmp_path, **PALIGEMMA)
    prompt = prompt_format.prompt(text, [None] * count)
    assert_prompt(prompt, paligemma(images=[[picture()] * count], text=[text]))
    assert (prompt.input_ids == prompt_format.tokenizer.token_to_id("<image>")).sum() == 4 * count


def test_paligemma_in_batches(paligemma, tmp_path):
    prompt_format = format_of(paligemma, tmp_path, **PALIGEMMA)
    texts = ["<image> a red car", "<image><image> A", "<image>"]
    counts = [text.count("<image>") for text in texts]
    reference = paligemma(
        images=[[picture()] * count for count in counts], text=texts, padding=True
    )
    prompts = [prompt_format.prompt(text, [None] * count) for text, count in zip(texts, counts)]
    assert_stacked(prompts, reference, paligemma.tokenizer.pad_token_id)


@pytest.mark.parametrize("file", ["processor_config.json", "preprocessor_config.json"])
def test_paligemma_refuses_a_length_that_is_not_that_of_the_model(paligemma, tmp_path, file):
    format_of(paligemma, tmp_path, **PALIGEMMA)
    images = {"image_seq_length": 10**12}
    (tmp_path / "processor_config.json").unlink()
    config = {"image_processor": images} if file == "processor_config.json" else images
    (tmp_path / file).write_text(json.dumps(config))
    message = refusal(load_prompt_format, tmp_path, HubTokenizer.load(tmp_path))
    assert message.startswith(f"{file}: image_seq_length is 1000000000000, but")
    assert "4 tokens" in message


def test_paligemma_without_images_and_without_a_stated_length(paligemma, tmp_path):
    format_of(paligemma, tmp_path)
    (tmp_path / "processor_config.json").unlink()
    tiny.write(
        tmp_path,
        config={"model_type": "paligemma", "vision_config": {"image_size": 28, "patch_size": 7}},
    )
    prompt_format = load_prompt_format(tmp_path, HubTokenizer.load(tmp_path))
    text, image = (
        prompt_format.prompt("x").input_ids.tolist(),
        prompt_format.prompt("x", [None]).input_ids.tolist(),
    )
    assert text == prompt_format.tokenizer.encode("<bos>x\n", add_special_tokens=False)
    assert image == [prompt_format.tokenizer.token_to_id("<image>")] * 16 + text
    message = refusal(prompt_format.prompt, "<image><image>", [None])
    assert "2 image tokens" in message and "1 images" in message


# ---- Gemma 3: an image between its own tokens and empty lines


@pytest.fixture
def gemma3(tmp_path):
    tokenizer = tokenizer_in(tmp_path, tiny.gemma3)
    images = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    return Gemma3Processor(images, tokenizer, image_seq_length=4)


GEMMA3 = {"model_type": "gemma3", "mm_tokens_per_image": 4}
GEMMA3_TEXTS = [
    ("what is it?", 0),
    ("<start_of_image>what is it?", 1),
    ("<bos>user\n<start_of_image>\nwhat is it?", 1),
    ("<start_of_image><start_of_image> A", 2),
    ("a <start_of_image> b<start_of_image>\n", 2),
]


@pytest.mark.parametrize("text, count", GEMMA3_TEXTS)
def test_gemma3(gemma3, text, count, tmp_path):
    prompt_format = format_of(gemma3, tmp_path, **GEMMA3)
    prompt = prompt_format.prompt(text, [None] * count, not text.startswith("<bos>"))
    images = {"images": [[picture()] * count]} if count else {}
    settings = {"add_special_tokens": not text.startswith("<bos>")}
    assert_prompt(prompt, gemma3(text=[text], **images, **settings))
    assert prompt.token_type_ids.sum() == 4 * count
    assert not prompt.with_answer([5, 6]).token_type_ids[-2:].any()


def test_gemma3_refuses_what_does_not_match(gemma3, tmp_path):
    prompt_format = format_of(gemma3, tmp_path, **GEMMA3)
    message = refusal(prompt_format.prompt, "<start_of_image>", [None] * 2)
    assert "1 image tokens (<start_of_image>)" in message and "2 images" in message
    tiny.write(tmp_path, config={"model_type": "gemma3"})
    message = refusal(load_prompt_format, tmp_path, HubTokenizer.load(tmp_path))
    assert message.startswith("processor_config.json: image_seq_length is 4, but")
    tiny.write(tmp_path, config=GEMMA3)
    settings = tiny.read(tmp_path, "tokenizer_config")
    tiny.write(tmp_path, tokenizer_config={k: x for k, x in settings.items() if k != "eoi_token"})
    message = refusal(load_prompt_format, tmp_path, HubTokenizer.load(tmp_path))
    assert message.startswith("tokenizer_config.json: eoi_token is missing")


# ---- Fuyu: rows of patches, <s>, the prompt, and what begins an answer


@pytest.fixture
def fuyu():
    return fuyu_processor()


@pytest.mark.parametrize("size", [(36, 48), (20, 30), (7, 60), (90, 10), (1, 1), (36, 42)])
@pytest.mark.parametrize("text", ["what is it?\n", "", "  the <s> cat", "|NEWLINE|"])
def test_fuyu(fuyu, size, text, tmp_path):
    prompt_format = format_of(fuyu, tmp_path, model_type="fuyu")
    reference = fuyu(images=[picture(*size)], text=[text], return_legacy_image_output=False)
    ids = np.asarray(reference["input_ids"])[0]
    image = ids[: np.flatnonzero(ids == prompt_format.tokenizer.bos_id)[0]]
    grid = (
        np.sum(image == fuyu.image_newline_id),
        np.flatnonzero(image == fuyu.image_newline_id)[0],
    )
    assert grid[0] * grid[1] == np.asarray(reference["pixel_values"]).size // (6 * 6 * 3)
    np.testing.assert_array_equal(prompt_format.prompt(text, [grid]).input_ids, ids)


def test_fuyu_reads_one_image_that_the_text_does_not_mention(fuyu, tmp_path):
    prompt_format = format_of(fuyu, tmp_path, model_type="fuyu")
    assert_prompt(prompt_format.prompt("a cat"), fuyu(text=["a cat"]))
    assert "2 images" in refusal(prompt_format.prompt, "x", [(1, 1), (1, 1)])
    assert "2 image tokens" in refusal(prompt_format.prompt, "|SPEAKER|", [(1, 1)])


# ---- Llama 3.2 Vision: one token an image, and who reads it


@pytest.fixture
def mllama(tmp_path):
    tokenizer = tokenizer_in(tmp_path, tiny.llama3, model_type="mllama")
    return MllamaProcessor(
        MllamaImageProcessorPil(size={"height": 16, "width": 16}, max_image_tiles=4), tokenizer
    )


SIZES = [(16, 16), (10, 40), (60, 15), (30, 40)]  # of 1, 2, 3 and 4 tiles
MLLAMA_TEXTS = [
    ("<|image|>what is it?", [0]),
    ("<|image|><|image|> a<|image|>b<|image|>", [1, 2, 3, 0]),
    ("what <|image|>is<|image|><|image|>it", [3, 1, 0]),
    ("<|image|><|begin_of_text|>x", [2]),
    ("<|begin_of_text|>a<|image|><|image|>", [2, 3]),
]


@pytest.mark.parametrize("add_special_tokens", [True, False])
@pytest.mark.parametrize("text, sizes", MLLAMA_TEXTS)
def test_mllama(mllama, text, sizes, add_special_tokens, tmp_path):
    prompt_format = format_of(mllama, tmp_path, model_type="mllama")
    images = [picture(*SIZES[i]) for i in sizes]
    reference = mllama(images=[images], text=[text], add_special_tokens=add_special_tokens)
    tiles = np.asarray(reference["aspect_ratio_mask"])[0].sum(axis=-1)
    assert_prompt(prompt_format.prompt(text, tiles.tolist(), add_special_tokens), reference)


def test_mllama_in_batches(mllama, tmp_path):
    prompt_format = format_of(mllama, tmp_path, model_type="mllama")
    images = [[picture(*SIZES[i]) for i in sizes] for _, sizes in MLLAMA_TEXTS]
    texts = [text for text, _ in MLLAMA_TEXTS]
    reference = mllama(images=images, text=texts, padding=True, padding_side="left")
    tiles = [
        mask.sum(axis=-1)[: len(row)].tolist()
        for mask, row in zip(reference["aspect_ratio_mask"], images)
    ]
    prompts = [prompt_format.prompt(text, row) for text, row in zip(texts, tiles)]
    assert_stacked(prompts, reference, mllama.tokenizer.pad_token_id)


def test_mllama_mask_drawn(mllama, tmp_path):
    prompt_format = format_of(mllama, tmp_path, model_type="mllama")
    prompt = prompt_format.prompt(
        "<|image|><|image|><|begin_of_text|>\n<|image|>\n", [1, 1, 1], add_special_tokens=False
    )
    drawn = [
        [1, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 1],
    ]
    np.testing.assert_array_equal(prompt.cross_attention_mask[..., 0].T, drawn)
    assert not prompt.cross_attention_mask[..., 1:].any()


def test_mllama_without_images_and_with_too_many(mllama, tmp_path):
    prompt_format = format_of(mllama, tmp_path, model_type="mllama")
    assert_prompt(prompt_format.prompt("x"), mllama(text=["x"]))
    message = refusal(prompt_format.prompt, "<|image|>x<|image|>", [1])
    assert "2 image tokens" in message and "1 images" in message


# ---- Idefics: one token an image between two others, and the text that reads it


@pytest.fixture
def idefics(tmp_path):
    names = ("<fake_token_around_image>", "<image>")
    added = {str(i): tiny.token(text) for i, text in enumerate(names, start=420)}
    tokenizer = tokenizer_in(tmp_path, tiny.llama, added_tokens_decoder=added)
    return IdeficsProcessor(IdeficsImageProcessorPil(image_size=16), tokenizer, image_size=16)


# Each "" is an image.
IDEFICS_TEXTS = [
    ["", "what is it?"],
    ["User: ", "", "", " and ", "", "what  is it?  "],
    ["a", "", "cat</s>the cat", "", "", "</s> a </s>"],
    ["", ""],
]


def idefics_reference(idefics, texts, **options):
    parts = [[part or picture() for part in text] for text in texts]
    reference = idefics(text=parts, padding=True, return_tensors="pt", **options)
    if not any("" in text for text in texts):
        del reference["image_attention_mask"]
    return reference


def test_idefics(idefics, tmp_path):
    prompt_format = format_of(idefics, tmp_path, model_type="idefics")
    for text in [*IDEFICS_TEXTS, ["what is it?"]]:
        prompt = prompt_format.prompt("<image>".join(_join(text)), [None] * text.count(""))
        assert_prompt(prompt, idefics_reference(idefics, [text]))


def _join(text: list[str]) -> list[str]:
    """Texts between images."""
    pieces = [""]
    for part in text:
        pieces[-1] += part
        if not part:
            pieces.append("")
    return pieces


def test_idefics_in_batches(idefics, tmp_path):
    prompt_format = format_of(idefics, tmp_path, model_type="idefics")
    texts = [*IDEFICS_TEXTS, ["no image"]]
    prompts = [
        prompt_format.prompt("<image>".join(_join(text)), [None] * text.count("")) for text in texts
    ]
    reference = idefics_reference(idefics, texts, padding_side="left")
    assert_stacked(prompts, reference, idefics.tokenizer.pad_token_id)


def test_idefics_keeps_what_a_text_has_already(idefics, tmp_path):
    prompt_format = format_of(idefics, tmp_path, model_type="idefics")
    written = "<s><fake_token_around_image><image><fake_token_around_image>x"
    ids = prompt_format.prompt("<image>x", [None]).input_ids
    np.testing.assert_array_equal(prompt_format.prompt(written, [None]).input_ids, ids)
    assert "1 image tokens" in refusal(prompt_format.prompt, "<image>x")


# ---- other families and invalid folders


def test_a_family_without_image_tokens(tmp_path):
    tiny.gpt2(tmp_path)
    prompt_format = load_prompt_format(tmp_path, HubTokenizer.load(tmp_path))
    assert prompt_format.prompt(
        "the cat", [None]
    ).input_ids.tolist() == prompt_format.tokenizer.encode("the cat")


def test_folders_that_do_not_say_enough(llava, tmp_path):
    llava.save_pretrained(tmp_path)
    tokenizer = HubTokenizer.load(tmp_path)
    (tmp_path / "config.json").unlink(missing_ok=True)
    assert "config.json" in refusal(load_prompt_format, tmp_path, tokenizer)
    (tmp_path / "processor_config.json").unlink()
    for model_type in ("llava", "paligemma"):
        tiny.write(tmp_path, config={"model_type": model_type})
        assert "processor_config.json" in refusal(load_prompt_format, tmp_path, tokenizer)


def test_a_tokenizer_without_the_image_token(tmp_path):
    tiny.gpt2_whole(tmp_path)
    for model_type in ("llava", "paligemma", "mllama"):
        vision = {"image_size": 28, "patch_size": 7}
        tiny.write(tmp_path, config={"model_type": model_type, "vision_config": vision})
        prompt_format = load_prompt_format(tmp_path, HubTokenizer.load(tmp_path))
        text = "<|image|>" if model_type == "mllama" else "<image>"
        assert "image" in refusal(
            prompt_format.prompt, text, [1 if model_type == "mllama" else (28, 28)]
        )


@pytest.mark.parametrize(
    "key, value, reason",
    [
        ("image_token", 5, "image_token is 5"),
        ("num_additional_image_tokens", 10**7, "how many tokens an image takes"),
    ],
)
def test_llava_refuses_invalid_tokens_and_counts(llava, tmp_path, key, value, reason):
    format_of(llava, tmp_path, model_type="llava")
    tokenizer = HubTokenizer.load(tmp_path)
    tokenizer.special_tokens.pop("image_token", None)
    tiny.write(tmp_path, processor_config=tiny.read(tmp_path, "processor_config") | {key: value})
    assert reason in refusal(load_prompt_format, tmp_path, tokenizer)
