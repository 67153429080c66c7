"""ViT, CLIP, SigLIP 1 and 2, DINOv2 and DINOv3 as encoders: outputs equal to transformers'."""

import functools
import itertools

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from tests.hub.parity import (
    assert_round_trip,
    forward,
    randomized,
    reloaded,
    saved,
    siglip2_inputs,
)
from vlm_jax.config import UserError
from vlm_jax.hub.export import export_checkpoint
from vlm_jax.hub.families.encoders.vit import mlp_ratio
from vlm_jax.hub.families.registry import FAMILIES
from vlm_jax.hub.image_inputs import channels_last, encoder_inputs
from vlm_jax.hub.load import load_params
from vlm_jax.infer.verify import verify
from vlm_jax.nn.models import build_model


class HeadlessViT:
    """ViT without a pooler, as in encoders of other models and in many files."""

    def __new__(cls, config):
        return ViTModel(config, add_pooling_layer=False)

    from_pretrained = functools.partial(ViTModel.from_pretrained, add_pooling_layer=False)


SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
SMALL = SIZES | {"intermediate_size": 48}
MODELS = {
    "vit": (ViTModel, ViTConfig(**SMALL)),
    "vit without a pooler": (HeadlessViT, ViTConfig(**SMALL, qkv_bias=False, hidden_act="relu")),
    "vit with classes": (ViTForImageClassification, ViTConfig(**SMALL, num_labels=5)),
    "clip": (CLIPVisionModel, CLIPVisionConfig(**SMALL)),
    "clip of LAION": (CLIPVisionModel, CLIPVisionConfig(**SMALL, hidden_act="gelu")),
    "siglip": (SiglipVisionModel, SiglipVisionConfig(**SMALL)),
    "siglip without a head": (
        SiglipVisionModel,
        SiglipVisionConfig(**SMALL, vision_use_head=False),
    ),
    "siglip2": (
        Siglip2VisionModel,
        Siglip2VisionConfig(**SMALL | {"image_size": None}, num_patches=16),
    ),
    "dinov2": (Dinov2Model, Dinov2Config(**SIZES, mlp_ratio=2)),
    "dinov2 with a gated mlp": (
        Dinov2Model,
        Dinov2Config(**SIZES, use_swiglu_ffn=True, use_mask_token=False),
    ),
    "dinov3": (DINOv3ViTModel, DINOv3ViTConfig(**SMALL, num_register_tokens=4)),
    "dinov3 of 7B": (
        DINOv3ViTModel,
        DINOv3ViTConfig(
            **SMALL,
            num_register_tokens=2,
            use_gated_mlp=True,
            hidden_act="silu",
            query_bias=False,
            value_bias=False,
        ),
    ),
}
OWN = "its own size"
SIDES_PX = {OWN: (16, 16), "another": (22, 13)}  # the second is not a multiple of the patch size
every_model = pytest.mark.parametrize("kind", MODELS)
# Each family resamples its positions in a way of its own.
SIZES_OF_MODELS = [(kind, OWN) for kind in MODELS]
SIZES_OF_MODELS += [
    (kind, "another") for kind in ("vit", "clip", "siglip", "siglip2", "dinov2", "dinov3")
]


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory):
    """`pair_of(kind)`: a folder, the model of transformers in it, our model and its parameters."""

    @functools.cache
    def make(kind):
        cls, config = MODELS[kind]
        folder = tmp_path_factory.mktemp("hub")
        return folder, saved(cls(config), folder), *load_params(folder)

    return make


def random_pixels(size: str) -> np.ndarray:
    """Two images (2, channels, height, width)."""
    return np.random.default_rng(0).normal(size=(2, 3, *SIDES_PX[size])).astype(np.float32)


def reference_inputs(hf, size: str) -> dict:
    """Arguments of a model of transformers; SigLIP 2 takes patches."""
    pixels = torch.tensor(random_pixels(size))
    if isinstance(hf, Siglip2VisionModel):
        return siglip2_inputs(pixels, 4)
    if isinstance(hf, Dinov2Model | DINOv3ViTModel):
        return {"pixel_values": pixels}
    return {"pixel_values": pixels, "interpolate_pos_encoding": True}


def encode(model, params, size=OWN):
    """Our outputs and intermediates; all laws of a model share the program of each size."""
    settings = {"method": "encode", "mutable": "intermediates"}
    return jax.device_get(forward(model, params, channels_last(random_pixels(size)), **settings))


def assert_equal_tokens(model, params, expected_model, expected_params) -> None:
    found, expected = encode(model, params)[0], encode(expected_model, expected_params)[0]
    np.testing.assert_array_equal(found.tokens, expected.tokens)


@pytest.mark.parametrize(("kind", "size"), SIZES_OF_MODELS)
def test_outputs_are_those_of_transformers_layer_by_layer(pair_of, kind, size):
    _, hf, model, params = pair_of(kind)
    with torch.no_grad():
        expected = hf(**reference_inputs(hf, size), output_hidden_states=True)
    found, state = encode(model, params, size)
    (embeddings,) = state["intermediates"]["embeddings"]
    blocks = state["intermediates"]["blocks"]["layers"]
    for i, state in enumerate([embeddings, *blocks["block_0_out"][0]]):
        name = f"after block {i - 1}" if i else "embeddings"
        np.testing.assert_allclose(
            state, expected.hidden_states[i].numpy(), atol=1e-4, err_msg=name
        )
    names = {"tokens": "last_hidden_state", "pooled": "pooler_output", "logits": "logits"}
    for field, name in names.items():
        output = getattr(expected, name, None)
        if output is not None:
            np.testing.assert_allclose(
                getattr(found, field), output.numpy(), atol=1e-4, err_msg=name
            )
        else:
            assert getattr(found, field) is None or isinstance(hf, ViTForImageClassification)


def test_siglip2_takes_images_of_unequal_shapes(pair_of, tmp_path):
    """Padding beside the patches of an image is masked; `verify` compares the other tokens."""
    folder, hf, _, _ = pair_of("siglip2")
    rng = np.random.default_rng(0)
    grids = [[3, 5], [2, 2]]
    mask = np.arange(16) < np.prod(grids, axis=1)[:, None]
    inputs = {
        "pixel_values": rng.normal(size=(2, 16, 48)).astype(np.float32) * mask[..., None],
        "pixel_attention_mask": mask.astype(np.int32),
        "spatial_shapes": np.array(grids),
    }
    with torch.no_grad():
        outputs = hf(**{name: torch.tensor(x) for name, x in inputs.items()})
    expected = {name: outputs[name] for name in ("last_hidden_state", "pooler_output")}
    arrays = {f"a/in/{name}": x for name, x in inputs.items()}
    arrays |= {f"a/out/{name}": x.numpy() for name, x in expected.items()}
    np.savez(tmp_path / "reference.npz", **arrays)
    verification = verify(folder, tmp_path / "reference.npz")
    assert len(verification.agreeing) == 2, verification.comparisons


def test_patches_without_their_grids_are_refused():
    patches = {"pixel_values": np.zeros((2, 16, 48))}
    for arrays, message in (
        (patches, "spatial_shapes must have the shape"),
        (patches | {"spatial_shapes": [[4, 4], [4, 5]]}, r"spatial_shapes \[4, 5\] .* 16 patches"),
        ({"pixel_values": np.zeros((2, 3, 8, 8)), "spatial_shapes": 0}, "spatial_shapes needs"),
    ):
        with pytest.raises(UserError, match=message):
            encoder_inputs(arrays)


@every_model
def test_an_export_is_what_was_loaded_and_transformers_loads_it(pair_of, tmp_path, kind):
    folder, hf, model, params = pair_of(kind)
    assert_round_trip(folder, tmp_path)
    reloaded(MODELS[kind][0], tmp_path, hf)
    again, params_again = load_params(tmp_path)
    assert again.cfg == model.cfg
    assert_equal_tokens(again, params_again, model, params)


def test_a_classifier_alone_has_its_encoder_below_a_name(pair_of, tmp_path):
    """As published: `embeddings.cls_token`, below `vit.` if it has a classifier."""
    for kind, token in {
        "vit": "embeddings.cls_token",
        "vit with classes": "vit.embeddings.cls_token",
    }.items():
        export_checkpoint(pair_of(kind)[0], tmp_path / kind)
        assert token in load_file(tmp_path / kind / "model.safetensors")


@pytest.mark.parametrize(
    "kind", ["vit", "clip", "siglip", "dinov2", "dinov2 with a gated mlp", "dinov3"]
)
def test_names_of_modules_in_memory_load_too(pair_of, tmp_path, kind):
    _, hf, model, params = pair_of(kind)
    hf.save_pretrained(tmp_path, save_original_format=False)
    again, params_again = load_params(tmp_path)
    assert_equal_tokens(again, params_again, model, params)


def test_a_model_may_be_stored_below_its_own_name(tmp_path):
    """Files that were extracted from a classifier have such names."""
    hf = randomized(Dinov2Model(MODELS["dinov2"][1]))
    hf.config.save_pretrained(tmp_path)
    torch.save(
        {f"dinov2.{name}": x for name, x in hf.state_dict().items()},
        tmp_path / "pytorch_model.bin",
    )
    model, params = load_params(tmp_path)
    with torch.no_grad():
        expected = hf(torch.tensor(random_pixels(OWN))).last_hidden_state
    np.testing.assert_allclose(encode(model, params)[0].tokens, expected.numpy(), atol=1e-4)


def test_the_ratio_of_the_mlp_gives_its_width_again():
    """Plain division would fail: int(49 * (54 / 49)) is 53."""
    for width, mlp_width in itertools.product((49, 768, 1408), range(40, 240)):
        assert int(width * mlp_ratio(width, mlp_width)) == mlp_width
    assert repr(mlp_ratio(768, 3072)) == "4"


def test_the_gated_mlp_of_the_largest_dinov2():
    config = {"hidden_size": 1536, "num_attention_heads": 24, "use_swiglu_ffn": True}
    cfg = FAMILIES["dinov2"].config_from_hf(config, ())
    assert cfg.mlp_width == 4096
    assert FAMILIES["dinov2"].config_from_hf(FAMILIES["dinov2"].config_to_hf(cfg), ()) == cfg


POOLED = ["vit.pooler.dense.weight"]


@pytest.mark.parametrize(
    ("family", "config", "words"),
    [
        ("vit", {"num_channels": 1}, ["num_channels 1", "only 3"]),
        ("vit", {"image_size": [16, 32]}, ["image_size [16, 32]", "square"]),
        ("vit", {"pooler_act": "relu"}, ["pooler_act 'relu'", "'tanh'"]),
        ("vit", {"pooler_output_size": 8}, ["pooler_output_size 8"]),
        ("clip_vision_model", {"hidden_act": "mish"}, ["hidden_act 'mish'", "quick_gelu"]),
        ("siglip_vision_model", {"patch_size": [4, 8]}, ["patch_size [4, 8]"]),
        ("siglip2_vision_model", {"num_patches": 200}, ["num_patches 200", "square"]),
        ("dinov2", {"num_channels": 4}, ["num_channels 4"]),
        ("dinov3_vit", {"num_register_tokens": 0}, ["num_register_tokens is 0", "from 1 to"]),
        ("dinov3_vit", {"query_bias": False, "value_bias": True}, ["value_bias True", "False"]),
    ],
)
def test_settings_that_are_not_supported_are_refused(family, config, words):
    with pytest.raises(UserError) as error:
        FAMILIES[family].config_from_hf(config, POOLED)
    assert all(word in str(error.value) for word in words)


def test_a_size_may_be_written_twice():
    assert build_model(
        FAMILIES["vit"].config_from_hf({"image_size": [32, 32], "patch_size": [8, 8]}, ())
    ).cfg.grid == (4, 4)
