"""Llama 3.2 Vision: outputs equal to transformers' with both conventions of intermediate layers."""

import functools
from dataclasses import replace

import numpy as np
import pytest
from flax import traverse_util
from flax.linen import meta
from transformers import MllamaConfig, MllamaForConditionalGeneration

from tests.hub.parity import assert_round_trip, reference, reloaded, saved
from tests.hub.unified import (
    NEW,
    Pair,
    assert_cached_greedy_tokens_are_equal,
    assert_greedy_tokens_are_equal,
    assert_logits_are_equal,
    padded,
)
from vlm_jax import axes
from vlm_jax.cli.main import main
from vlm_jax.config import Fusion, Mesh, UserError
from vlm_jax.hub.families.registry import find_family
from vlm_jax.hub.families.table import layers_with
from vlm_jax.hub.load import load_checkpoint
from vlm_jax.hub.pretrained_parts import load_pretrained_parts
from vlm_jax.hub.save import write_model
from vlm_jax.nn.models import abstract_params

ATOL = 1e-4
SIDE = 8  # pixels of a tile
TEXT = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXT |= {
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
}
TEXT |= {"eos_token_id": 2}
VISION = {"hidden_size": 16, "num_global_layers": 2, "attention_heads": 2, "intermediate_size": 24}
VISION |= {"image_size": SIDE, "patch_size": 4}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
LLAMA3 |= {"original_max_position_embeddings": 16}
CONFIGS = {
    "cross layers at a distance": MllamaConfig(
        text_config={
            **TEXT,
            "num_hidden_layers": 6,
            "cross_attention_layers": [1, 4],
            "rope_parameters": LLAMA3,
        },
        vision_config={
            **VISION,
            "num_hidden_layers": 3,
            "intermediate_layers_indices": [0, 2],
            "vision_output_dim": 3 * 16,
        },
        attn_implementation="eager",
    ),
    "cross layers in a row and at the end": MllamaConfig(
        text_config={**TEXT, "num_hidden_layers": 5, "cross_attention_layers": [1, 2, 4]},
        vision_config={
            **VISION,
            "num_hidden_layers": 2,
            "intermediate_layers_indices": [1],
            "vision_output_dim": 2 * 16,
            "max_num_tiles": 2,
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        },
        attn_implementation="eager",
    ),
}
FIRST = next(iter(CONFIGS))
MIXED = "two, one and none"
IMAGES = {  # (rows, columns) of tiles of every image in every row
    "one image a row": [[(1, 1)], [(1, 2)], [(2, 1)]],
    MIXED: [[(2, 1), (1, 1)], [(1, 2)], []],
}
every_kind = pytest.mark.parametrize("kind", CONFIGS)


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory):
    """`pair_of(kind)`: the model of transformers 5, which takes the layers' outputs, and ours."""

    @functools.cache
    def make(kind):
        folder = tmp_path_factory.mktemp("hub")
        model = saved(MllamaForConditionalGeneration(CONFIGS[kind]), folder)
        return Pair(model, *load_checkpoint(folder, intermediate_layers="output"))

    return make


LENGTHS = (9, 6, 4)


def texts(side: str, room: int = NEW) -> dict[str, np.ndarray]:
    """Texts with `room` more slots than the longest; NEW: the shape of prompts and answers."""
    rng = np.random.default_rng(0)
    rows = [list(rng.integers(3, 64, length)) for length in LENGTHS]
    return padded(rows, side, max(LENGTHS) + room)


def images(pair: Pair, layouts) -> dict[str, np.ndarray]:
    """Random tiles in these layouts, packed as transformers does: two images, one may be padding.

    All laws have this shape, so that a model is one program.
    """
    vision = pair.cfg.vision
    shape = (len(layouts), 2, vision.tiles)
    ids, is_tile = np.zeros(shape[:2], int), np.zeros(shape, int)
    is_tile[..., 0] = 1
    for b, row in enumerate(layouts):
        for i, (rows, columns) in enumerate(row):
            ids[b, i] = 1 + vision.tile_layouts.index((rows, columns))
            is_tile[b, i, : rows * columns] = 1
    pixels = np.random.default_rng(1).normal(size=(*shape, 3, SIDE, SIDE)).astype(np.float32)
    pixels *= (is_tile * (ids > 0)[..., None])[..., None, None, None]
    return {"pixel_values": pixels, "aspect_ratio_ids": ids, "aspect_ratio_mask": is_tile}


def reading(text, image) -> dict[str, np.ndarray]:
    """A token attends to the images at or before it: image i is at token 2 + 2i of its row."""
    is_tile = image["aspect_ratio_mask"] * (image["aspect_ratio_ids"] > 0)[..., None]
    image_positions = 2 + 2 * np.arange(is_tile.shape[1])
    positions = np.cumsum(text["attention_mask"], axis=1) - 1
    is_after = positions[..., None] >= image_positions
    return {"cross_attention_mask": is_after[..., None] * is_tile[:, None]}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("counts", IMAGES)
@every_kind
def test_logits_are_those_of_transformers(pair_of, kind, counts, side):
    """Tokens without an image before them attend to all tiles."""
    pair, text = pair_of(kind), texts(side)
    image = images(pair, IMAGES[counts])
    assert_logits_are_equal(pair, ATOL, **text, **image, **reading(text, image))


@every_kind
def test_without_a_cross_attention_mask_every_token_reads_everything(pair_of, kind):
    image = images(pair_of(kind), IMAGES[MIXED])
    assert_logits_are_equal(pair_of(kind), ATOL, **texts("right"), **image)


@every_kind
def test_text_alone_skips_the_cross_layers(pair_of, kind):
    assert_logits_are_equal(pair_of(kind), ATOL, **texts("left"))


def test_its_layers_are_in_order_in_a_decoder_of_another_fusion(pair_of):
    """transformers numbers cross-attention layers together with the others."""
    pair = pair_of(FIRST)
    decoder = replace(pair.cfg.decoder, checkpoint=str(pair.checkpoint.folder))
    cfg = replace(pair.cfg, decoder=decoder, fusion=Fusion("unified"))
    shapes = meta.unbox(abstract_params(cfg))
    loaded = load_pretrained_parts(cfg, shapes, axes.make_mesh(Mesh()))
    paths = traverse_util.flatten_dict(shapes["decoder"], sep="/")
    assert set(loaded) == {f"decoder/{path}" for path in paths}
    own = layers_with(pair.cfg.fusion.sublayers(decoder.depth), "self")
    for n, (block, layer) in enumerate(own):
        stored = traverse_util.flatten_dict(pair.params, sep="/")
        for name in ("self/query/kernel", "mlp/up/kernel", "mlp_norm/scale"):
            np.testing.assert_array_equal(
                loaded[f"decoder/blocks/layers/block_0/{name}"][n],
                stored[f"decoder/{block}/{name}"][layer],
            )


def with_inputs_as_taps(model):
    """Makes transformers 5 tap the inputs of the vision layers, as Meta's code does."""
    encoder = model.model.vision_model.transformer
    run = type(encoder).forward

    def forward(hidden_states, attention_mask=None):
        output = run(encoder, hidden_states, attention_mask)
        output.hidden_states = (hidden_states, *output.hidden_states)
        return output

    encoder.forward = forward
    return model


def test_taps_are_what_enters_a_layer_unless_the_loader_is_told_otherwise(pair_of, tmp_path):
    model = with_inputs_as_taps(saved(MllamaForConditionalGeneration(CONFIGS[FIRST]), tmp_path))
    pair, text = Pair.load(model, tmp_path), texts("right")
    image = images(pair, IMAGES["one image a row"])
    inputs = {**text, **image, **reading(text, image)}
    assert_logits_are_equal(pair, ATOL, **inputs)
    assert np.abs(pair_of(FIRST).logits(**inputs) - pair.logits(**inputs)).max() > 0.01


@pytest.mark.parametrize("intermediate_layers", ["input", "output"])
def test_verify_finds_the_taps_of_a_reference_where_nobody_tells_them(
    pair_of, tmp_path, capsys, intermediate_layers
):
    pair = pair_of(FIRST)
    text = texts("right")
    inputs = text | images(pair, IMAGES["one image a row"])
    logits = Pair(
        None, *load_checkpoint(pair.checkpoint.folder, intermediate_layers=intermediate_layers)
    ).logits(**inputs)
    reference = tmp_path / "reference.npz"
    command = ["verify", "--checkpoint", str(pair.checkpoint.folder), "--reference", str(reference)]
    arguments = {f"a/in/{name}": x for name, x in inputs.items()}
    np.savez(reference, **arguments, **{"a/out/logits": logits})
    assert main(command) == 0
    assert (
        f"1 of 1 compared outputs agree, with --intermediate-layers {intermediate_layers}"
        in capsys.readouterr().out
    )
    if intermediate_layers == "input":
        np.savez(reference, **arguments, **{"a/out/logits": logits + 1})
        assert main(command) == 1


def outputs_of_layers(model, inputs) -> dict[str, np.ndarray]:
    """Outputs of all layers in the order in which they run, under our names."""
    vision, text = model.model.vision_model, model.model.language_model
    parts = {"vision embeddings": vision.layernorm_pre}
    parts |= {f"vision block {i}": layer for i, layer in enumerate(vision.transformer.layers)}
    parts |= {
        f"vision global block {i}": layer
        for i, layer in enumerate(vision.global_transformer.layers)
    }
    parts |= {"embeddings": text.embed_tokens}
    parts |= {f"layer {i}": layer for i, layer in enumerate(text.layers)}
    found = {}

    def keep(name):
        return lambda module, given, output: found.__setitem__(name, output.numpy())

    hooks = [part.register_forward_hook(keep(name)) for name, part in parts.items()]
    reference(model, **inputs)
    for hook in hooks:
        hook.remove()
    return found


def states_of(pair: Pair, inputs) -> dict[str, np.ndarray]:
    """Our `outputs_of_layers`; our blocks are a cross layer and the self layer after it."""
    states = pair.intermediates(**inputs)
    vision, decoder = states["vision"]["tiled"], states["decoder"]
    found = {"vision embeddings": vision["embeddings"][0]}
    for name, stack in {"vision block": "blocks", "vision global block": "global_blocks"}.items():
        found |= {f"{name} {i}": x for i, x in enumerate(vision[stack]["layers"]["block_0_out"][0])}
    found["embeddings"] = decoder["embeddings"][0]
    blocks, layers = decoder["blocks"]["layers"], pair.checkpoint.config["text_config"]
    turns = len(blocks["block_0_out"][0])
    in_order = [
        blocks[f"block_{i}_out"][0][turn] for turn in range(turns) for i in range(len(blocks))
    ]
    after = [
        n for n in range(layers["num_hidden_layers"]) if n not in layers["cross_attention_layers"]
    ]
    return found | {f"layer {n}": x for n, x in zip(after, in_order)}


def test_every_layer_gives_what_it_gives_in_transformers(pair_of):
    pair, text = pair_of(FIRST), texts("right")
    image = images(pair, IMAGES[MIXED])
    inputs = {**text, **image, **reading(text, image)}
    expected, found = outputs_of_layers(pair.hf, inputs), states_of(pair, inputs)
    patches = expected["vision embeddings"].shape[2]
    for name, state in found.items():
        if name == "vision embeddings":
            state = state[:, :, :patches]
        mask = text["attention_mask"] == 1 if "vision" not in name else ...
        np.testing.assert_allclose(state[mask], expected[name][mask], atol=1e-4, err_msg=name)
    assert {f"layer {n}" for n in (0, 2, 3, 5)} <= set(found)


@pytest.mark.parametrize("counts", IMAGES)
def test_greedy_tokens_of_prompts_of_mixed_length_are_those_of_transformers(pair_of, counts):
    """Answers repeat the last row of the cross-attention mask."""
    pair, text = pair_of(FIRST), texts("left", room=0)
    image = images(pair, IMAGES[counts])
    inputs = {**text, **image, **reading(text, image)}
    assert_greedy_tokens_are_equal(pair, **inputs)
    if counts == MIXED:
        assert_cached_greedy_tokens_are_equal(pair, **inputs)


def test_a_row_of_a_batch_has_the_logits_that_it_has_alone(pair_of):
    """Every token has an image: one without attends to the padding of other rows as well."""
    pair, text = pair_of(FIRST), texts("left")
    inputs = {**text, **images(pair, IMAGES["one image a row"])}
    # Three equal rows instead of one have the shape of the other laws.
    alone = {name: np.repeat(x[2:], 3, axis=0) for name, x in inputs.items()}
    found = pair.logits(generating=True, **inputs)[2, -4:]
    np.testing.assert_allclose(found, pair.logits(generating=True, **alone)[0, -4:], atol=ATOL)


@every_kind
def test_an_export_is_what_was_loaded_and_transformers_loads_it(pair_of, kind, tmp_path):
    pair, text = pair_of(kind), texts("right")
    assert_round_trip(pair.checkpoint.folder, tmp_path)
    again = reloaded(MllamaForConditionalGeneration, tmp_path, pair.hf)
    image = images(pair, IMAGES["one image a row"])
    inputs = {**text, **image, **reading(text, image)}
    np.testing.assert_allclose(reference(again, **inputs), reference(pair.hf, **inputs), atol=1e-5)


def test_an_export_says_how_its_taps_are_meant_where_transformers_5_is_to_load_it(
    pair_of, tmp_path
):
    pair = pair_of(FIRST)
    write_model(tmp_path, pair.checkpoint.family, pair.cfg, pair.params)
    assert load_checkpoint(tmp_path)[0].cfg == pair.cfg
    reloaded(MllamaForConditionalGeneration, tmp_path, pair.hf)


def test_the_names_that_transformers_5_has_in_memory_are_known(pair_of):
    pair = pair_of(FIRST)
    in_memory = {name for name, _ in pair.hf.named_parameters()}
    family = find_family({"model_type": "mllama"}, "")
    assert set(family.normalize_names(in_memory)) == {
        row.tensor for row in family.param_table(pair.cfg)
    }


@pytest.mark.parametrize(
    "name", ["aspect_ratio_ids", "aspect_ratio_mask", "pixel_values", "cross_attention_mask"]
)
def test_arrays_that_do_not_fit_together_are_named(pair_of, name):
    pair, text = pair_of(FIRST), texts("right")
    image = images(pair, IMAGES[MIXED])
    inputs = {**text, **image, **reading(text, image)}
    with pytest.raises(UserError, match=name):
        pair.batch(**{**inputs, name: inputs[name][:1]})
    with pytest.raises(UserError, match="aspect_ratio_ids"):
        pair.batch(**{**inputs, "aspect_ratio_ids": np.full((3, 2), 9)})
