"""Exported runs in transformers: AutoProcessor makes our inputs, and generate our tokens."""

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    VisionEncoderDecoderModel,
)

from tests.hub import tiny_checkpoints, tiny_tokenizers
from tests.hub.parity import SMALL, bare_model, forward, saved
from tests.hub.test_export import (
    encoder_decoder_like,
    llava_like,
    mllama_like,
    qwen2_5_vl_like,
)
from tests.hub.test_processor import processor_of
from tests.hub.text import published_templates
from tests.hub.text.published_templates import PUBLISHED
from vlm_jax.cli.experiment import parse_experiment
from vlm_jax.config import Experiment, Fusion
from vlm_jax.data import images, questions, tiling
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.hub import export, pretrained_parts
from vlm_jax.hub.tensors.folder import open_tensors
from vlm_jax.hub.text.tokenizer import HubTokenizer
from vlm_jax.runtime.workdir import Workdir
from vlm_jax.structs import NO_IMAGE, PADDING, Batch
from vlm_jax.testing import random_params
from vlm_jax.train import initial, summary

NEW = 5
LENGTH = 64  # of prompts and answers, padded: equal models share a compiled program
QUESTION = "what do you see in 3?"
TEXTS = [QUESTION, "what is it?", "a red car", "is that all?", "yes"]


def from_scratch(make, **data) -> callable:
    """A run of a public layout with its own tokenizer, on conversations or questions."""

    def experiment(tmp_path) -> Experiment:
        cfg = make()
        cfg = replace(cfg, data=replace(cfg.data, text_length=90, **data))
        return replace(cfg, decoder=replace(cfg.decoder, max_positions=256))

    return experiment


def chat(folder: Path) -> None:
    """Writes a tokenizer with a chat template that takes text only."""
    published_templates.write(folder, PUBLISHED["phi 3"])


def composed(write_tokenizer: Callable[[Path], object], **data):
    """A CLIP tower and a Llama without an image token or a spare embedding row."""

    def experiment(tmp_path) -> Experiment:
        tower, text = tmp_path / "tower", tmp_path / "text"
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
        }
        for folder in (tower, text):
            folder.mkdir()
        saved(CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=8)), tower)
        CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size=32).save_pretrained(tower)
        write_tokenizer(text)
        (text / "added_tokens.json").unlink(missing_ok=True)
        tokenizer = HubTokenizer.load(text)
        eos, rows = tokenizer.eos_ids[0], tokenizer.next_id
        config = LlamaConfig(
            **SMALL | {"vocab_size": rows, "max_position_embeddings": 256}, eos_token_id=eos
        )
        saved(LlamaForCausalLM(config), tmp_path)
        for name in ("config.json", "model.safetensors"):
            (tmp_path / name).replace(text / name)
        cfg = from_scratch(llava_like, source="conversations", **data)(tmp_path)
        vision = replace(cfg.vision, checkpoint=str(tower), feature_layers=(-2,))
        cfg = replace(cfg, vision=vision, decoder=replace(cfg.decoder, checkpoint=str(text)))
        return pretrained_parts.resolve_checkpoints(cfg)

    return experiment


def whole(name: str):
    """A public checkpoint of every file."""

    def experiment(tmp_path) -> Experiment:
        folder = tmp_path / "whole"
        folder.mkdir()
        torch.manual_seed(0)
        getattr(tiny_checkpoints, name)(folder)
        base = Experiment(init_from=str(folder))
        base = replace(
            base, data=replace(base.data, source="conversations", text_length=90, augment=())
        )
        return pretrained_parts.resolve_checkpoints(base)

    return experiment


def with_placeholder() -> Experiment:
    cfg = mllama_like()
    return replace(
        cfg, fusion=replace(cfg.fusion, placeholder=True), vision=replace(cfg.vision, resize="pad")
    )


RUNS = {
    "llava, conversations": from_scratch(llava_like, source="conversations"),
    "llava, vicuna": from_scratch(llava_like, source="conversations", template="vicuna"),
    "llava, captions": from_scratch(llava_like, source="conversations", template="caption"),
    "llava, questions": from_scratch(llava_like),
    "llava of a llama 2": composed(tiny_tokenizers.llama, template="vicuna"),
    "llava of a llama 3": composed(tiny_tokenizers.llama3, template="vicuna"),
    "llava of a chat model": composed(chat),
    "whole llava": whole("llava"),
    "whole llava without a template": whole("llava_without_a_template"),
    "whole paligemma": whole("paligemma"),
    "whole gemma3": whole("gemma3"),
    "whole idefics3": whole("idefics3"),
    "whole mllama": whole("mllama"),
    "whole vit and gpt2": whole("vit_gpt2"),
    "mllama, conversations": from_scratch(with_placeholder, source="conversations", bos_id=3),
    "encoder-decoder, conversations": from_scratch(
        encoder_decoder_like, source="conversations", bos_id=3
    ),
    "encoder-decoder, captions": from_scratch(
        encoder_decoder_like, source="conversations", template="caption"
    ),
    "encoder-decoder, questions": from_scratch(encoder_decoder_like, bos_id=3),
}

# AutoProcessor needs torchvision for the videos of InternVL and Qwen2.5-VL.
OWN_PROCESSOR_ALONE = {
    "whole internvl": whole("internvl"),
    "whole qwen2.5 vl": whole("qwen2_5_vl"),
    "qwen2.5 vl, questions": from_scratch(qwen2_5_vl_like, bos_id=3),
}


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (41, 67, 3), np.uint8)).save(path)
    return path


class Run(NamedTuple):
    """A run of random parameters and its export."""

    cfg: Experiment
    params: dict
    tokenizer: Tokenizer
    family: str
    folder: Path

    def prompt(self, picture: Path, text: str) -> Batch:
        """The batch of one question, as the run encodes it."""
        pixels = tiling.to_pixels(images.read_image(picture), self.cfg.vision)
        return questions.prompt_batch(self.cfg, self.tokenizer, [[pixels]], [text])

    def logits(self, batch: Batch) -> np.ndarray:
        """Logits (B, S, V)."""
        return np.asarray(forward(bare_model(self.cfg), self.params, batch).logits)


def exported(cfg: Experiment, tmp_path) -> Run:
    cfg = replace(cfg, workdir=str(tmp_path / "run"))
    workdir = Workdir(cfg.workdir)
    workdir.path.mkdir()
    if cfg.decoder.checkpoint:
        tokenizer = initial.load_tokenizer(cfg)
    else:
        tokenizer = Tokenizer.train(TEXTS, cfg.decoder.vocab_size)
    tokenizer.save(workdir.tokenizer)
    initial.keep_processor(cfg, workdir)
    params, out = random_params(cfg, 0.2), tmp_path / "out"
    family = export.export_run(cfg, params, workdir.tokenizer, out, processor=workdir.processor)
    return Run(cfg, params, initial.load_tokenizer(cfg), family, out)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """`runs(name)`: a run of the tables above, exported once for all tests."""

    @functools.cache
    def make(name: str) -> Run:
        tmp_path = tmp_path_factory.mktemp("run")
        return exported((RUNS | OWN_PROCESSOR_ALONE)[name](tmp_path), tmp_path)

    return make


def with_answer(batch: Batch, answer: list[int]) -> Batch:
    """The batch of one prompt with an answer after it, padded on the left to LENGTH."""
    left = LENGTH - batch.tokens.shape[1] - len(answer)

    def extend(x, step=0):
        """Repeats the last token's value, or counts on from it."""
        if x is None:
            return None
        after = x[:, -1:] + step * np.arange(1, len(answer) + 1)
        return np.concatenate([np.zeros((1, left), x.dtype), x, after], axis=1)

    def extend_mask(mask):
        if mask is None:
            return None
        after = np.repeat(mask[:, -1:], len(answer), axis=1)
        return np.concatenate([np.repeat(mask[:, :1], left, axis=1), mask, after], axis=1)

    return batch.replace(
        tokens=np.concatenate([np.zeros((1, left), int), batch.tokens, [answer]], axis=1),
        positions=extend(batch.positions, step=1),
        segment_ids=extend(batch.segment_ids),
        branch_ids=extend(batch.branch_ids),
        image_token_index=np.pad(
            batch.image_token_index, ((0, 0), (left, len(answer))), constant_values=NO_IMAGE
        ),
        image_mask=extend_mask(batch.image_mask),
        no_image_mask=extend_mask(batch.no_image_mask),
        block_ids=None
        if batch.block_ids is None
        else np.pad(batch.block_ids, ((0, 0), (left, len(answer)))),
        targets=None,
        loss_weights=None,
    )


@pytest.mark.parametrize("name", RUNS)
def test_transformers_answers_as_the_run_does(runs, name, picture):
    """Teacher forcing: every token that transformers generates is the run's most likely one."""
    run = runs(name)
    assert export.exportable(run.cfg) == f"export: {run.family}"
    prompt = "" if "captions" in name else QUESTION
    processor = AutoProcessor.from_pretrained(run.folder)
    image = Image.open(picture).convert("RGB")
    inputs = asked_of_transformers(processor, run.family, name, image, prompt)
    is_encoder_decoder = run.family == "vision-encoder-decoder"
    cls = VisionEncoderDecoderModel if is_encoder_decoder else AutoModelForImageTextToText
    model, report = cls.from_pretrained(run.folder, output_loading_info=True, dtype=torch.float32)
    assert not report["unexpected_keys"]
    assert all(".pooler." in key for key in report["missing_keys"])
    model.generation_config.eos_token_id = None
    sequence = model.eval().generate(**inputs, max_new_tokens=NEW, do_sample=False)[0].tolist()
    answer = sequence[-NEW:]
    assert len(set(answer)) > 1, "equal tokens would prove little"
    logits = run.logits(with_answer(run.prompt(picture, prompt), answer))
    assert logits[0, -NEW - 1 : -1].argmax(-1).tolist() == answer


def test_a_run_begun_from_phi_3_is_exported_as_phi_3(tmp_path):
    """And not as Llama, which has the same architecture, but other tensors."""
    base = tmp_path / "base"
    base.mkdir()
    chat(base)
    rows = HubTokenizer.load(base).next_id
    sizes = SMALL | {"vocab_size": rows, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}
    saved(Phi3ForCausalLM(Phi3Config(**sizes)), base)
    cfg = Experiment(init_from=str(base), fusion=Fusion("text_only"))
    cfg = replace(cfg, data=replace(cfg.data, source="conversations", augment=()))
    run = exported(pretrained_parts.resolve_checkpoints(cfg), tmp_path)
    assert (run.family, export.exportable(run.cfg)) == ("phi3", "export: phi3")
    with open_tensors(base) as before, open_tensors(run.folder) as after:
        assert set(after) == set(before)
    assert export.exportable(replace(run.cfg, decoder=replace(run.cfg.decoder, checkpoint=""))) == (
        "export: llama"
    )


def asked_of_transformers(processor, family, name, image, prompt) -> dict:
    if family == "vision-encoder-decoder":
        if processor.tokenizer.chat_template:
            parts = [{"type": "image"}, {"type": "text", "text": prompt}]
            messages = [{"role": "user", "content": parts}]
            prompt = processor.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
        ids = processor.tokenizer(prompt, return_tensors="pt").input_ids
        if name == "whole vit and gpt2":
            ids = torch.cat([torch.tensor([[0]]), ids], 1)
        return {
            "pixel_values": processor.image_processor(image, return_tensors="pt").pixel_values,
            "decoder_input_ids": ids.long(),
        }
    if processor.chat_template is None:
        return processor(text=prompt, images=image, return_tensors="pt")
    parts = [{"type": "image"}, {"type": "text", "text": prompt}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True
    )
    # As apply_chat_template tokenizes: Gemma 3's template has written bos.
    settings = {"add_special_tokens": False} if family == "gemma3" else {}
    return processor(text=text, images=image, return_tensors="pt", **settings)


@pytest.mark.parametrize("name", RUNS | OWN_PROCESSOR_ALONE)
def test_our_own_processor_encodes_for_the_exported_folder_as_the_run_does(runs, name, picture):
    """The same tokens and pixels: `generate --checkpoint` and `--workdir` answer alike."""
    run, prompt = runs(name), "" if "captions" in name else QUESTION
    expected = run.prompt(picture, prompt)
    processor = processor_of(run.folder)
    assert set(run.tokenizer.eos_ids) <= set(processor.eos_ids)
    batch = processor(prompt, [picture], chat=True)
    np.testing.assert_array_equal(text_tokens(batch), text_tokens(expected))
    np.testing.assert_allclose(pixels(batch), pixels(expected), atol=1e-5)
    np.testing.assert_array_equal(batch.rope_positions, expected.rope_positions)


def pixels(batch: Batch) -> np.ndarray:
    """Images, or at native resolution their patches without padding."""
    images = np.asarray(batch.images)
    return images if batch.patch_images is None else images[batch.patch_images > PADDING]


def text_tokens(batch: Batch) -> np.ndarray:
    """Tokens of the first row, without image tokens."""
    is_text = np.asarray(batch.image_token_index[0]) == NO_IMAGE
    return np.asarray(batch.tokens[0])[is_text]


def test_an_image_token_is_added_with_a_row_that_never_wins(runs):
    """Its logit is the mean of the others."""
    run = runs("llava of a llama 2")
    rows = run.cfg.decoder.vocab_size
    config = json.loads((run.folder / "config.json").read_text())
    assert config["image_token_index"] == rows
    assert config["text_config"]["vocab_size"] == rows + 1
    model = AutoModelForImageTextToText.from_pretrained(run.folder, dtype=torch.float32)
    head = model.get_output_embeddings().weight.detach()
    torch.testing.assert_close(head[rows], head[:rows].mean(0))


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_another_image_size_is_that_of_the_exported_processor(name, tmp_path):
    folder = tmp_path / "whole"
    folder.mkdir()
    torch.manual_seed(0)
    getattr(tiny_checkpoints, name)(folder)
    config = tmp_path / "config.py"
    config.write_text(
        "from vlm_jax.config import Experiment\n\ndef get_config():\n    return Experiment()\n"
    )
    arguments = ["--config", config, "--checkpoint", folder, "--vision.image_size_px", 42]
    cfg = parse_experiment("train", list(map(str, arguments)), stored=False)
    processor = AutoProcessor.from_pretrained(exported(cfg, tmp_path).folder)
    if name == "llava":
        assert processor.image_processor.crop_size["height"] == 42
    else:
        assert processor.image_processor.size["height"] == 42
        assert processor.image_seq_length == cfg.image_tokens == 9


def test_what_keeps_transformers_from_the_same_prompts_is_named():
    assert "fusion.placeholder False" in export.exportable(mllama_like())
    assert "data.bos_id None" in export.exportable(encoder_decoder_like())
    assert export.exportable(replace(llava_like(), fusion=Fusion("hybrid"))).startswith(
        "export: none, fusion.kind"
    )


def test_a_training_run_names_its_export_unless_a_model_from_scratch_has_none():
    exported = llava_like()
    other = replace(exported, fusion=Fusion("hybrid"))
    fine_tuned = replace(other, decoder=replace(other.decoder, checkpoint="vicuna"))
    assert summary.describe_export(exported) == "llava"
    assert summary.describe_export(other) == ""
    assert summary.describe_export(fine_tuned).startswith("none, fusion.kind")


def test_that_fuyus_processor_keeps_the_size_of_images_is_named(tmp_path):
    assert export.exportable(whole("fuyu")(tmp_path)).endswith(
        "does not support vision.image_size_px 48"
    )


def test_why_a_run_has_no_family_is_said_in_whole_fields():
    message = export.exportable(replace(llava_like(), fusion=Fusion("cross_attention")))
    assert message.count("(") == message.count(")")
    assert message.endswith(" more")


def test_the_chat_template_of_a_text_decoder_replaces_the_default_form_only(runs, tmp_path):
    assert runs("llava of a chat model").cfg.data.template == "checkpoint"
    assert composed(chat, template="vicuna")(tmp_path).data.template == "vicuna"


def tile_map_like() -> Experiment:
    """LLaVA-NeXT's layout."""
    cfg = llava_like()
    grids = {"tiles": 2, "tile_grids": ((1, 1), (1, 2)), "resize": "pad"}
    return replace(cfg, vision=replace(cfg.vision, **grids))


def test_the_exported_processor_cuts_the_tiles_of_the_run(tmp_path, picture):
    run = exported(from_scratch(tile_map_like, source="conversations")(tmp_path), tmp_path)
    assert run.family == "llava_next"
    assert export.exportable(run.cfg) == "export: llava_next"
    bare = replace(run.cfg, vision=replace(run.cfg.vision, thumbnail=False))
    assert export.exportable(bare).endswith("does not support vision.thumbnail False")
    image, expected = Image.open(picture).convert("RGB"), run.prompt(picture, QUESTION)
    processor = AutoProcessor.from_pretrained(run.folder)
    inputs = asked_of_transformers(processor, run.family, "", image, QUESTION)
    assert inputs["input_ids"].shape == expected.tokens.shape
    whole, *tiles = np.moveaxis(inputs["pixel_values"].numpy()[0], 1, -1)
    np.testing.assert_allclose(tiles, expected.images[0, :2], atol=1e-5)
    # The run's is made of the resized image.
    assert np.abs(whole - expected.images[0, 2]).mean() < 0.2
    batch = processor_of(run.folder)(QUESTION, [picture], chat=True)
    np.testing.assert_array_equal(batch.image_token_index, expected.image_token_index)
    np.testing.assert_array_equal(text_tokens(batch), text_tokens(expected))


def test_a_run_begun_from_tile_maps_keeps_their_processor(tmp_path):
    run = exported(whole("llava_next")(tmp_path), tmp_path)
    assert run.family == "llava_next"
    stored = tmp_path / "whole" / "processor_config.json"
    assert (run.folder / stored.name).read_bytes() == stored.read_bytes()


def test_the_largest_map_decides_between_the_families_with_tile_maps(tmp_path):
    cfg = whole("llava_onevision")(tmp_path)
    assert export.exportable(cfg) == "export: llava_onevision"
    cfg = replace(cfg, vision=replace(cfg.vision, max_map_tiles=None))
    assert export.exportable(cfg) == "export: llava_next"
