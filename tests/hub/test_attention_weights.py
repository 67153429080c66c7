"""Attention weights that `vlm_jax.look` maps equal transformers' `output_attentions`."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.hub import tiny_checkpoints as tiny
from vlm_jax import from_pretrained
from vlm_jax.infer.look.observe import observe

FAMILIES = {
    "llava": tiny.llava,
    "mllama": tiny.mllama,
    "trocr": tiny.trocr,
}  # a kind of fusion each
PROMPT = "what is it?"


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_equal_those_of_transformers(tmp_path, family):
    torch.manual_seed(0)
    folder = FAMILIES[family](tmp_path)
    picture = Image.open(tiny.pictures(tmp_path)["tall"])
    # How transformers 5 counts the intermediate layers of Llama 3.2 Vision.
    settings = {"intermediate_layers": "output"} if family == "mllama" else {}
    model, params, processor = from_pretrained(tmp_path, **settings)
    batch = processor([PROMPT], [[picture]], chat=family != "trocr")
    length = batch.tokens.shape[1]
    observed = observe(model.cfg, params, batch, np.arange(length)[None])

    folder.model.set_attn_implementation("eager")
    if family == "trocr":
        pixels = folder.reader.image_processor(images=[picture], return_tensors="pt").pixel_values
        inputs = {"pixel_values": pixels, "decoder_input_ids": torch.tensor(batch.tokens)}
        expected = attentions(folder, inputs, "decoder_attentions", "cross_attentions")
    else:
        message = [{"type": "image", "image": picture}, {"type": "text", "text": PROMPT}]
        inputs = folder.reader.apply_chat_template(
            [{"role": "user", "content": message}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        expected = attentions(folder, inputs, "attentions")
    # Layers of one kind are in the order of depth; cross-attention has another number of keys.
    assert_equal(observed.self, [layer for layer in expected if layer.shape[-1] == length])
    assert_equal(observed.cross, [layer for layer in expected if layer.shape[-1] != length])


def attentions(folder, inputs, *names) -> list[np.ndarray]:
    with torch.no_grad():
        output = folder.model(**inputs, output_attentions=True)
    layers = [layer for name in names for layer in getattr(output, name)]
    return [layer.numpy() for layer in layers]


def assert_equal(layers, expected) -> None:
    assert (0 if layers is None else len(layers)) == len(expected)
    for weights, other in zip([] if layers is None else layers, expected):
        np.testing.assert_allclose(weights, other, rtol=0, atol=1e-5)
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
