"""Tiny random models of transformers, outputs of both sides, and the export round trip."""

import functools

import jax
import numpy as np
import torch
from transformers import AutoImageProcessor
from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

from vlm_jax.config import Experiment
from vlm_jax.hub.load import inspect, load_params
from vlm_jax.hub.save import write_model
from vlm_jax.hub.tensors.folder import open_tensors
from vlm_jax.nn.vlm import VLM

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}


def randomized(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Randomizes every parameter, so that an ignored one shows; sets inference mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name.lower() or ".ln_" in name
            middle = 1.0 if is_norm and name.endswith("weight") else 0.0
            parameter.copy_(middle + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def saved(model: torch.nn.Module, folder) -> torch.nn.Module:
    randomized(model).save_pretrained(folder)
    return model


def reference(model: torch.nn.Module, output: str = "logits", **inputs) -> np.ndarray:
    """An output of transformers."""
    tensors = {name: torch.tensor(x) for name, x in inputs.items()}
    with torch.no_grad():
        return getattr(model(**tensors), output).numpy()


def siglip2_inputs(pixels: torch.Tensor, patch: int) -> dict[str, torch.Tensor]:
    """Arguments of SigLIP 2 in transformers for images (B, channels, height, width)."""
    rows, columns = (side // patch for side in pixels.shape[2:])
    whole = pixels[:, :, : rows * patch, : columns * patch].numpy()
    patches = np.stack([convert_image_to_patches(image, patch) for image in whole])
    return {
        "pixel_values": torch.tensor(patches),
        "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.int32),
        "spatial_shapes": torch.tensor([[rows, columns]] * len(pixels)),
    }


def reference_pixels(folder, images) -> np.ndarray:
    """Pixel values of transformers' Pillow backend: channels last, or patches."""
    output = AutoImageProcessor.from_pretrained(folder, backend="pil")(images=images)
    # The class of Idefics returns the arrays alone.
    pixels = output if isinstance(output, list) else output["pixel_values"]
    pixels = np.asarray(pixels)
    return np.moveaxis(pixels, -3, -1) if pixels.ndim > 3 else pixels


@functools.partial(
    jax.jit, static_argnums=0, static_argnames=("method", "mutable", "capture_intermediates")
)
def forward(model, params, *inputs, **settings):
    """`model.apply`, jitted once: calls with equal models and shapes share a program."""
    return model.apply({"params": params}, *inputs, **settings)


def bare_model(cfg: Experiment) -> VLM:
    """The model of an experiment: runs that differ only in their data share programs."""
    return VLM(cfg.model)


def assert_round_trip(folder, target, **config) -> None:
    """Loads and exports: tensors keep name, dtype and bytes; `config` is added to config.json."""
    with open_tensors(folder) as before:
        checkpoint = inspect(folder, before)
        # On the host: the slice of every layer would be compiled on a device.
        params = jax.device_get(load_params(folder)[1])
        dtypes = {name: before[stored].dtype for name, stored in checkpoint.stored_names.items()}
        write_model(target, checkpoint.family, checkpoint.cfg, params, config, dtypes)
        with open_tensors(target) as after:
            assert set(after) == set(checkpoint.stored_names)
            for name, stored in checkpoint.stored_names.items():
                assert after[name].read().tobytes() == before[stored].read().tobytes(), name
                assert after[name].dtype == before[stored].dtype, name


def reloaded(cls, folder, reference: torch.nn.Module):
    """Loads an export with transformers: no missing or unexpected key, every parameter equal."""
    model, report = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    expected = reference.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    return model.eval()
