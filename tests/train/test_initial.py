"""Initial parameters: of a public checkpoint, another run, or parts of them, with settings."""

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
from flax import traverse_util
from PIL import Image
from transformers import AutoImageProcessor
from transformers.image_utils import load_image

from tests.hub.tiny_checkpoints import ABOUT_IMAGES, CAPTIONS, OF_TEXT
from vlm_jax import axes
from vlm_jax.cli.experiment import parse_experiment
from vlm_jax.cli.main import main
from vlm_jax.config import (
    Fusion,
    Mesh,
    UserError,
    files,
)
from vlm_jax.data import packing, pipeline, tiling
from vlm_jax.data.builders.records import Record
from vlm_jax.data.images import normalize
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.hub.load import load_checkpoint
from vlm_jax.infer.run import RunProcessor
from vlm_jax.nn.patches import resample_positions
from vlm_jax.runtime.workdir import Workdir
from vlm_jax.structs import State
from vlm_jax.testing import random_params, tiny
from vlm_jax.train import initial
from vlm_jax.train.checkpoint import Checkpoints
from vlm_jax.train.step import abstract_state, init_state

MODEL = ("vision", "projector", "fusion", "decoder")
EVERY = ABOUT_IMAGES | CAPTIONS | OF_TEXT
CONFIG = """
import dataclasses
from vlm_jax.testing import tiny

def get_config():
    cfg = tiny()
    data = dataclasses.replace(
        cfg.data, source="conversations", files=("talks.json",), images_per_row=1
    )
    return dataclasses.replace(cfg, data=data)
"""


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    @functools.cache
    def make(name: str) -> str:
        torch.manual_seed(0)
        return str(EVERY[name](tmp_path_factory.mktemp("checkpoint")).path)

    return make


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(CONFIG)
    return str(path)


def experiment(config, *options):
    return parse_experiment("train", ["--config", config, *map(str, options)], stored=False)


def loaded(cfg) -> dict:
    mesh = axes.make_mesh(Mesh())
    return initial.load_parts(cfg, abstract_state(cfg, mesh), mesh)


def without_folder(section):
    return replace(section, checkpoint="") if hasattr(section, "checkpoint") else section


@pytest.mark.parametrize("name", EVERY)
def test_a_whole_checkpoint_is_the_model_of_from_pretrained(folder_of, config, name):
    """Bitwise equal parameters, and equal logits at step 0, which depend on all settings."""
    folder = folder_of(name)
    cfg = experiment(config, "--checkpoint", folder)
    checkpoint, params = load_checkpoint(folder, np.float32)
    for section in MODEL if name not in OF_TEXT else ("fusion", "decoder"):
        actual, expected = getattr(cfg, section), getattr(checkpoint.cfg, section)
        pixels = (
            (
                *("image_mean", "image_std", "resize", "resize_px", "resample", "rgb_conversion"),
                "max_patches",
            )
            if section == "vision"
            else ()
        )
        actual = replace(
            without_folder(actual), **{name: getattr(expected, name) for name in pixels}
        )
        assert actual == expected
    flat, expected = loaded(cfg), traverse_util.flatten_dict(params, sep="/")
    assert flat.keys() == expected.keys()
    for path, x in expected.items():
        np.testing.assert_array_equal(flat[path], x, err_msg=path)


MODES = ("RGBA", "LA", "P", "I;16")


def image_file(folder: Path, mode: str) -> Path:
    """An image with transparent pixels, or with values above 255."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (33, 47, 4), np.uint8))
    options = {}
    if mode == "P":
        image, options = image.convert("RGB").quantize(8), {"transparency": 3}
    elif mode == "I;16":
        image = Image.fromarray(rng.integers(0, 1000, (33, 47)).astype(np.uint16))
    image = image if image.mode == mode else image.convert(mode)
    path = folder / "image.png"
    image.save(path, **options)
    return path


class Records(list):
    title = "records"


def trained_pixels(cfg, path: Path) -> np.ndarray:
    """Pixels of an image of conversations, which are those of an image of records."""
    source = SimpleNamespace(image=lambda index: (path.name, path.read_bytes()))
    pixels = packing.pixel_reader(cfg, source)(0)
    records = Records([Record(0, path.read_bytes(), (), (), ())])
    np.testing.assert_array_equal(pipeline.DecodedRecords(records, cfg.vision)[0].image, pixels)
    return normalize(pixels, cfg.vision)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llava", "paligemma", "trocr"])
def test_pixels_of_a_run_are_those_of_its_checkpoint(folder_of, config, tmp_path, name, mode):
    """Training, and questions about a file or an open image."""
    cfg = experiment(config, "--checkpoint", folder_of(name))
    path = image_file(tmp_path, mode)
    processor = AutoImageProcessor.from_pretrained(folder_of(name), backend="pil")
    pixels = processor([load_image(str(path))], return_tensors="np").pixel_values[0]
    expected = np.moveaxis(pixels, 0, -1)
    np.testing.assert_allclose(trained_pixels(cfg, path), expected, atol=1e-5)
    ask = RunProcessor(cfg, initial.load_tokenizer(cfg))
    for image in (str(path), Image.open(path)):
        batch = ask(["what is it?"], [[image]])
        np.testing.assert_allclose(np.squeeze(batch.images), expected, atol=1e-5)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_a_run_without_a_checkpoint_composites_on_white(config, tmp_path, mode):
    """Also one that earlier versions began from a checkpoint: its config has no rgb_conversion."""
    cfg, path = experiment(config), image_file(tmp_path, mode)
    white = Image.new("RGBA", (47, 33), "white")
    composite = Image.alpha_composite(white, Image.open(path).convert("RGBA")).convert("RGB")
    expected = tiling.to_pixels(composite, cfg.vision)
    np.testing.assert_array_equal(trained_pixels(cfg, path), expected)
    batch = RunProcessor(cfg, Tokenizer.train(["what?"], 300))(["what?"], [[str(path)]])
    np.testing.assert_array_equal(np.squeeze(batch.images), expected)


def test_a_run_of_an_earlier_version_keeps_its_rgb_conversion(folder_of, config, tmp_path):
    options = ("--checkpoint", folder_of("llava"), "--workdir", tmp_path / "run")
    cfg = experiment(config, *options)
    assert cfg.vision.rgb_conversion == "convert_composite"
    stored = json.loads(files.to_json(cfg))
    del stored["vision"]["rgb_conversion"]
    workdir = Workdir(cfg.workdir)
    workdir.path.mkdir()
    workdir.config.write_text(json.dumps(stored))
    assert experiment(config, *options).vision.rgb_conversion == "composite"


@pytest.mark.parametrize("mode", ["RGBA", "LA", "I;16"])
def test_the_rgb_conversion_can_be_set_beside_a_checkpoint(folder_of, config, tmp_path, mode):
    folder, path = folder_of("llava"), image_file(tmp_path, mode)
    cfg = experiment(config, "--checkpoint", folder, "--vision.rgb_conversion", "composite")
    assert cfg.vision.rgb_conversion == "composite"
    converting = experiment(config, "--checkpoint", folder)
    assert np.abs(trained_pixels(cfg, path) - trained_pixels(converting, path)).max() > 0.1


def test_the_prompt_form_of_a_checkpoint_is_that_of_the_run(folder_of, config):
    assert experiment(config, "--checkpoint", folder_of("llava")).data.template == "checkpoint"
    assert experiment(config, "--checkpoint", folder_of("paligemma")).data.template == "checkpoint"
    assert experiment(config, "--checkpoint", folder_of("gemma")).data.template == "plain"
    vicuna = experiment(config, "--checkpoint", folder_of("llava"), "--data.template", "vicuna")
    assert vicuna.data.template == "vicuna"


def test_three_fields_of_one_folder_take_what_belongs_to_each_part(folder_of, config):
    folder = folder_of("llava")
    fields = [
        x for part in ("vision", "projector", "decoder") for x in (f"--{part}.checkpoint", folder)
    ]
    cfg, whole = experiment(config, *fields), experiment(config, "--checkpoint", folder)
    assert cfg.vision == whole.vision
    assert cfg.vision.feature_layers == (-2,)
    assert (cfg.projector, cfg.decoder) == (whole.projector, whole.decoder)


def test_an_encoder_alone_is_not_a_whole_model(folder_of, config, tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    CLIPVisionModel(CLIPVisionConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is an encoder without a decoder: use --vision.checkpoint"):
        experiment(config, "--checkpoint", tmp_path)


# ---- settings beside a checkpoint


def test_another_image_size_interpolates_the_positions(folder_of, config):
    folder = folder_of("llava")
    cfg = experiment(config, "--checkpoint", folder, "--vision.image_size_px", 42)
    assert (cfg.vision.image_size_px, cfg.image_tokens) == (42, 36)
    _, params = load_checkpoint(folder, np.float32)
    table = params["vision"]["patch_embed"]["positions"]
    actual = loaded(cfg)["vision/patch_embed/positions"]
    np.testing.assert_allclose(actual, resample_positions(table, (4, 4), (6, 6)), atol=1e-6)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("decoder.max_positions", 128),
        ("vision.remat", "full"),
        ("decoder.rope.theta", 500.0),
        ("vision.norm_eps", 1e-3),
    ],
)
def test_a_setting_that_the_weights_fit_is_used(folder_of, config, option, value):
    cfg = experiment(config, "--checkpoint", folder_of("llava"), f"--{option}", value)
    section, *names = option.split(".")
    actual = functools.reduce(getattr, names, getattr(cfg, section))
    assert actual == value


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("vision.depth", 9, "vision.depth 9 does not fit the weights of vision.checkpoint"),
        ("decoder.vocab_size", 1000, "decoder.vocab_size 1000 does not fit the weights"),
        ("decoder.gated_mlp", False, "decoder.gated_mlp False does not fit"),
        ("decoder.heads", 3, "not a multiple of"),
        ("vision.feature_layers", -1, None),
    ],
)
def test_a_setting_that_the_weights_do_not_fit_is_refused_by_name(
    folder_of, config, option, value, reason
):
    arguments = (config, "--checkpoint", folder_of("llava"), f"--{option}", value)
    if reason is None:
        assert experiment(*arguments).vision.feature_layers == (value,)
        return
    with pytest.raises(UserError, match=reason):
        experiment(*arguments)


def test_eval_of_a_checkpoint_never_takes_the_run_in_its_work_folder(
    folder_of, tmp_path, monkeypatch, capsys
):
    """`train --checkpoint` and `eval --checkpoint` have the same default work folder, runs/NAME."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_text("[]")
    command = ["eval", "--checkpoint", folder_of("llava"), "--data.files", "a.json"]
    workdir = Workdir(f"runs/{Path(folder_of('llava')).name}")
    workdir.path.mkdir(parents=True)
    workdir.config.write_text(files.to_json(tiny()))
    assert main(command) == 2
    assert (
        f"workdir {workdir.path} holds a run: choose another --workdir" in capsys.readouterr().err
    )


def test_settings_that_a_config_names_beside_its_own_checkpoint_count_too(folder_of, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from vlm_jax.config import Decoder, Experiment, Fusion\n\n\ndef get_config():\n"
        f"    decoder = Decoder(checkpoint={folder_of('llama')!r}, depth=9)\n"
        "    return Experiment(fusion=Fusion('text_only'), decoder=decoder)\n"
    )
    with pytest.raises(
        UserError, match="decoder.depth 9 does not fit the weights of decoder.checkpoint"
    ):
        parse_experiment("plan", ["--config", str(path)], stored=False)


# ---- runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with one checkpoint of random parameters."""
    cfg = replace(tiny(), workdir=str(tmp_path_factory.mktemp("runs") / "first"))
    workdir, params = Workdir(cfg.workdir), random_params(cfg)
    workdir.open(cfg)
    workdir.tokenizer.write_text("{}")
    state = jax.jit(lambda: init_state(cfg, jax.random.key(0)))()
    checkpoints = Checkpoints(workdir.checkpoints, cfg.train)
    checkpoints.save(1, State(state.step, params, state.optimizer), {}, 1.0)
    checkpoints.close()
    return cfg, traverse_util.flatten_dict(params, sep="/")


def test_a_run_begins_with_all_of_another(run, config):
    source, params = run
    cfg = experiment(config, "--init_from", source.workdir)
    assert [without_folder(getattr(cfg, name)) for name in MODEL] == [
        getattr(source, name) for name in MODEL
    ]
    actual = loaded(cfg)
    assert actual.keys() == params.keys()
    for path, x in params.items():
        np.testing.assert_array_equal(actual[path], x, err_msg=path)


@pytest.mark.parametrize("options", [("--init_parts", "vision"), ("--vision.checkpoint",)])
def test_a_run_begins_with_a_part_of_another(run, config, options):
    source, params = run
    named = (
        ("--init_from", source.workdir, *options)
        if len(options) == 2
        else (*options, source.workdir)
    )
    actual = loaded(experiment(config, *named, "--decoder.depth", 3))
    assert {path.split("/")[0] for path in actual} == {"vision"}
    for path, x in actual.items():
        np.testing.assert_array_equal(x, params[path])


@pytest.mark.parametrize("kind", ["cross_attention", "encoder_decoder"])
def test_the_decoder_of_a_run_keeps_its_layers_under_another_fusion(run, config, kind):
    """The stacks are others, and cross-attention begins anew."""
    source, params = run
    options = ("--decoder.checkpoint", source.workdir, "--fusion.kind", kind)
    cfg = replace(
        experiment(config, *options),
        fusion=Fusion(kind, cross_every=2 if kind == "cross_attention" else 1),
    )
    actual = loaded(cfg)
    assert not any("/cross" in path for path in actual)
    layer = "decoder/blocks/layers/block_{}/mlp/up/kernel"
    if kind == "encoder_decoder":
        np.testing.assert_array_equal(actual[layer.format(0)], params[layer.format(0)])
        return
    for number in (0, 1):
        np.testing.assert_array_equal(
            actual[layer.format(number)][0], params[layer.format(0)][number]
        )


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("every", [1, 2])
def test_a_frozen_decoder_answers_text_bit_for_bit_as_before(gated, every):
    """Taken out of cross-attention again, every number is the one that was put in."""
    alone = tiny("text_only")
    crossing = tiny(
        "cross_attention", fusion=Fusion("cross_attention", cross_every=every, gated=gated)
    )
    before = traverse_util.flatten_dict(random_params(alone), sep="/")
    inside = traverse_util.flatten_dict(random_params(crossing), sep="/")
    inside |= initial.restack(before, alone, crossing)
    after = initial.restack(inside, crossing, alone)
    for path, x in before.items():
        np.testing.assert_array_equal(after[path], x)


def test_a_folder_without_a_checkpoint_is_named(tmp_path, config):
    Workdir(str(tmp_path / "run")).open(replace(tiny(), workdir=str(tmp_path / "run")))
    with pytest.raises(UserError, match="has no checkpoint yet"):
        loaded(experiment(config, "--vision.checkpoint", tmp_path / "run"))


def test_a_run_is_continued_without_the_folder_that_it_began_with(folder_of, config, tmp_path):
    """Its work folder holds the settings, and the files beside the weights."""
    folder, workdir = tmp_path / "checkpoint", tmp_path / "run"
    shutil.copytree(folder_of("llava"), folder)
    cfg = experiment(config, "--checkpoint", folder, "--workdir", workdir)
    workdir_of_run = Workdir(cfg.workdir)
    workdir_of_run.open(cfg)
    initial.load_tokenizer(cfg).save(workdir_of_run.tokenizer)
    initial.keep_processor(cfg, workdir_of_run)
    shutil.rmtree(folder)
    again = parse_experiment("train", ["--workdir", str(workdir)], stored=False)
    assert again == cfg
    turns = ["<image>\nwhat is it?", "a car"]
    assert initial.load_tokenizer(again).dialogue.encode(turns)
