"""The configs of `configs/composed` with small encoders and decoders from their own folders."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from flax import traverse_util
from flax.linen import meta
from transformers import (
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Siglip2VisionConfig,
    Siglip2VisionModel,
)

from tests.hub import tiny_tokenizers
from tests.hub.parity import SMALL, forward, saved, siglip2_inputs
from vlm_jax import axes
from vlm_jax.config import Mesh, files
from vlm_jax.config.validate import validate
from vlm_jax.hub import pretrained_parts
from vlm_jax.nn.models import abstract_params, build_model
from vlm_jax.testing import random_batch

CONFIGS = Path(__file__).parents[2] / "configs" / "composed"
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": 8,
}
TEXT = SMALL | {"vocab_size": 1000, "max_position_embeddings": 512, "head_dim": 8}
MODELS = {
    "siglip2": (Siglip2VisionModel, Siglip2VisionConfig(**TOWER, num_patches=16)),
    "dinov3": (
        DINOv3ViTModel,
        DINOv3ViTConfig(**TOWER, image_size=32, num_register_tokens=4),
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**TEXT)),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config(**TEXT, eos_token_id=1, pad_token_id=0)),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig(**TEXT)),
}
PREPROCESSORS = {"siglip2": "Siglip2ImageProcessor", "dinov3": "DINOv3ViTImageProcessor"}
TOKENIZERS = {
    "qwen3": tiny_tokenizers.qwen3,
    "olmo2": tiny_tokenizers.llama3,
    "gemma3": tiny_tokenizers.gemma3,
}
PARTS = {
    "unified": ("siglip2", "qwen3"),
    "cross_attention": ("dinov3", "olmo2"),
    "encoder_decoder": ("siglip2", "gemma3"),
    "hybrid": ("dinov3", "qwen3"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every encoder and decoder as it is downloaded."""
    made = {}
    for name, (cls, config) in MODELS.items():
        made[name] = tmp_path_factory.mktemp(name)
        if name in PREPROCESSORS:
            preprocessor = {"image_processor_type": PREPROCESSORS[name]}
            (made[name] / "preprocessor_config.json").write_text(json.dumps(preprocessor))
        else:
            TOKENIZERS[name](made[name])
        saved(cls(config), made[name])
    return made


def composed(folders, kind):
    """The config of a fusion style, and the parameters of a new run: 0.5 where none are loaded."""
    encoder, decoder = PARTS[kind]
    cfg = files.load(str(CONFIGS / f"{kind}.py"))
    cfg = replace(
        cfg,
        vision=replace(cfg.vision, checkpoint=str(folders[encoder])),
        decoder=replace(cfg.decoder, checkpoint=str(folders[decoder])),
    )
    cfg = validate(pretrained_parts.resolve_checkpoints(cfg))
    shapes = meta.unbox(abstract_params(cfg))
    params = traverse_util.flatten_dict(shapes, sep="/")
    params = {path: np.full(x.shape, 0.5, np.float32) for path, x in params.items()}
    params |= pretrained_parts.load_pretrained_parts(cfg, shapes, axes.make_mesh(Mesh()))
    return cfg, params


def expected_features(folders, encoder, pixels):
    """Features of transformers: hidden states of the patches after the final norm."""
    hf = MODELS[encoder][0].from_pretrained(folders[encoder])
    inputs = siglip2_inputs(pixels, 8) if encoder == "siglip2" else {"pixel_values": pixels}
    with torch.no_grad():
        return hf(**inputs).last_hidden_state[:, -16:].numpy()


@pytest.mark.parametrize("kind", PARTS)
def test_a_composed_model_begins_with_the_features_of_its_encoder(folders, kind):
    cfg, params = composed(folders, kind)
    assert cfg.fusion.kind == kind
    assert (cfg.vision.image_size_px, cfg.image_tokens, cfg.decoder.width) == (32, 16, 32)
    for path, x in params.items():
        begins_anew = path.startswith("projector") or "/cross" in path
        assert (np.asarray(x) == 0.5).all() == begins_anew, path
    params = traverse_util.unflatten_dict(params, sep="/")
    pixels = torch.tensor(np.random.default_rng(0).normal(size=(2, 3, 32, 32)), dtype=torch.float32)
    # Tiles are images to the encoder: without them, two configs share a program.
    encoder = build_model(replace(cfg.vision, tiles=1))
    features = forward(encoder, params["vision"], np.moveaxis(pixels.numpy(), 1, -1))
    expected = expected_features(folders, PARTS[kind][0], pixels)
    np.testing.assert_allclose(features, expected, atol=1e-4)

    batch = random_batch(cfg, rows=2)
    output = jax.eval_shape(build_model(cfg).apply, {"params": params}, batch)
    assert output.logits.shape == (*batch.tokens.shape, 1000)
