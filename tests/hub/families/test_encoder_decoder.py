"""Vision-encoder-decoder with GPT-2 and TrOCR: outputs equal to transformers', exact export."""

import functools
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import (
    GPT2Config,
    TrOCRConfig,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)

from tests.hub.parity import assert_round_trip, reference, reloaded
from tests.hub.unified import (
    NEW,
    Pair,
    assert_cached_greedy_tokens_are_equal,
    assert_greedy_tokens_are_equal,
    hf_greedy,
    new_pair,
)
from vlm_jax.config import Projector, UserError
from vlm_jax.hub.families.multimodal.encoder_decoder import ENCODER_DECODER
from vlm_jax.hub.load import load_checkpoint
from vlm_jax.infer.verify import verify

PAD, START = 1, 2
LENGTHS = (7, 5, 3)


def vit(width):
    sizes = {
        "hidden_size": width,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return ViTConfig(**sizes, image_size=8, patch_size=4)


def gpt2(**settings):
    return GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, **settings)


def trocr(**settings):
    sizes = {
        "d_model": 32,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 48,
    }
    return TrOCRConfig(
        vocab_size=64, max_position_embeddings=32, pad_token_id=PAD, **sizes, **settings
    )


SINES = {
    "use_learned_position_embeddings": False,
    "scale_embedding": True,
    "layernorm_embedding": False,
}
SINES |= {"tie_word_embeddings": False}
SIDES = {  # encoder and decoder
    "gpt2 of the encoder's width": (vit(32), gpt2()),
    "gpt2 of another width": (vit(16), gpt2(tie_word_embeddings=False, activation_function="relu")),
    "trocr": (vit(16), trocr(cross_attention_hidden_size=16)),
    "trocr with sines": (vit(16), trocr(**SINES)),
}
TIED, GPT2, _, SINE = SIDES
every_kind = pytest.mark.parametrize("kind", SIDES)


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory):
    """`pair_of(kind)`: the model of transformers and ours."""

    @functools.cache
    def make(kind):
        folder = tmp_path_factory.mktemp("hub")
        special = {"decoder_start_token_id": START, "pad_token_id": PAD, "eos_token_id": 0}
        config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(*SIDES[kind], **special)
        return new_pair(VisionEncoderDecoderModel(config), folder)

    return make


def inputs(side: str, lengths=LENGTHS, room: int = NEW) -> dict[str, np.ndarray]:
    """A random image and text a row, beginning with START, with `room` more slots than tokens."""
    rng = np.random.default_rng(0)
    length = max(lengths) + room
    ids = np.full((len(lengths), length), PAD)
    mask = np.zeros((len(lengths), length), int)
    for row_ids, row_mask, n in zip(ids, mask, lengths):
        tokens = slice(length - n, None) if side == "left" else slice(n)
        row_ids[tokens], row_mask[tokens] = [START, *rng.integers(3, 64, n - 1)], 1
    pixels = rng.normal(size=(len(lengths), 3, 8, 8)).astype(np.float32)
    return {"decoder_input_ids": ids, "decoder_attention_mask": mask, "pixel_values": pixels}


@pytest.mark.parametrize("side", ["left", "right"])
@every_kind
def test_logits_are_those_of_transformers(pair_of, kind, side):
    arrays = inputs(side)
    logits, expected = pair_of(kind).logits(**arrays), reference(pair_of(kind).hf, **arrays)
    is_token = arrays["decoder_attention_mask"] == 1
    np.testing.assert_allclose(logits[is_token], expected[is_token], atol=1e-4)


@pytest.mark.parametrize("kind", [GPT2, SINE])
def test_without_a_mask_padding_tokens_are_read_as_others_are(pair_of, kind):
    arrays = inputs("left")
    del arrays["decoder_attention_mask"]
    expected = reference(pair_of(kind).hf, **arrays)
    np.testing.assert_allclose(pair_of(kind).logits(**arrays), expected, atol=1e-4)


def test_positions_may_be_given(pair_of):
    arrays = inputs("right") | {
        "decoder_position_ids": np.arange(7 + NEW)[None].repeat(3, axis=0) + 4
    }
    expected = reference(pair_of(GPT2).hf, **arrays)
    is_token = arrays["decoder_attention_mask"] == 1
    np.testing.assert_allclose(
        pair_of(GPT2).logits(**arrays)[is_token], expected[is_token], atol=1e-4
    )


def states_of_transformers(model, arrays) -> dict[str, np.ndarray]:
    with torch.no_grad():
        out = model(
            **{name: torch.tensor(x) for name, x in arrays.items()}, output_hidden_states=True
        )
    found = {
        f"encoder after {i} blocks": x.numpy() for i, x in enumerate(out.encoder_hidden_states)
    }
    return found | {
        f"decoder after {i} blocks": x.numpy() for i, x in enumerate(out.decoder_hidden_states)
    }


def our_states(pair: Pair, arrays) -> dict[str, np.ndarray]:
    states, found = pair.intermediates(**arrays), {}
    for name, part in {"encoder": "vision", "decoder": "decoder"}.items():
        after = [states[part]["embeddings"][0], *states[part]["blocks"]["layers"]["block_0_out"][0]]
        found |= {f"{name} after {i} blocks": x for i, x in enumerate(after)}
    return found


@every_kind
def test_every_block_gives_what_it_gives_in_transformers(pair_of, kind):
    arrays = inputs("right", (12, 12, 12), room=0)
    expected, found = (
        states_of_transformers(pair_of(kind).hf, arrays),
        our_states(pair_of(kind), arrays),
    )
    if kind.startswith("gpt2"):
        expected.pop("decoder after 2 blocks")  # it is after the final norm
        found.pop("decoder after 2 blocks")
    assert list(found) == list(expected)
    for name, state in found.items():
        np.testing.assert_allclose(state, expected[name], atol=1e-4, err_msg=name)


@every_kind
def test_greedy_tokens_are_those_of_transformers(pair_of, kind):
    """With sinusoidal positions, transformers numbers new tokens differently: uses the cache."""
    if kind == SINE:
        assert_cached_greedy_tokens_are_equal(pair_of(kind), **inputs("left", (1, 1, 1), room=0))
    else:
        assert_greedy_tokens_are_equal(pair_of(kind), **inputs("left", room=0))


def test_cached_greedy_tokens_are_those_of_transformers(pair_of):
    assert_cached_greedy_tokens_are_equal(pair_of(GPT2), **inputs("left", room=0))


def test_a_row_of_a_batch_has_the_logits_that_it_has_alone(pair_of):
    """With positions that count tokens; transformers counts slots, so padding would matter."""
    arrays = inputs("left")
    arrays |= {"decoder_position_ids": np.cumsum(arrays["decoder_attention_mask"], axis=1) - 1}
    alone = {name: x[2:] for name, x in arrays.items()}
    alone |= {name: x[:, -LENGTHS[2] :] for name, x in alone.items() if name != "pixel_values"}
    pair = pair_of(GPT2)
    found = pair.logits(**arrays)[2, -LENGTHS[2] :]
    np.testing.assert_allclose(found, pair.logits(**alone)[0], atol=1e-5)


@every_kind
def test_a_config_is_read_as_it_was_written(pair_of, kind):
    pair = pair_of(kind)
    names = {row.tensor for row in ENCODER_DECODER.param_table(pair.cfg)}
    written = json.loads(json.dumps(ENCODER_DECODER.config_to_hf(pair.cfg)))
    assert ENCODER_DECODER.config_from_hf(written, names) == pair.cfg


@every_kind
def test_an_export_is_what_was_loaded_and_transformers_loads_it(pair_of, kind, tmp_path):
    pair, arrays = pair_of(kind), inputs("right")
    assert_round_trip(pair.checkpoint.folder, tmp_path)
    if kind == SINE:
        return  # transformers 5 does not load its own: the table of sines stays a meta tensor
    again = reloaded(VisionEncoderDecoderModel, tmp_path, pair.hf)
    np.testing.assert_allclose(reference(again, **arrays), reference(pair.hf, **arrays), atol=1e-6)


@pytest.mark.parametrize("is_copy", [True, False])
def test_a_stored_head_is_tied_if_it_is_a_copy_of_the_embedding(pair_of, tmp_path, is_copy):
    """As in vit-gpt2-image-captioning; another head is loaded even if config.json ties it."""
    pair = pair_of(TIED)
    tensors = load_file(pair.checkpoint.folder / "model.safetensors")
    tensors["decoder.lm_head.weight"] = tensors["decoder.transformer.wte.weight"] + (not is_copy)
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(pair.checkpoint.folder / "config.json", tmp_path)
    checkpoint, params = load_checkpoint(tmp_path)
    if is_copy:
        assert checkpoint.cfg == pair.cfg
    else:
        np.testing.assert_array_equal(
            params["decoder"]["free_head"]["kernel"].T, tensors["decoder.lm_head.weight"]
        )


def test_without_a_prompt_new_tokens_follow_the_one_that_starts_the_decoder(pair_of, tmp_path):
    pair, arrays = pair_of(GPT2), inputs("left", (1, 1, 1), room=0)
    new_ids = hf_greedy(pair, **arrays)[:, -NEW:]
    cases = {"a/in/pixel_values": arrays["pixel_values"], "a/out/new_ids": new_ids}
    np.savez(tmp_path / "reference.npz", **cases)
    assert verify(pair.checkpoint.folder, tmp_path / "reference.npz").agrees


@pytest.mark.parametrize(
    "part, kind, known", [("encoder", "swin", "vit"), ("decoder", "bert", "gpt2, trocr")]
)
def test_other_sides_are_refused_with_those_that_are_known(pair_of, part, kind, known):
    config = pair_of(GPT2).checkpoint.config
    config = {**config, part: {**config[part], "model_type": kind}}
    with pytest.raises(UserError, match=f"{kind}.*{known}"):
        ENCODER_DECODER.config_from_hf(config, ())


def test_gpt2_needs_a_projector_from_another_width(pair_of):
    with pytest.raises(UserError, match="projector.kind to linear"):
        ENCODER_DECODER.config_to_hf(replace(pair_of(GPT2).cfg, projector=Projector("none")))


def test_an_image_is_asked_for(pair_of):
    arrays = inputs("right")
    with pytest.raises(UserError, match="pixel_values"):
        pair_of(GPT2).batch(**{**arrays, "pixel_values": arrays["pixel_values"][:1]})
    with pytest.raises(UserError, match="pixel_values"):
        pair_of(GPT2).batch(decoder_input_ids=arrays["decoder_input_ids"])
