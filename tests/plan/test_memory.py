"""The predicted peak memory of a step is within 15 % of what the compiler reserves."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from vlm_jax import axes, testing
from vlm_jax.config import LrMult, Mesh, Optim
from vlm_jax.nn.vlm import VLM, empty_cache, example_batch
from vlm_jax.plan import compiled, liveness, memory
from vlm_jax.train.step import abstract_state

SHAPES = {  # kind, width, text tokens, rows, trained
    "activations": ("unified", 128, 96, 8, LrMult()),
    "weights": ("cross_attention", 512, 24, 2, LrMult()),
    "attention": ("encoder_decoder", 64, 384, 4, LrMult()),
    "tiles": ("hybrid", 128, 96, 8, LrMult()),
    "frozen_decoder": ("unified", 256, 64, 4, LrMult(0, 1, 0, 0)),
    "frozen_encoder": ("unified", 128, 160, 8, LrMult(0, 1, 1, 1)),
}


def experiment(kind, width, text, rows, rates):
    cfg = testing.hybrid_in_tiles() if kind == "hybrid" else testing.tiny(kind)
    stack = {"width": width, "depth": 4, "heads": 4, "mlp_width": 4 * width}
    return dataclasses.replace(
        cfg,
        vision=dataclasses.replace(cfg.vision, image_size_px=64, **stack),
        decoder=dataclasses.replace(cfg.decoder, **stack, max_positions=512, gated_mlp=True),
        data=dataclasses.replace(cfg.data, text_length=text),
        train=dataclasses.replace(cfg.train, batch_size=rows),
        optim=Optim(lr_mult=rates),
    )


def reserved(cfg, mesh) -> int:
    analysis = compiled.lower_train_step(cfg, mesh).compile().memory_analysis()
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return analysis.argument_size_in_bytes + outputs + analysis.temp_size_in_bytes


QUICK = ("activations", "frozen_decoder")  # the others compile for seconds each


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SHAPES]
)
def test_the_peak_on_one_device(name):
    cfg = experiment(*SHAPES[name])
    predicted = memory.predict_memory(cfg, AbstractMesh((1, 1, 1), axes.MESH_AXES)).total
    assert predicted == pytest.approx(
        reserved(cfg, axes.make_mesh(Mesh(), jax.devices()[:1])), rel=0.15
    )


def test_state_and_batch_are_what_goes_into_the_program():
    cfg = experiment(*SHAPES["weights"])
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, batch_size=4))
    mesh = axes.make_mesh(Mesh(1, 4, 2))
    predicted = memory.predict_memory(cfg, AbstractMesh((1, 4, 2), axes.MESH_AXES))
    state = jax.tree.leaves(abstract_state(cfg, mesh))
    held = sum(
        jax.numpy.prod(jax.numpy.array(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in state
    )
    assert predicted.parameters + predicted.optimizer == pytest.approx(int(held), abs=8)


def test_frozen_parts_have_no_moments_and_no_gradients():
    mesh = AbstractMesh((1, 1, 1), axes.MESH_AXES)
    predicted = memory.predict_memory(experiment(*SHAPES["frozen_decoder"]), mesh)
    assert predicted.gradients < predicted.parameters / 100
    assert predicted.optimizer < predicted.parameters / 50


@pytest.mark.parametrize(
    "cfg", testing.variants_and_tiles().values(), ids=testing.variants_and_tiles()
)
def test_the_cache_of_a_row_is_what_decoding_keeps(cfg):
    def read(params):
        prompt = example_batch(cfg.model, cfg.row_length)
        return VLM(cfg.model).apply(
            {"params": params}, prompt, empty_cache(cfg.model, prompt, 0), method=VLM.next_logits
        )[1]

    cache = jax.tree.leaves(jax.eval_shape(read, testing.random_params(cfg)).layers)
    assert memory.cache_bytes(cfg) == sum(x.size * x.dtype.itemsize for x in cache)


def test_what_each_device_sums_over_its_rows_is_whole_before_it_is_shared():
    program = jax.make_jaxpr(lambda x: jax.lax.reduce_sum(x, (0,)))(
        jax.ShapeDtypeStruct((3, 64, 64), "float32")
    ).jaxpr
    whole, share = 64 * 64 * 4, 64 * 64
    target = liveness.Target(lambda shape: 4 if shape == (64, 64) else 1)
    peak = liveness.peak_bytes(program, target)
    # The device's own sum and the sum over all devices, of which each keeps its share.
    assert peak == share + 2 * (whole - share)


def test_each_part_of_a_sum_over_devices_is_whole_before_it_is_shared():
    program = jax.make_jaxpr(lambda x: jax.lax.reduce_sum(x, (0,)))(
        jax.ShapeDtypeStruct((1, 64, 64), "float32")
    ).jaxpr
    whole, share = 64 * 64 * 4, 64 * 64
    target = liveness.Target(lambda shape: 4 if shape == (64, 64) else 1, summed_parts=2)
    peak = liveness.peak_bytes(program, target)
    assert peak == share + (whole - share) / 2


def test_a_tpu_adds_a_matmul_to_the_array_of_a_loop_in_its_place():
    def loop(x, end):
        return jax.lax.fori_loop(0, end, lambda i, total: total + x @ x, jnp.zeros((64, 64)))

    program = jax.make_jaxpr(loop)(jax.ShapeDtypeStruct((64, 64), "float32"), 3).jaxpr
    size = 64 * 64 * 4
    peaks = [
        liveness.peak_bytes(program, liveness.Target(lambda shape: 1, is_tpu=is_tpu))
        for is_tpu in (False, True)
    ]
    assert [round(peak / size, 2) for peak in peaks] == [2, 1]


def test_fewer_rows_on_a_device_need_less():
    cfg = experiment(*SHAPES["activations"])
    on_one = memory.predict_memory(cfg, AbstractMesh((1, 1, 1), axes.MESH_AXES))
    on_four = memory.predict_memory(cfg, AbstractMesh((4, 1, 1), axes.MESH_AXES))
    assert on_four.activations < on_one.activations / 2
