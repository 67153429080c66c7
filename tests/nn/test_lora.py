"""LoRA: a new adapter changes nothing, a merged one as much as before, a target its kernels."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import traverse_util
from flax.linen import meta

from vlm_jax.config import ConfigError, Lora
from vlm_jax.nn import lora
from vlm_jax.nn.models import abstract_params, initializer
from vlm_jax.nn.parts import PARTS, find_part, is_adapter
from vlm_jax.nn.vlm import VLM
from vlm_jax.testing import random_batch, random_params, tiny

# An adapter of every part, some with a rank of their own; the resampler has blocks, too.
LORA = Lora(rank=4, alpha=6, targets=(*PARTS, "decoder.mlp:2", "vision.query:3:1"))
BASE = tiny("cross_attention")
BASE = replace(BASE, projector=replace(BASE.projector, kind="resampler"))
CFG = replace(BASE, lora=LORA)
BATCH = jax.device_put(random_batch(BASE))


def flat(params):
    return traverse_util.flatten_dict(params, sep="/")


@jax.jit
def apply(params, batch):
    return VLM(BASE.model).apply({"params": params}, batch).logits


def logits(params):
    return apply(params, BATCH)


def adapter_shapes(**settings):
    cfg = replace(BASE, lora=Lora(**settings))
    shapes = flat(meta.unbox(abstract_params(cfg)))
    return {path: x.shape for path, x in shapes.items() if "lora" in path}


def test_a_new_adapter_changes_no_bit_of_the_logits():
    adapted = meta.unbox(initializer(CFG)(jax.random.key(0)))
    base = {path: x for path, x in flat(adapted).items() if "lora" not in path}
    base = traverse_util.unflatten_dict(base, sep="/")
    np.testing.assert_array_equal(logits(adapted), logits(base))


def test_merged_adapters_give_the_logits_of_unmerged_ones():
    params = random_params(CFG)
    merged = lora.merge(LORA, params)
    assert flat(merged).keys() == flat(random_params(BASE)).keys()
    applied = lora.as_applied(LORA, traverse_util.flatten_dict(params))
    unmerged = logits(traverse_util.unflatten_dict(applied))
    np.testing.assert_allclose(logits(merged), unmerged, atol=1e-5)
    base = traverse_util.path_aware_map(lambda path, x: 0 * x if is_adapter(path) else x, params)
    assert np.abs(logits(base) - unmerged).max() > 0.1


def test_an_adapter_is_initialized_as_in_peft():
    params = flat(meta.unbox(initializer(CFG)(jax.random.key(0))))
    lora_a = params["decoder/blocks/layers/block_0/self/out/lora_a"]  # 32 inputs
    assert np.abs(lora_a).max() <= 32**-0.5 < 1.1 * np.abs(lora_a).max()
    assert not np.array_equal(lora_a[0], lora_a[1])
    assert not any(np.any(x) for path, x in params.items() if path.endswith("lora_b"))


def test_an_adapter_has_the_logical_axes_of_its_kernel():
    boxes = flat(abstract_params(CFG))
    out = "decoder/blocks/layers/block_0/self/out"
    assert boxes[f"{out}/kernel"].letters == "L N H D"
    assert boxes[f"{out}/lora_a"].letters == "L N H A"
    assert boxes[f"{out}/lora_b"].letters == "L A D"
    assert boxes["projector/linear/lora_a"].letters == "E A"
    assert boxes["projector/linear/lora_b"].letters == "A D"


def test_a_target_has_its_own_rank_and_the_most_specific_one_wins():
    shapes = adapter_shapes(rank=4, targets=LORA.targets)
    layers = "blocks/layers/block_0"
    assert shapes[f"decoder/{layers}/self/query/lora_b"] == (2, 4, 4, 8)
    assert shapes[f"decoder/{layers}/mlp/up/lora_b"] == (2, 2, 64)
    assert shapes[f"vision/{layers}/self/query/lora_a"] == (2, 32, 3)
    settings = lora.find_target(LORA, ("vision", *layers.split("/"), "self", "query", "kernel"))
    assert (settings.rank, settings.alpha) == (3, 1)


@pytest.mark.parametrize(
    "target, kernels",
    [
        ("decoder", "self/query self/key self/value self/out mlp/up mlp/down"),
        ("decoder.attention", "self/query self/key self/value self/out"),
        ("vision.mlp", "mlp/up mlp/down"),
        ("cross_attention.value", "cross/value"),
        ("cross_attention.mlp", "cross_mlp/up cross_mlp/down"),
        ("projector.linear", "projector/linear"),
    ],
)
def test_a_target_means_its_kernels(target, kernels):
    paths = [path.split("/") for path in adapter_shapes(rank=2, targets=(target,))]
    assert {"/".join(path[-3:-1]) for path in paths} == set(kernels.split())
    assert {find_part(tuple(path)) for path in paths} == {target.split(".")[0]}


def test_rslora_divides_by_the_square_root_of_the_rank():
    assert Lora(rank=16).scale(16, 8) == 0.5
    assert Lora(rank=16, rslora=True).scale(16, 8) == 2


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"targets": ("decoder.quer",)},
            r"lora.targets decoder.quer matches no kernel of the model \(perhaps you meant "
            "decoder.query\\): choose cross_attention, cross_attention.attention,",
        ),
        ({"targets": ("decoder.gate",)}, "decoder.gate matches no kernel"),
        ({"targets": ("decoder:x",)}, "'decoder:x' is not NAME, NAME:RANK or NAME:RANK:ALPHA"),
        ({"targets": ("decoder:0",)}, "'decoder:0' is not NAME"),
        ({"targets": ("decoder:4:0",)}, "'decoder:4:0' is not NAME"),
    ],
)
def test_a_target_that_means_nothing_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        adapter_shapes(rank=2, **settings)


def test_a_rank_above_a_width_is_refused():
    settings = Lora(rank=2, targets=("projector", "decoder.key:17"))
    boxes = traverse_util.flatten_dict(abstract_params(replace(BASE, lora=settings)))
    with pytest.raises(ConfigError, match=r"lora.rank 17 of lora.targets decoder.key .* 16, of .*"):
        lora.check_ranks(settings, boxes)
