"""CLIP and SigLIP with both towers, and OpenCLIP's format: outputs equal to transformers'."""

import functools
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from flax import traverse_util
from flax.linen import meta
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
)

from tests.hub.parity import (
    assert_round_trip,
    forward,
    randomized,
    reloaded,
    saved,
    siglip2_inputs,
)
from vlm_jax import axes
from vlm_jax.config import Fusion, Mesh, Projector, UserError
from vlm_jax.config.validate import validate
from vlm_jax.hub import pretrained_parts
from vlm_jax.hub.families.encoders.clip import CLIP
from vlm_jax.hub.families.encoders.open_clip import OPEN_CLIP
from vlm_jax.hub.families.encoders.siglip import SIGLIP
from vlm_jax.hub.image_inputs import channels_last
from vlm_jax.hub.load import load_params
from vlm_jax.infer.verify import verify
from vlm_jax.nn.models import abstract_params, build_model
from vlm_jax.testing import tiny

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
IMAGE = {**SMALL, "image_size": 16, "patch_size": 4}
TEXT = {**SMALL, "hidden_size": 24, "vocab_size": 64, "max_position_embeddings": 12}
EOS = 40


def clip(eos_token_id, **settings):
    text, vision = {**TEXT, "eos_token_id": eos_token_id, **settings}, {**IMAGE, **settings}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=20))


def siglip():
    return SiglipModel(
        SiglipConfig(text_config={**TEXT, "projection_size": 32}, vision_config=IMAGE)
    )


def siglip2():
    vision = {**SMALL, "patch_size": 4, "num_patches": 16}
    return Siglip2Model(
        Siglip2Config(text_config={**TEXT, "projection_size": 32}, vision_config=vision)
    )


MODELS = {
    "clip that ends with its largest id": functools.partial(clip, 2),
    "clip that ends with eos": functools.partial(clip, EOS, hidden_act="gelu"),
    "siglip": siglip,
    "siglip2": siglip2,
}
OUTPUTS = ("image_embeds", "text_embeds", "logits_per_image")
every_model = pytest.mark.parametrize("kind", MODELS)


def inputs(side_px=16) -> dict[str, np.ndarray]:
    """Two images and three texts, padded right and left; two texts have their end token twice."""
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(1, EOS, (3, 9)), np.ones((3, 9), int)
    ids[0, 8] = ids[1, 5] = ids[1, 7] = ids[2, 6] = ids[2, 8] = EOS
    ids[2, 4] = 60  # the largest id, and no end
    mask[1, 6:] = mask[2, :2] = 0
    pixels = rng.normal(size=(2, 3, side_px, side_px + 4)).astype(np.float32)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def expected_of(model, arrays) -> dict[str, np.ndarray]:
    tensors = {name: torch.tensor(x) for name, x in arrays.items()}
    if isinstance(model, Siglip2Model):
        tensors |= siglip2_inputs(tensors["pixel_values"], 4)
    else:
        tensors["interpolate_pos_encoding"] = True
    with torch.no_grad():
        found = model(**tensors)
    return {name: getattr(found, name).numpy() for name in OUTPUTS}


def assert_outputs_are_equal(folder, hf, arrays) -> dict:
    """Compares vectors and logits; returns the intermediates of the same compiled program."""
    model, params = load_params(folder)
    images, mask = channels_last(arrays["pixel_values"]), arrays["attention_mask"].astype(bool)
    found, state = forward(
        model, params, images, arrays["input_ids"], mask, mutable="intermediates"
    )
    for name, expected in expected_of(hf, arrays).items():
        np.testing.assert_allclose(getattr(found, name), expected, atol=1e-4, err_msg=name)
    return state["intermediates"]


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory):
    """`pair_of(kind)`: a folder and the model of transformers in it."""

    @functools.cache
    def make(kind):
        folder = tmp_path_factory.mktemp("hub")
        return folder, saved(MODELS[kind](), folder)

    return make


@every_model
def test_vectors_and_logits_are_those_of_transformers_at_any_size(pair_of, kind):
    """The hidden states of the text tower are compared block by block as well."""
    (_, hf), arrays = pair_of(kind), inputs(side_px=24)
    text = assert_outputs_are_equal(*pair_of(kind), arrays)["text"]
    states = [text["embeddings"][0], *text["blocks"]["layers"]["block_0_out"][0]]
    with torch.no_grad():
        expected = hf.text_model(
            torch.tensor(arrays["input_ids"]),
            attention_mask=torch.tensor(arrays["attention_mask"]),
            output_hidden_states=True,
        ).hidden_states
    is_token = arrays["attention_mask"] == 1
    for i, state in enumerate(states):
        name = f"after block {i - 1}" if i else "embeddings"
        np.testing.assert_allclose(
            np.asarray(state)[is_token], expected[i].numpy()[is_token], atol=1e-4, err_msg=name
        )


@every_model
def test_an_export_is_what_was_loaded_and_transformers_loads_it(pair_of, tmp_path, kind):
    folder, hf = pair_of(kind)
    assert_round_trip(folder, tmp_path)
    again = reloaded(type(hf), tmp_path, hf)
    for name, expected in expected_of(hf, inputs()).items():
        np.testing.assert_allclose(expected_of(again, inputs())[name], expected, atol=1e-6)
    assert load_params(tmp_path)[0].cfg == load_params(folder)[0].cfg


def test_verify_compares_what_both_towers_give(pair_of, tmp_path):
    folder, hf = pair_of("siglip")
    arrays = inputs()
    expected = expected_of(hf, arrays) | {"logits": np.zeros(3, np.float32)}
    with torch.no_grad():
        expected["image_features"] = hf.vision_model(
            torch.tensor(arrays["pixel_values"][..., :16])
        ).pooler_output
    np.savez(
        tmp_path / "reference.npz",
        **{f"a/in/{name}": x for name, x in arrays.items()},
        **{f"a/out/{name}": x for name, x in expected.items() if name != "image_features"},
        **{
            "b/in/pixel_values": arrays["pixel_values"][..., :16],
            "b/out/image_features": expected["image_features"],
        },
    )
    results = {c.output: c for c in verify(folder, tmp_path / "reference.npz").comparisons}
    assert all(results[name].agrees for name in (*OUTPUTS, "image_features")), results
    assert "not supported" in results["logits"].reason


# ---- OpenCLIP

OPEN_NAMES = (  # of transformers -> of OpenCLIP
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"^visual_projection\.weight$", "visual.proj"),
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"^text_projection\.weight$", "text_projection"),
    (r"\.layer_norm(\d)\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
)


def open_clip_tensors(model: CLIPModel) -> dict[str, torch.Tensor]:
    tensors, fused = {}, {}
    for name, x in model.state_dict().items():
        for pattern, replacement in OPEN_NAMES:
            name = re.sub(pattern, replacement, name)
        found = re.fullmatch(r"(.*)\.self_attn\.([qkv])_proj\.(weight|bias)", name)
        if found:
            fused.setdefault(f"{found[1]}.attn.in_proj_{found[3]}", {})[found[2]] = x
        else:
            tensors[name] = x.T.contiguous() if name in ("visual.proj", "text_projection") else x
    for name, parts in fused.items():
        tensors[name] = torch.cat([parts["q"], parts["k"], parts["v"]])
    return tensors


def open_clip_config(quick_gelu: bool) -> dict:
    vision = {
        "image_size": 16,
        "patch_size": 4,
        "width": 32,
        "layers": 2,
        "head_width": 8,
        "mlp_ratio": 1.5,
    }
    text = {
        "context_length": 12,
        "vocab_size": 64,
        "width": 24,
        "heads": 4,
        "layers": 2,
        "mlp_ratio": 2,
    }
    model = {"embed_dim": 20, "vision_cfg": vision, "text_cfg": text}
    return {
        "model_cfg": model | ({"quick_gelu": True} if quick_gelu else {}),
        "preprocess_cfg": {"mean": [0.5] * 3},
    }


def open_clip_folder(folder, quick_gelu=False, prefix="", file_name="open_clip_model.safetensors"):
    """The folder, and a model of transformers with the same weights."""
    hf = randomized(clip(2, hidden_act="quick_gelu" if quick_gelu else "gelu"))
    of_text = re.compile("(?!visual|logit_scale)")
    tensors = {
        (prefix if of_text.match(name) else "") + name: x
        for name, x in open_clip_tensors(hf).items()
    }
    (save_file if file_name.endswith("safetensors") else torch.save)(tensors, folder / file_name)
    (folder / "open_clip_config.json").write_text(json.dumps(open_clip_config(quick_gelu)))
    return folder, hf


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"quick_gelu": True, "file_name": "open_clip_pytorch_model.bin"},
        {"prefix": "text."},  # the text tower is a submodule
    ],
    ids=lambda layout: " ".join(layout),
)
def test_open_clip_gives_the_vectors_of_transformers_clip(tmp_path, layout):
    assert_outputs_are_equal(
        *open_clip_folder(tmp_path, **layout), inputs() | {"attention_mask": np.ones((3, 9), int)}
    )


def test_open_clip_is_exported_in_its_own_format(tmp_path):
    folder, _ = open_clip_folder(tmp_path)
    target = tmp_path / "ours"
    assert_round_trip(folder, target, preprocess_cfg=open_clip_config(False)["preprocess_cfg"])
    assert {path.name for path in target.iterdir()} == {
        "open_clip_config.json",
        "open_clip_model.safetensors",
    }
    assert load_params(target)[0].cfg == load_params(folder)[0].cfg
    written = json.loads((target / "open_clip_config.json").read_text())
    original = open_clip_config(False)
    assert written["preprocess_cfg"] == original["preprocess_cfg"]
    assert written["model_cfg"]["vision_cfg"] == original["model_cfg"]["vision_cfg"]
    assert original["model_cfg"]["text_cfg"].items() <= written["model_cfg"]["text_cfg"].items()


def test_a_folder_with_both_formats_is_that_of_transformers(tmp_path):
    """As LAION's folders: config.json and its weights take precedence."""
    folder, hf = open_clip_folder(tmp_path)
    hf.config.save_pretrained(folder)
    torch.save(hf.state_dict(), folder / "pytorch_model.bin")
    assert_outputs_are_equal(folder, hf, inputs())


# ---- as the encoder of another model


def with_processor(folder, kind):
    saved(MODELS[kind](), folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor"})
    )
    return folder


@pytest.mark.parametrize("kind", [*MODELS, "open_clip"])
def test_the_image_tower_may_be_taken_alone(tmp_path, kind):
    folder = (
        open_clip_folder(tmp_path)[0] if kind == "open_clip" else with_processor(tmp_path, kind)
    )
    cfg = tiny("unified", fusion=Fusion("unified"), projector=Projector("mlp"))
    cfg = validate(
        pretrained_parts.resolve_checkpoints(
            replace(cfg, vision=replace(cfg.vision, checkpoint=str(folder)))
        )
    )
    params = traverse_util.unflatten_dict(
        pretrained_parts.load_pretrained_parts(
            cfg, meta.unbox(abstract_params(cfg)), axes.make_mesh(Mesh())
        ),
        sep="/",
    )["vision"]
    images = inputs()["pixel_values"].transpose(0, 2, 3, 1)
    whole, towers = load_params(folder)
    expected = forward(build_model(whole.cfg.vision), towers["vision"], images)
    np.testing.assert_allclose(
        forward(build_model(cfg.vision), params, images), expected, atol=1e-6
    )


# ---- configs


def test_the_settings_that_older_files_repeat_are_those_that_count():
    """transformers, CLIPConfig: `text_config_dict` replaces `text_config`."""
    again = {"hidden_size": 24, "num_attention_heads": 2, "eos_token_id": 2}
    cfg = CLIP.config_from_hf(
        {"text_config": {"hidden_size": 99, "eos_token_id": 7}, "text_config_dict": again}, ()
    )
    assert (cfg.text.width, cfg.text_pool) == (24, "largest_id")
    assert CLIP.config_from_hf(CLIP.config_to_hf(cfg), ()) == cfg


@pytest.mark.parametrize(
    ("family", "config", "words"),
    [
        (CLIP, {"text_config": {"eos_token_id": [1, 2]}}, ["eos_token_id [1, 2]", "one id"]),
        (SIGLIP, {"text_config": {"projection_size": 5}}, ["projection_size 5", "hidden_size 768"]),
        (SIGLIP, {"vision_config": {"vision_use_head": False}}, ["vision_use_head"]),
        (
            OPEN_CLIP,
            {"model_cfg": {"vision_cfg": {"layers": [3, 4, 6, 3]}}},
            ["layers [3, 4, 6, 3]", "ResNet"],
        ),
        (
            OPEN_CLIP,
            {"model_cfg": {"vision_cfg": {"timm_model_name": "vit"}}},
            ["timm_model_name 'vit'"],
        ),
        (
            OPEN_CLIP,
            {"model_cfg": {"text_cfg": {"hf_model_name": "bert"}}},
            ["hf_model_name 'bert'"],
        ),
        (
            OPEN_CLIP,
            {"model_cfg": {"text_cfg": {"pool_type": "first"}}},
            ["pool_type 'first'", "argmax, last"],
        ),
        (OPEN_CLIP, {"model_cfg": {"text_cfg": {"norm_kwargs": {"eps": 1e-6}}}}, ["norm_kwargs"]),
    ],
)
def test_settings_that_are_not_supported_are_refused(family, config, words):
    with pytest.raises(UserError) as error:
        family.config_from_hf(config, ())
    assert all(word in str(error.value) for word in words)


def test_open_clips_last_token_and_free_attention_are_written_again():
    cfg = OPEN_CLIP.config_from_hf(
        {"model_cfg": {"text_cfg": {"pool_type": "last", "no_causal_mask": True}}}, ()
    )
    assert (cfg.text_pool, cfg.causal) == ("last", False)
    cfg = replace(cfg, vision=replace(cfg.vision, mlp_width=3333), embed_width=7)
    assert OPEN_CLIP.config_from_hf(OPEN_CLIP.config_to_hf(cfg), ()) == cfg
