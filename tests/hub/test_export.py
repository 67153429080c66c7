"""transformers loads our exports: public checkpoints byte for byte, runs with our logits."""

import errno
import json
from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
from flax import traverse_util
from flax.linen import meta
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    MllamaForConditionalGeneration,
    VisionEncoderDecoderModel,
)

from tests.hub import tiny_tokenizers
from tests.hub.parity import SMALL, bare_model, forward, randomized, reference
from vlm_jax import axes, from_pretrained, save_pretrained
from vlm_jax.cli.main import main
from vlm_jax.config import (
    Decoder,
    Experiment,
    Fusion,
    LrMult,
    Mesh,
    PatchRope,
    Projector,
    Rope,
    UserError,
    Vision,
)
from vlm_jax.config.validate import validate
from vlm_jax.data import pipeline, questions
from vlm_jax.hub import export, pretrained_parts
from vlm_jax.hub.tensors.folder import open_tensors
from vlm_jax.infer import run
from vlm_jax.nn.models import abstract_params
from vlm_jax.testing import random_params, tiny
from vlm_jax.train import loop
from vlm_jax.train.step import init_state

IDS = np.random.default_rng(0).integers(0, 64, (2, 9))


# ---- checkpoints


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def checkpoint(request, tmp_path_factory):
    """A Llama in shards as transformers 5 saves it, with its tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_tokenizers.llama3(folder)
    config = LlamaConfig(
        **SMALL, rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
    )
    model = randomized(LlamaForCausalLM(config)).to(request.param)
    model.save_pretrained(folder, max_shard_size="30KB")
    return folder, model


def test_an_exported_checkpoint_has_the_bytes_and_the_files_of_the_first(
    checkpoint, tmp_path, capsys
):
    folder, _ = checkpoint
    assert main(["export", "--checkpoint", str(folder), "--output", str(tmp_path / "out")]) == 0
    with open_tensors(folder) as before, open_tensors(tmp_path / "out") as after:
        assert set(before) == set(after)
        for name, tensor in before.items():
            assert after[name].dtype == tensor.dtype
            assert after[name].read().tobytes() == tensor.read().tobytes(), name
    _, report = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    loaded = [
        LlamaForCausalLM.from_pretrained(where, dtype=torch.float32)
        for where in (folder, tmp_path / "out")
    ]
    before, after = loaded
    expected = reference(before.eval(), input_ids=IDS)
    np.testing.assert_array_equal(reference(after.eval(), input_ids=IDS), expected)
    tokenizers = [AutoTokenizer.from_pretrained(where) for where in (folder, tmp_path / "out")]
    assert tokenizers[0]("hello world").input_ids == tokenizers[1]("hello world").input_ids


def test_the_config_is_spelled_as_transformers_4_reads_it(checkpoint, tmp_path):
    export.export_checkpoint(checkpoint[0], tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == 500.0
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert config["torch_dtype"] == str(checkpoint[1].dtype).removeprefix("torch.")
    assert not {"rope_parameters", "dtype"} & set(config)


def test_save_pretrained_writes_changed_parameters(checkpoint, tmp_path):
    model, params, processor = from_pretrained(checkpoint[0], dtype="float32")
    params["decoder"]["embedding"]["table"] = params["decoder"]["embedding"]["table"] + 1
    save_pretrained(tmp_path / "out", params, processor)
    again = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    before = checkpoint[1].model.embed_tokens.weight.float()
    torch.testing.assert_close(again.model.embed_tokens.weight, before + 1)


def test_an_output_that_holds_a_model_is_refused_and_left_as_it_is(checkpoint, tmp_path):
    export.export_checkpoint(checkpoint[0], tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError, match="--output .* holds a config.json already"):
        export.export_checkpoint(checkpoint[0], tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left on device")]
)
@pytest.mark.parametrize("is_there", [True, False])
def test_an_export_is_there_as_a_whole_or_not_at_all(
    checkpoint, tmp_path, monkeypatch, capsys, error, is_there
):
    """Interrupted while the last files are copied, when weights and config are written."""
    output = tmp_path / "out"
    if is_there:
        (output / ".partial").mkdir(parents=True)  # of an export that was killed
        (output / ".partial" / "old").touch()

    def copy(*_):
        assert not {"config.json", "model.safetensors"} & {path.name for path in output.iterdir()}
        raise error

    monkeypatch.setattr(export.shutil, "copy", copy)
    assert main(["export", "--checkpoint", str(checkpoint[0]), "--output", str(output)]) in (2, 130)
    assert capsys.readouterr().err in (
        "stopped\n",
        f"error: {output} cannot be written: No space left on device.\n",
    )
    assert output.exists() == is_there and not (is_there and any(output.iterdir()))
    monkeypatch.undo()
    export.export_checkpoint(checkpoint[0], output)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in output.iterdir()
    }
    assert not (output / ".partial").exists()


def test_an_output_that_cannot_be_written_is_known_before_the_weights_are_read(
    checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr(export, "load_checkpoint", None)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/out cannot be written: Not a directory"):
        export.export_checkpoint(checkpoint[0], tmp_path / "file" / "out")


# ---- runs


def llava_like() -> Experiment:
    """A CLIP and a Llama, unified."""
    clip = tiny().vision
    clip = replace(
        clip,
        activation="quick_gelu",
        patch_bias=False,
        class_token=True,
        pre_norm=True,
        norm_eps=1e-5,
    )
    clip = replace(clip, final_norm="pooled", feature_layers=(-2,))
    return tiny(vision=clip, projector=Projector("mlp"), decoder=llama())


def llama() -> Decoder:
    decoder = replace(
        tiny().decoder, norm="rmsnorm", activation="silu", gated_mlp=True, tie_word_embeddings=False
    )
    return replace(decoder, qkv_bias=False, out_bias=False, mlp_bias=False)


def qwen2_5_vl_like() -> Experiment:
    """Images of any shape, in at most 8 tokens of 2 x 2 patches."""
    vision = replace(
        tiny().vision,
        norm="rmsnorm",
        activation="silu",
        gated_mlp=True,
        max_patches=32,
        patch_square=2,
        patch_frames=2,
        patch_bias=False,
        positions="none",
        rope=PatchRope("same"),
    )
    decoder = replace(llama(), qkv_bias=True, rope=Rope(sections=(2, 1, 1)))
    projector = Projector("pixel_shuffle", projection="mlp", mlp_width=4 * vision.width)
    return tiny(vision=vision, projector=projector, decoder=decoder)


def mllama_like() -> Experiment:
    vision = replace(
        tiny().vision,
        activation="gelu",
        qkv_bias=False,
        out_bias=False,
        patch_bias=False,
        norm_eps=1e-5,
    )
    vision = replace(
        vision, class_token=True, keep_class_token=True, pre_norm=True, feature_layers=(1, 2)
    )
    vision = replace(vision, tiles=2, tile_layouts=((1, 1), (1, 2), (2, 1)), num_global_layers=1)
    fusion = Fusion(
        "cross_attention", cross_layers=(1,), gated=True, tokens_without_image="attend_all"
    )
    decoder = replace(llama(), extra_tokens=8)
    return tiny(
        "cross_attention",
        vision=vision,
        fusion=fusion,
        decoder=decoder,
        projector=Projector("linear"),
    )


def encoder_decoder_like() -> Experiment:
    vision = replace(
        tiny().vision, activation="gelu", class_token=True, keep_class_token=True, norm_eps=1e-12
    )
    decoder = replace(tiny().decoder, positions="learned", kv_heads=None, norm_eps=1e-5)
    fusion = Fusion("encoder_decoder", qk_norm=False)
    return tiny(fusion=fusion, vision=vision, decoder=decoder, projector=Projector("none"))


RUNS = {
    "llava": (llava_like, LlavaForConditionalGeneration),
    "mllama": (mllama_like, MllamaForConditionalGeneration),
    "vision-encoder-decoder": (encoder_decoder_like, VisionEncoderDecoderModel),
}


def experiment(kind, tmp_path, datasets_dir) -> Experiment:
    cfg = RUNS[kind][0]()
    data = replace(cfg.data, dir=datasets_dir, text_length=40)
    return replace(
        cfg,
        data=data,
        workdir=str(tmp_path / "run"),
        decoder=replace(cfg.decoder, max_positions=128),
    )


def theirs(kind, model, batch) -> np.ndarray:
    """The logits of transformers for a row of ours without padding."""
    images = torch.tensor(np.moveaxis(np.asarray(batch.images), -1, -3))
    ids = torch.tensor(np.asarray(batch.tokens)).long()
    if kind == "llava":
        inputs = {"input_ids": ids, "pixel_values": images[:, 0]}
    elif kind == "vision-encoder-decoder":
        inputs = {"decoder_input_ids": ids, "pixel_values": images[:, 0]}
    else:
        read = torch.tensor(np.asarray(batch.image_mask)).reshape(*ids.shape, *images.shape[1:3])
        inputs = {"input_ids": ids, "pixel_values": images, "cross_attention_mask": read.long()}
        inputs |= {"aspect_ratio_ids": torch.tensor(batch.tile_layouts).long()}
        inputs |= {"aspect_ratio_mask": torch.tensor(batch.tile_mask).long()}
    with torch.no_grad():
        return model(**inputs).logits.numpy()


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_of_ours_has_our_logits_in_transformers(kind, tmp_path, datasets_dir):
    cfg = experiment(kind, tmp_path, datasets_dir)
    params, tokenizer = random_params(cfg), pipeline.train_tokenizer(cfg)
    tokenizer.save(tmp_path / "tokenizer.json")
    assert export.export_run(cfg, params, tmp_path / "tokenizer.json", tmp_path / "out") == kind
    assert_transformers_agrees(kind, cfg, params, tokenizer, tmp_path / "out")


def test_frozen_parts_of_a_run_are_written_in_the_bfloat16_that_they_are_kept_in(
    tmp_path, datasets_dir
):
    """And what was trained in its float32; transformers, told float32, widens the first exactly."""
    cfg = experiment("llava", tmp_path, datasets_dir)
    cfg = replace(cfg, train=replace(cfg.train, compute_dtype="bfloat16"))
    cfg = replace(cfg, optim=replace(cfg.optim, lr_mult=LrMult(vision=0, decoder=0)))
    params, tokenizer = init_state(cfg, jax.random.key(0)).params, pipeline.train_tokenizer(cfg)
    tokenizer.save(tmp_path / "tokenizer.json")
    export.export_run(cfg, params, tmp_path / "tokenizer.json", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"
    with open_tensors(tmp_path / "out") as tensors:
        trained = {name for name, tensor in tensors.items() if tensor.dtype == np.float32}
        assert {"multi_modal_projector" in name for name in trained} == {True}
        assert (
            len(trained) == sum("multi_modal_projector" in name for name in tensors) < len(tensors)
        )
    widened = jax.tree.map(lambda x: x.astype(np.float32), params)
    assert_transformers_agrees("llava", cfg, widened, tokenizer, tmp_path / "out")


def next_stage(cfg, folder):
    """The experiment anew, all its parts from a folder."""
    cfg = replace(cfg, projector=Projector(), workdir="")
    parts = {
        part: replace(getattr(cfg, part), checkpoint=str(folder))
        for part in ("vision", "projector", "decoder")
    }
    return validate(pretrained_parts.resolve_checkpoints(replace(cfg, **parts)))


def test_a_run_begins_with_all_that_another_ended_with(tmp_path, datasets_dir):
    """As LLaVA's second stage with its first."""
    cfg = experiment("llava", tmp_path, datasets_dir)
    params = random_params(cfg)
    pipeline.train_tokenizer(cfg).save(tmp_path / "tokenizer.json")
    export.export_run(cfg, params, tmp_path / "tokenizer.json", tmp_path / "out")
    then = next_stage(cfg, tmp_path / "out")
    assert replace(then.projector, checkpoint="") == cfg.projector
    begun = pretrained_parts.load_pretrained_parts(
        then, meta.unbox(abstract_params(then)), axes.make_mesh(Mesh())
    )
    assert begun.keys() == traverse_util.flatten_dict(params, sep="/").keys()
    for path, x in traverse_util.flatten_dict(params, sep="/").items():
        np.testing.assert_array_equal(begun[path], x, err_msg=path)


def test_a_projector_between_other_widths_is_refused(tmp_path, datasets_dir):
    cfg = experiment("llava", tmp_path, datasets_dir)
    pipeline.train_tokenizer(cfg).save(tmp_path / "tokenizer.json")
    export.export_run(cfg, random_params(cfg), tmp_path / "tokenizer.json", tmp_path / "out")
    wider = replace(
        cfg,
        vision=replace(cfg.vision, width=64),
        projector=Projector(checkpoint=str(tmp_path / "out")),
    )
    with pytest.raises(
        UserError, match="projects from width 32 to 32, but vision .* have widths 64 and 32"
    ):
        pretrained_parts.resolve_checkpoints(wider)


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_a_trained_run_has_our_logits_in_transformers(kind, tmp_path, datasets_dir, capsys):
    cfg = experiment(kind, tmp_path, datasets_dir)
    loop.train(replace(cfg, train=replace(cfg.train, steps=20)))
    assert main(["export", "--checkpoint", cfg.workdir, "--output", str(tmp_path / "out")]) == 0
    assert kind in capsys.readouterr().out
    assert_transformers_agrees(kind, cfg, *run.load_with_step(cfg)[:2], tmp_path / "out")


def assert_transformers_agrees(kind, cfg, params, tokenizer, folder):
    model, report = RUNS[kind][1].from_pretrained(folder, output_loading_info=True)
    unused = {
        name for name in report["missing_keys"] if ".pooler." in name
    }  # of transformers' ViT; nobody reads it
    assert (
        not (report["missing_keys"] - unused)
        | report["unexpected_keys"]
        | report["mismatched_keys"]
    )
    asked = questions.load(cfg, "test", 2)
    pixels = [
        pipeline.image_files.normalize(question.images()[0], cfg.vision) for question in asked
    ]
    batch = questions.prompt_batch(cfg, tokenizer, [[x] for x in pixels], ["is it red ?"] * 2)
    ours = np.asarray(forward(bare_model(cfg), params, batch).logits)
    np.testing.assert_allclose(theirs(kind, model.eval(), batch), ours, atol=1e-4)
    reread = AutoTokenizer.from_pretrained(folder)
    assert reread("is it red ?", add_special_tokens=False).input_ids == tokenizer.encode(
        "is it red ?"
    )
    processed = AutoImageProcessor.from_pretrained(folder)(
        asked[0].images()[0], return_tensors="np"
    )
    np.testing.assert_allclose(np.moveaxis(processed.pixel_values[0], 0, -1), pixels[0], atol=1e-5)


def test_a_run_like_no_public_family_is_refused_and_the_nearest_named():
    with pytest.raises(
        UserError, match="matches no supported architecture; the closest is .* projector.kind"
    ):
        export.matching_family(tiny(projector=Projector("resampler")))


def test_what_makes_no_difference_does_not_keep_a_run_from_its_family():
    cfg = llava_like()
    decoder = replace(cfg.decoder, head_dim=8, unroll=2)
    other = replace(
        cfg, decoder=decoder, vision=replace(cfg.vision, patch_embed="conv", kv_heads=4)
    )
    assert (
        export.matching_family(other).model_type
        == export.matching_family(cfg).model_type
        == "llava"
    )


def test_a_hybrid_and_a_model_of_tiles_are_like_no_public_one():
    with pytest.raises(UserError, match="fusion.kind hybrid cannot be exported"):
        export.matching_family(tiny("hybrid"))
    cfg = tiny("unified")
    with pytest.raises(UserError, match="vision.tiles 2"):
        export.matching_family(replace(cfg, vision=replace(cfg.vision, tiles=2)))


def test_the_run_of_a_plain_decoder_needs_no_images():
    cfg = tiny(fusion=Fusion("text_only"), decoder=llama(), vision=Vision())
    assert export.matching_family(cfg).model_type == "llama"
