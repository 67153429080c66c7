"""What the parity tests share: tiny random models of transformers, our model of the same folder, and their outputs."""

import functools

import jax
import numpy as np
import torch
from flax import traverse_util

from vlm_jax.hub.inputs import to_batch
from vlm_jax.hub.load import inspect, load_params
from vlm_jax.hub.save import write_model
from vlm_jax.hub.tensors.folder import open_tensors

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
    """The model in inference mode, every parameter random: an ignored bias, gate, norm or scale would show."""
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
    with torch.no_grad():
        return getattr(
            model(**{name: torch.tensor(x) for name, x in inputs.items()}), output
        ).numpy()


def ours(folder, image_token: int | None = None, **inputs) -> np.ndarray:
    """Our logits for the same arguments."""
    model, params = load_params(folder)
    return np.asarray(forward(model, params, to_batch(model.cfg, inputs, image_token)).logits)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("method", "mutable"))
def forward(model, params, *inputs, **settings):
    return model.apply({"params": params}, *inputs, **settings)


def assert_round_trip(folder, target, **config) -> None:
    """Load, then export: every tensor keeps its name, dtype and bytes. `config` goes along into config.json."""
    with open_tensors(folder) as before:
        checkpoint = inspect(folder, before)
        _, params = load_params(folder)
        dtypes = {name: before[stored].dtype for name, stored in checkpoint.stored_names.items()}
        write_model(target, checkpoint.family, checkpoint.cfg, params, config, dtypes)
        with open_tensors(target) as after:
            assert set(after) == set(checkpoint.stored_names)
            for name, stored in checkpoint.stored_names.items():
                assert after[name].read().tobytes() == before[stored].read().tobytes(), name
                assert after[name].dtype == before[stored].dtype, name


def reloaded(cls, folder, reference: torch.nn.Module):
    """The exported folder in transformers: no key missing or unexpected, every parameter equal."""
    model, report = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    expected = reference.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    return model.eval()


def parameter_count(params) -> int:
    return sum(x.size for x in traverse_util.flatten_dict(params).values())
