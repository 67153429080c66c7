"""Any encoder with any decoder, from their own folders, under any fusion style."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
from flax import traverse_util
from flax.linen import meta
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.hub import tiny_tokenizers
from tests.hub.parity import SMALL, forward, reference, saved
from vlm_jax import axes
from vlm_jax.cli.experiment import parse_experiment
from vlm_jax.config import Fusion, Mesh, Projector, UserError
from vlm_jax.config.validate import validate
from vlm_jax.data.tiling import tag_names
from vlm_jax.hub import pretrained_parts
from vlm_jax.hub.inputs import to_batch
from vlm_jax.hub.text.tokenizer import HubTokenizer
from vlm_jax.infer import run
from vlm_jax.nn.models import abstract_params, build_model
from vlm_jax.testing import random_batch, tiny
from vlm_jax.train import loop

TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
TOWER |= {"image_size": 32, "patch_size": 8}
MEAN = [0.4, 0.5, 0.6]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two encoders and two decoders, each as it is downloaded."""
    made = {}

    def folder(name):
        made[name] = tmp_path_factory.mktemp(name)
        return made[name]

    saved(CLIPVisionModel(CLIPVisionConfig(**TOWER)), folder("clip"))
    CLIPImageProcessor(image_mean=MEAN, size={"shortest_edge": 32}, crop_size=32).save_pretrained(
        made["clip"]
    )
    saved(SiglipVisionModel(SiglipVisionConfig(**TOWER)), folder("siglip"))
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(made["siglip"])
    tiny_tokenizers.gpt2(folder("gpt2"))
    gpt2 = GPT2Config(
        vocab_size=800, n_positions=256, n_embd=32, n_layer=2, n_head=4, eos_token_id=0
    )
    made["gpt2 model"] = saved(GPT2LMHeadModel(gpt2), made["gpt2"])
    tiny_tokenizers.llama3(folder("llama"))
    llama = LlamaConfig(
        **SMALL | {"vocab_size": 800, "max_position_embeddings": 256}, eos_token_id=1
    )
    made["llama model"] = saved(LlamaForCausalLM(llama), made["llama"])
    return made


def composed(folders, encoder, decoder, fusion):
    cfg = tiny(
        fusion, fusion=Fusion(fusion, gated=fusion == "cross_attention"), projector=Projector("mlp")
    )
    vision = replace(
        cfg.vision,
        checkpoint=str(folders[encoder]),
        feature_layers=(-2,) if encoder == "clip" else (),
    )
    cfg = replace(
        cfg, vision=vision, decoder=replace(cfg.decoder, checkpoint=str(folders[decoder]))
    )
    return validate(pretrained_parts.resolve_checkpoints(cfg))


def loaded(cfg):
    """Parameters of a new run, and what composition makes of them."""
    new = jax.tree.map(
        lambda x: np.full(x.shape, 0.5, np.float32), meta.unbox(abstract_params(cfg))
    )
    gates = {
        path: 0 * x if path[-1].endswith("gate") else x
        for path, x in traverse_util.flatten_dict(new).items()
    }
    new = traverse_util.flatten_dict(traverse_util.unflatten_dict(gates), sep="/")
    return traverse_util.unflatten_dict(
        new
        | pretrained_parts.load_pretrained_parts(
            cfg, meta.unbox(abstract_params(cfg)), axes.make_mesh(Mesh())
        ),
        sep="/",
    )


PAIRS = [("clip", "gpt2", "unified"), ("siglip", "llama", "cross_attention")]
PAIRS += [("clip", "llama", "encoder_decoder"), ("siglip", "gpt2", "encoder_decoder")]
every_pair = pytest.mark.parametrize(("encoder", "decoder", "fusion"), PAIRS)


@every_pair
def test_settings_come_from_the_checkpoints_and_every_part_of_theirs_is_loaded(
    folders, encoder, decoder, fusion
):
    cfg = composed(folders, encoder, decoder, fusion)
    assert (cfg.vision.width, cfg.vision.depth, cfg.vision.image_size_px) == (32, 3, 32)
    assert cfg.decoder.vocab_size == 800
    assert cfg.fusion.kind == fusion
    for path, x in traverse_util.flatten_dict(loaded(cfg)).items():
        begins_anew = path[0] == "projector" or any(name.startswith("cross") for name in path)
        assert (np.asarray(x) == 0.5).all() == (begins_anew and not path[-1].endswith("gate")), path


@pytest.mark.parametrize("encoder", ["clip", "siglip"])
def test_the_encoder_is_that_of_transformers(folders, encoder):
    cfg = composed(folders, encoder, "llama", "cross_attention")
    pixels = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
    model = (CLIPVisionModel if encoder == "clip" else SiglipVisionModel).from_pretrained(
        folders[encoder]
    )
    with torch.no_grad():
        states = model(torch.tensor(pixels), output_hidden_states=True)
    expected = states.hidden_states[-2][:, 1:] if encoder == "clip" else states.last_hidden_state
    found = forward(build_model(cfg.vision), loaded(cfg)["vision"], np.moveaxis(pixels, 1, -1))
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


@pytest.mark.parametrize("decoder", ["gpt2", "llama"])
def test_grafted_cross_attention_leaves_the_text_decoder_as_it_was(folders, decoder):
    """While the gates are closed, images change no bit; and those logits are transformers'."""
    cfg = composed(folders, "clip", decoder, "cross_attention")
    ids = np.random.default_rng(0).integers(0, 800, (2, 12))
    params, text = loaded(cfg), to_batch(cfg, {"input_ids": ids}, None)
    pixels = np.random.default_rng(0).normal(size=(2, 1, 32, 32, 3)).astype(np.float32)
    seen = text.replace(images=pixels, image_mask=np.ones((*ids.shape, 1), bool))
    other = seen.replace(images=-pixels)
    alone, grafted, grafted_on_other = (
        forward(build_model(cfg), params, batch).logits for batch in (text, seen, other)
    )
    np.testing.assert_array_equal(grafted, grafted_on_other)
    # Another program computes them.
    np.testing.assert_allclose(grafted, alone, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        alone, reference(folders[f"{decoder} model"], input_ids=ids), atol=1e-4
    )
    opened = jax.tree_util.tree_map_with_path(
        lambda path, x: x + 1 if path[-1].key.endswith("gate") else x, params
    )
    assert np.abs(forward(build_model(cfg), opened, seen).logits - alone).max() > 1e-3


def test_pixels_and_special_tokens_are_the_checkpoints(folders):
    cfg = composed(folders, "clip", "gpt2", "unified")
    assert cfg.vision.image_mean == tuple(MEAN)
    assert cfg.data.eos_id == 0
    llama = composed(folders, "clip", "llama", "unified")
    _, image, _, eos = llama.data.special_ids
    assert image != eos  # it has special tokens to spare
    assert llama.data.bos_id == HubTokenizer.load(folders["llama"]).bos_id
    assert random_batch(llama).image_token_index.max() == 15


def test_tags_of_tiles_are_spelled_by_the_tokenizer_of_the_decoder(folders):
    cfg = tiny("hybrid", projector=Projector("mlp"))
    vision = replace(cfg.vision, checkpoint=str(folders["siglip"]), tiles=2)
    decoder = replace(cfg.decoder, checkpoint=str(folders["llama"]))
    cfg = validate(
        pretrained_parts.resolve_checkpoints(replace(cfg, vision=vision, decoder=decoder))
    )
    tokenizer = HubTokenizer.load(folders["llama"])
    assert [tokenizer.decode(ids) for ids in cfg.data.tag_ids] == tag_names(cfg.vision)
    assert cfg.image_slots_in_row == 16 + sum(map(len, cfg.data.tag_ids)) > 16 + 3
    tags = np.concatenate(cfg.data.tag_ids)
    row = random_batch(cfg)
    assert row.tokens[1, 0] == tokenizer.bos_id
    np.testing.assert_array_equal(row.tokens[1, 1 : 1 + len(tags)], tags)


@pytest.mark.parametrize("part", ["vision", "projector", "decoder"])
def test_a_folder_without_the_part_is_refused(folders, part):
    cfg, wrong = tiny(), folders["clip" if part == "decoder" else "llama"]
    cfg = replace(cfg, **{part: replace(getattr(cfg, part), checkpoint=str(wrong))})
    with pytest.raises(UserError, match=f"{part}.checkpoint .* has no {part} part"):
        pretrained_parts.resolve_checkpoints(cfg)


def test_a_run_begins_with_the_checkpoints_and_keeps_what_is_frozen(
    folders, tmp_path, datasets_dir
):
    """From the command line to the last checkpoint; its tokenizer is the decoder's."""
    config = tmp_path / "composed.py"
    config.write_text("from vlm_jax.testing import tiny\n\ndef get_config():\n    return tiny()\n")
    arguments = [
        "--config",
        config,
        "--workdir",
        tmp_path / "run",
        "--data.dir",
        datasets_dir,
        "--train.steps",
        1,
    ]
    arguments += [
        "--vision.checkpoint",
        folders["siglip"],
        "--decoder.checkpoint",
        folders["llama"],
    ]
    arguments += [
        "--fusion.kind",
        "cross_attention",
        "--optim.lr_mult.decoder",
        0,
        "--optim.lr_mult.vision",
        0,
    ]
    cfg = parse_experiment(
        "train", [*map(str, arguments), "--data.text_length", "120"], stored=False
    )
    loop.train(cfg)
    params, tokenizer = run.load_with_step(cfg)[:2]
    assert tokenizer.encode("what is it?") == HubTokenizer.load(folders["llama"]).encode(
        "what is it?", False
    )
    began = pretrained_parts.load_pretrained_parts(
        cfg, meta.unbox(abstract_params(cfg)), axes.make_mesh(Mesh())
    )
    flat = traverse_util.flatten_dict(params, sep="/")
    assert {path.split("/")[0] for path in began} == {"vision", "decoder"}
    for path, x in began.items():
        np.testing.assert_array_equal(x, flat[path], err_msg=path)
