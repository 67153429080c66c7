"""Complete checkpoint folders: prompts, inputs and answers are equal to those of transformers."""

import functools
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from transformers.image_utils import load_image

from tests.hub import tiny_checkpoints as tiny
from tests.hub import tiny_tokenizers
from tests.hub.parity import forward
from tests.hub.tiny_checkpoints import ABOUT_IMAGES, CAPTIONS, OF_TEXT, Folder
from vlm_jax import from_pretrained
from vlm_jax.cli.main import main
from vlm_jax.config import UserError
from vlm_jax.hub.load import inspect
from vlm_jax.hub.processor import HubProcessor
from vlm_jax.hub.tensors.folder import open_tensors
from vlm_jax.hub.text.tokenizer import HubTokenizer
from vlm_jax.structs import NO_IMAGE

QUESTION = "what is it?"
NEW = 8


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    @functools.cache
    def make(name: str) -> Folder:
        torch.manual_seed(0)
        return (ABOUT_IMAGES | CAPTIONS | OF_TEXT)[name](tmp_path_factory.mktemp("checkpoint"))

    return make


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return tiny.pictures(tmp_path_factory.mktemp("pictures"))


def processor_of(path) -> HubProcessor:
    with open_tensors(path) as tensors:
        return HubProcessor.load(inspect(path, tensors))


def asked_of_transformers(name: str, folder: Folder, text: str, files=()) -> dict:
    """The inputs that transformers makes of a user's question about images."""
    images = [load_image(str(file)) for file in files]
    if name in CAPTIONS:
        return {
            "pixel_values": folder.reader.image_processor(images=images, return_tensors="pt")[
                "pixel_values"
            ]
        }
    if folder.reader.chat_template:
        parts = [{"type": "image", "image": image} for image in images] + [
            {"type": "text", "text": text}
        ]
        content = text if name in OF_TEXT else parts
        settings = {
            "add_generation_prompt": True,
            "tokenize": True,
            "return_dict": True,
            "return_tensors": "pt",
        }
        return dict(
            folder.reader.apply_chat_template([{"role": "user", "content": content}], **settings)
        )
    if name == "idefics":
        return dict(folder.reader(text=[[*images, text]], return_tensors="pt"))
    if name == "llava without a template":
        text = "<image>" * len(images) + text
    if name in ABOUT_IMAGES and name.startswith("paligemma"):
        return dict(folder.reader(text=[text], images=[images], return_tensors="pt"))
    legacy = {"return_legacy_image_output": False} if name == "fuyu" else {}
    return dict(
        folder.reader(
            text=text, **({"images": images} if images else {}), return_tensors="pt", **legacy
        )
    )


def said(capsys, path, *arguments) -> str:
    """What `generate` prints."""
    assert (
        main(
            [
                "generate",
                "--checkpoint",
                str(path),
                "--max-new-tokens",
                str(NEW),
                *map(str, arguments),
            ]
        )
        == 0
    )
    return capsys.readouterr().out


def pixels_of(array) -> np.ndarray:
    """Sorted, as the two sides have different orders of axes, and ours has more room."""
    flat = np.sort(np.asarray(array).ravel())
    return flat[flat != 0]


def transformers_takes(name: str, images: int) -> bool:
    if name in ("fuyu", "blip-2"):
        return images <= 1
    return images > 0 or not name.startswith("paligemma")


SHOWN = [["turned", "alpha"], ["color"], ["tall"], ["gray"], ["palette"], []]
ASKED = [
    (name, kinds)
    for name in ABOUT_IMAGES
    for kinds in SHOWN
    if transformers_takes(name, len(kinds))
]


@pytest.mark.parametrize(
    ("name", "kinds"), ASKED, ids=lambda x: x if isinstance(x, str) else "+".join(x) or "no image"
)
def test_what_is_asked_is_what_transformers_asks(folder_of, pictures, name, kinds):
    folder, files = folder_of(name), [pictures[kind] for kind in kinds]
    theirs = asked_of_transformers(name, folder, QUESTION, files)
    processor = processor_of(folder.path)
    ours = processor(QUESTION, files, chat=True)
    ids = theirs["input_ids"][0].numpy()
    in_text = ours.image_token_index[0] == NO_IMAGE
    np.testing.assert_array_equal(ours.tokens[0][in_text], ids[in_text])
    assert len(set(ids[~in_text])) <= 1, "images take the places of image tokens"
    assert ours.tokens.shape == theirs["input_ids"].shape
    if files:
        # A patch of several frames has each pixel of an image several times.
        pixels = np.repeat(pixels_of(ours.images), processor.checkpoint.cfg.vision.patch_frames)
        np.testing.assert_allclose(pixels, pixels_of(theirs["pixel_values"]), atol=1e-5)


@pytest.mark.parametrize("name", OF_TEXT)
def test_a_text_is_asked_as_transformers_asks_it(folder_of, name):
    folder = folder_of(name)
    theirs = asked_of_transformers(name, folder, QUESTION)["input_ids"].numpy()
    np.testing.assert_array_equal(processor_of(folder.path)(QUESTION, chat=True).tokens, theirs)


@pytest.mark.parametrize("name", CAPTIONS)
def test_a_caption_is_asked_for_as_transformers_asks(folder_of, pictures, name):
    folder, files = folder_of(name), [pictures["turned"]]
    theirs = asked_of_transformers(name, folder, "", files)["pixel_values"]
    ours = processor_of(folder.path)("", files, chat=True)
    np.testing.assert_allclose(pixels_of(ours.images), pixels_of(theirs), atol=1e-5)
    assert ours.tokens.tolist() == [[folder.model.config.decoder_start_token_id]]


@pytest.mark.parametrize(
    "name",
    [
        *("llava", "llava_next", "llava_onevision", "paligemma", "gemma3", "idefics3", "internvl"),
        *("qwen2.5 vl", "qwen3 vl", "mistral 3", "fuyu", "mllama", "idefics", "blip-2"),
    ],
)
def test_the_answer_about_images_is_that_of_transformers(folder_of, pictures, name, capsys):
    folder = folder_of(name)
    files = [pictures["turned"], pictures["alpha"]]
    if not transformers_takes(name, 2):
        files = files[:1]
    expected = folder.answer(NEW, **asked_of_transformers(name, folder, QUESTION, files))
    intermediate_layers = ("--intermediate-layers", "output") if name == "mllama" else ()
    assert (
        said(capsys, folder.path, "--image", *files, "--prompt", QUESTION, *intermediate_layers)
        == expected + "\n"
    )


def test_the_answer_to_a_text_is_that_of_transformers(folder_of, capsys):
    folder = folder_of("mistral's chat")
    expected = folder.answer(NEW, **asked_of_transformers("mistral's chat", folder, QUESTION))
    assert said(capsys, folder.path, "--prompt", QUESTION) == expected + "\n"


def test_a_caption_needs_no_prompt(folder_of, pictures, capsys):
    folder, file = folder_of("vit and gpt2"), pictures["turned"]
    expected = folder.answer(NEW, **asked_of_transformers("vit and gpt2", folder, "", [file]))
    assert said(capsys, folder.path, "--image", file) == expected + "\n"


def test_a_caption_may_be_begun(folder_of, pictures, capsys):
    folder = folder_of("trocr")
    inputs = asked_of_transformers("trocr", folder, "", [pictures["color"]])
    begun = [2, *folder.tokenizer(" a photo", add_special_tokens=False).input_ids]
    inputs["decoder_input_ids"] = torch.tensor([begun])
    made = folder.model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0, len(begun) :]
    expected = folder.tokenizer.decode(made, skip_special_tokens=True)
    assert (
        said(capsys, folder.path, "--image", pictures["color"], "--prompt", " a photo")
        == expected + "\n"
    )


def test_a_folder_as_transformers_4_saved_it_asks_the_same(folder_of, pictures, tmp_path):
    folder = folder_of("llava")
    shutil.copytree(folder.path, tmp_path, dirs_exist_ok=True)
    processor = json.loads((tmp_path / "processor_config.json").read_text())
    tiny_tokenizers.write(
        tmp_path, preprocessor_config=processor.pop("image_processor"), processor_config=processor
    )
    (tmp_path / "chat_template.jinja").unlink()
    tiny_tokenizers.write(tmp_path, chat_template={"chat_template": tiny.LLAVA_CHAT})
    before, after = (
        processor_of(path)(QUESTION, [pictures["turned"]], chat=True)
        for path in (folder.path, tmp_path)
    )
    np.testing.assert_array_equal(after.tokens, before.tokens)
    np.testing.assert_array_equal(after.images, before.images)


# ---- where an answer begins and ends


def changed(folder: Folder, target, **files: dict):
    """A copy of a folder with other keys in its files of JSON."""
    shutil.copytree(folder.path, target, dirs_exist_ok=True)
    for name, keys in files.items():
        old = json.loads((target / f"{name}.json").read_text())
        (target / f"{name}.json").write_text(json.dumps(old | keys))
    return target


def test_the_answer_ends_where_generation_config_says_and_its_end_is_not_printed(
    folder_of, tmp_path, capsys
):
    folder = folder_of("gemma")
    inputs = asked_of_transformers("gemma", folder, QUESTION)
    made = folder.model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[
        0, inputs["input_ids"].shape[1] :
    ]
    path = changed(folder, tmp_path, generation_config={"eos_token_id": [10_000, int(made[3])]})
    assert said(capsys, path, "--prompt", QUESTION) == folder.tokenizer.decode(made[:3]) + "\n"


def test_every_family_ends_where_generation_config_says(folder_of, tmp_path):
    for name in ABOUT_IMAGES | CAPTIONS | OF_TEXT:
        ends = {"eos_token_id": [5, 9]}
        path = changed(folder_of(name), tmp_path / name, generation_config=ends)
        assert HubTokenizer.load(path).eos_ids == (5, 9), name


def test_an_end_that_only_the_tokenizer_states_ends_the_answer(folder_of, tmp_path, capsys):
    folder = folder_of("mistral's chat")
    answer = said(capsys, folder.path, "--prompt", QUESTION)
    config = json.loads((folder.path / "config.json").read_text())
    path = without(folder, tmp_path, "generation_config.json", "config.json", "model.safetensors")
    silent = {key: value for key, value in config.items() if not key.endswith("_token_id")}
    (path / "config.json").write_text(json.dumps(silent))
    tensors, end = load_file(folder.path / "model.safetensors"), folder.tokenizer.eos_token_id
    third = folder.tokenizer.convert_tokens_to_ids(folder.tokenizer.tokenize(answer)[2])
    tensors["lm_head.weight"][[third, end]] = tensors["lm_head.weight"][[end, third]]
    save_file(tensors, path / "model.safetensors")
    processor = processor_of(path)
    assert processor.checkpoint.eos_ids == processor.tokenizer.eos_ids == (end,)
    cut = said(capsys, path, "--prompt", QUESTION)
    assert answer.startswith(cut.rstrip("\n"))
    assert len(cut) < len(answer)


def test_the_start_is_that_of_generation_config_before_others(folder_of, pictures, tmp_path):
    folder = folder_of("trocr")
    path = changed(folder, tmp_path, generation_config={"decoder_start_token_id": 9})
    assert processor_of(folder.path)("", [pictures["gray"]], chat=True).tokens.tolist() == [[2]]
    assert processor_of(path)("", [pictures["gray"]], chat=True).tokens.tolist() == [[9]]
    path = changed(folder, tmp_path, generation_config={"decoder_start_token_id": "<s>"})
    with pytest.raises(UserError, match="decoder_start_token_id is '<s>'"):
        processor_of(path)("", [pictures["gray"]], chat=True)


@pytest.mark.parametrize("end", ["</s>", [1, None], -1, 1.5, 2**31])
def test_an_end_that_is_no_id_is_refused(folder_of, tmp_path, end):
    path = changed(folder_of("gemma"), tmp_path, generation_config={"eos_token_id": end})
    with pytest.raises(UserError, match="eos_token_id is"):
        _ = processor_of(path).checkpoint.eos_ids


# ---- prompts with image tokens, and images that do not match


@pytest.mark.parametrize(
    "name, token",
    [
        ("llava", "<image>"),
        ("mllama", "<|image|>"),
        ("paligemma", "<image>"),
        ("gemma3", "<start_of_image>"),
    ],
)
def test_image_tokens_of_the_prompt_stay_where_they_are(folder_of, pictures, name, token):
    processor, files = processor_of(folder_of(name).path), [pictures["color"], pictures["tall"]]
    prompt = f"this {token} or {token}?"
    assert prompt in processor.chat(prompt, 2)
    assert processor.chat(prompt, 2).count(token) == 2
    assert processor(prompt, files, chat=True).images is not None
    with pytest.raises(UserError, match="3 image tokens .* 2 images"):
        processor(3 * token, files, chat=True)


def refusal(capsys, path, *arguments) -> str:
    # A folder that was just made has printed a progress bar.
    capsys.readouterr()
    code = main(["generate", "--checkpoint", str(path), *map(str, arguments)])
    out, error = capsys.readouterr()
    assert (code, out) == (2, "")
    assert error.count("\n") == 1
    return error


def test_images_that_a_checkpoint_does_not_read(folder_of, pictures, capsys, tmp_path):
    two = ("--image", pictures["color"], pictures["tall"], "--prompt", "x")
    assert "2 images: Fuyu takes at most one" in refusal(capsys, folder_of("fuyu").path, *two)
    assert "takes one image per prompt" in refusal(capsys, folder_of("trocr").path, *two)
    assert "takes one image per prompt" in refusal(capsys, folder_of("trocr").path, "--prompt", "x")
    assert "is a text-only model" in refusal(capsys, folder_of("gemma").path, *two)
    assert "needs --prompt" in refusal(
        capsys, folder_of("llava").path, "--image", pictures["color"]
    )
    assert "nothing.png" in refusal(
        capsys, folder_of("llava").path, "--image", "nothing.png", "--prompt", "x"
    )
    (tmp_path / "half.jpg").write_bytes(pictures["color"].read_bytes()[:500])
    assert "half.jpg" in refusal(
        capsys, folder_of("llava").path, "--image", tmp_path / "half.jpg", "--prompt", "x"
    )


def test_a_prompt_without_a_token_is_refused(folder_of):
    processor = processor_of(folder_of("gemma").path)
    assert processor([""]).tokens.tolist() == [[processor.tokenizer.bos_id]]
    for prompts in ([""], ["what", ""]):
        with pytest.raises(UserError, match="prompt is empty"):
            processor(prompts, add_special_tokens=False)


# ---- folders that lack a part


def without(folder: Folder, target, *names: str):
    shutil.copytree(folder.path, target, ignore=shutil.ignore_patterns(*names), dirs_exist_ok=True)
    return target


def test_a_folder_without_a_tokenizer_or_an_image_processor(folder_of, pictures, capsys, tmp_path):
    asks = ("--image", pictures["color"], "--prompt", "x")
    path = without(folder_of("llava"), tmp_path / "a", "tokenizer*")
    assert "has no tokenizer" in refusal(capsys, path, *asks)
    path = without(folder_of("llava"), tmp_path / "b", "processor_config.json")
    assert "has no image preprocessing config" in refusal(capsys, path, *asks)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(folder_of, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder_of("gemma").path)
    tokenizer.add_tokens("|later|")
    path = without(folder_of("gemma"), tmp_path, "tokenizer*")
    tokenizer.save_pretrained(path)
    processor_of(path)("what", chat=True)
    with pytest.raises(UserError, match=f"id {len(tokenizer) - 1}, but the model has only"):
        processor_of(path)("what |later| is it?", chat=True)


def test_an_image_processor_is_of_no_concern_to_a_text_model(folder_of, tmp_path):
    path = changed(folder_of("gemma"), tmp_path)
    (path / "preprocessor_config.json").write_text('{"image_processor_type": "SomeImageProcessor"}')
    assert processor_of(path).images is None


# ---- a batch is one by one


# Images of each row.
MIXED = {"llava": [[], ["color"], ["turned", "tall"]], "fuyu": [[], ["color"]]}
MIXED["mllama"] = MIXED["llava"]


@pytest.mark.parametrize("name", MIXED)
def test_a_row_does_not_depend_on_the_images_of_the_others(folder_of, pictures, name):
    """Chat templates put tokens before the image; these must not read the padding of images."""
    model, params, processor = from_pretrained(folder_of(name).path)
    shown = [[pictures[kind] for kind in kinds] for kinds in MIXED[name]]
    prompts = [
        processor.chat(f"what is {number}?", len(files)) for number, files in enumerate(shown)
    ]
    together = np.asarray(forward(model, params, processor(prompts, shown)).logits)
    for row, (prompt, files) in enumerate(zip(prompts, shown)):
        # Equal rows instead of one: the last and longest has the shape of the mixed batch.
        alone = processor([prompt] * len(shown), [files] * len(shown))
        own = np.asarray(forward(model, params, alone).logits)[0]
        np.testing.assert_allclose(together[row, -len(own) :], own, atol=1e-4)


# ---- nestings of images


@pytest.mark.parametrize(
    "name, token", [("llava", "<image>"), ("mllama", "<|image|>"), ("paligemma", "")]
)
def test_images_may_be_nested_as_transformers_takes_them(folder_of, pictures, name, token):
    processor, file = processor_of(folder_of(name).path), pictures["color"]
    opened, prompt, other = Image.open(file), f"{token}hello", f"{token}what is it?"
    expected = processor([prompt], [[file]])
    pixels = np.asarray(opened)
    for images in (file, str(file), opened, pixels, [file], (pixels,), [[opened]], ([pixels],)):
        for prompts in (prompt, [prompt]):
            batch = processor(prompts, images)
            np.testing.assert_array_equal(batch.tokens, expected.tokens)
            np.testing.assert_array_equal(batch.images, expected.images)
    two = processor([prompt, other], [[file], [pictures["tall"]]])
    for images in ([file, pictures["tall"]], [[file], pictures["tall"]]):
        np.testing.assert_array_equal(processor([prompt, other], images).images, two.images)
    for images in (file, [file], [[file]]):
        assert processor("what is it?", images, chat=True).images is not None
    for images in (None, (), [], [[]]):
        assert processor("hello", images).images is None
    np.testing.assert_array_equal(
        processor.images(file).pixel_values, processor.images([file]).pixel_values
    )


@pytest.mark.parametrize(
    "prompts, images, message",
    [
        (
            2,
            lambda file: [[file]],
            "1 lists for 2 prompts: give one list of images per prompt",
        ),
        (
            2,
            lambda file: [file, file, file],
            "flat list of 3 images does not match 2 prompts that need 2",
        ),
        (
            2,
            lambda file: [None, [file]],
            "images holds None: give one list of images per prompt",
        ),
        (1, lambda file: {"image": file}, "images is of the type dict: give one list of images"),
        (1, lambda file: [[[file]]], "list is not a kind of image"),
        (1, lambda file: [[b"abc"]], "bytes is not a kind of image"),
        (1, lambda file: np.zeros((8, 8, 3)), r"an array of float64 \(8, 8, 3\) is not an image"),
        (
            1,
            lambda file: np.zeros((2, 8, 8, 3), np.uint8),
            r"an array of uint8 \(2, 8, 8, 3\) is not an image",
        ),
        (
            1,
            lambda file: np.zeros((3, 8, 8), np.uint8),
            r"an array of uint8 \(3, 8, 8\) is not an image",
        ),
        (0, lambda file: [], "prompts is .*: it must be text"),
    ],
)
def test_another_nesting_is_refused_by_what_is_wrong(folder_of, pictures, prompts, images, message):
    processor = processor_of(folder_of("llava").path)
    with pytest.raises(UserError, match=message):
        processor(["<image>hello"] * prompts, images(pictures["color"]))


# ---- texts longer than the model's positions


def test_a_text_of_more_tokens_than_learned_positions_is_refused(folder_of, pictures):
    processor = processor_of(folder_of("vit and gpt2").path)  # 64 positions
    with pytest.raises(UserError, match="too long: .* but the model has only 64 positions"):
        processor(["cat " * 200], [[pictures["color"]]])
