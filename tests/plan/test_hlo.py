"""Costs of a compiled program count every instruction as often as it runs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from vlm_jax.plan import hlo

PRODUCT = """
ENTRY %main (x: bf16[LEFT], y: bf16[RIGHT]) -> f32[OUT] {
  %x = bf16[LEFT]{2,1,0:T(8,128)(2,1)} parameter(0)
  %y = bf16[RIGHT]{2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %c = f32[OUT]{1,2,0:T(8,128)} convolution(%x, %y), window={WINDOW
}
"""
# Attention scores and a query projection, as the compiler for v5p writes them.
SCORES = (
    "32,1024,128",
    "32,1024,128",
    "32,1024,1024",
    "size=32 stride=31 lhs_dilate=32}, dim_labels=0bf_0oi->0bf",
)
QUERIES = (
    "1024,4096,1",
    "32,128,4096",
    "1024,32,128",
    "size=32 pad=31_31 rhs_reversal=1}, dim_labels=bf0_0oi->b0f",
)


def product(*parts) -> str:
    text = PRODUCT
    for name, part in zip(("LEFT", "RIGHT", "OUT", "WINDOW"), parts):
        text = text.replace(name, part)
    return text


def compiled(function, *shapes, **settings):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function, **settings).lower(*arguments).compile().as_text()


def test_a_loop_counts_as_often_as_it_turns():
    def loops(x):
        def inner(x, _):
            return jnp.tanh(x @ x), None

        def outer(x, _):
            return jax.lax.scan(inner, x, length=3)[0], None

        return jax.lax.scan(outer, x, length=5)[0]

    assert hlo.analyze(compiled(loops, (64, 64)), 1).flops == 3 * 5 * 2 * 64**3


def test_a_loop_whose_end_the_data_decides_counts_as_often_as_one_is_told():
    def loop(x, end):
        return jax.lax.fori_loop(0, end[0].astype(int), lambda i, x: jnp.tanh(x @ x), x)

    text = compiled(loop, (64, 64), (1,))
    assert [hlo.analyze(text, 1, turns).flops for turns in (1, 7)] == [2 * 64**3, 7 * 2 * 64**3]


def test_a_loop_of_two_turns_in_one_counts_half_as_often():
    text = """
%cond (p: (u32[], f32[8,8])) -> pred[] {
  %end = u32[] constant(8)
  %p = (u32[], f32[8,8]{1,0}) parameter(0)
  %i = u32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %end), direction=LT
}

%body (q: (u32[], f32[8,8])) -> (u32[], f32[8,8]) {
  %two = u32[] constant(2)
  %q = (u32[], f32[8,8]{1,0}) parameter(0)
  %j = u32[] get-tuple-element(%q), index=0
  %x = f32[8,8]{1,0} get-tuple-element(%q), index=1
  %y = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %next = u32[] add(%j, %two)
  ROOT %t = (u32[], f32[8,8]{1,0}) tuple(%next, %y)
}

ENTRY %main (a: (u32[], f32[8,8])) -> (u32[], f32[8,8]) {
  %a = (u32[], f32[8,8]{1,0}) parameter(0)
  ROOT %w = (u32[], f32[8,8]{1,0}) while(%a), condition=%cond, body=%body
}
"""
    assert hlo.analyze(text, 1).flops == 4 * 2 * 8**3


def test_a_collective_that_passes_through_a_loop_is_one():
    piece = "  ROOT %g = f32[8]{0} all-gather(%x), channel_id=7, replica_groups={{0,1}}\n"
    text = "ENTRY %m (x: f32[4]) -> f32[8] {\n  %x = f32[4]{0} parameter(0)\n" + piece.replace(
        "ROOT ", ""
    )
    text += piece.replace("%g", "%h") + "}"
    assert len(hlo.analyze(text, 2).collectives) == 1


def test_collectives_of_shard_map_count_one_by_one_though_they_share_a_channel():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))

    def exchange(x):
        columns = jax.lax.all_to_all(x, "x", split_axis=0, concat_axis=1, tiled=True)
        return jax.lax.all_gather(jnp.tanh(columns), "x", tiled=True)

    function = jax.shard_map(exchange, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    collectives = hlo.analyze(compiled(function, (64, 8)), 8).collectives
    assert {c.kind: c.bytes for c in collectives} == {"all-to-all": 256, "all-gather": 2048}


@pytest.mark.parametrize(
    "parts, flops", [(SCORES, 2 * 32 * 1024 * 1024 * 128), (QUERIES, 2 * 1024 * 4096 * 32 * 128)]
)
def test_products_that_the_tpu_compiler_writes_as_convolutions_count_without_their_padding(
    parts, flops
):
    assert hlo.analyze(product(*parts), 1).flops == flops


@pytest.mark.parametrize("rows", ["", "3,"])
def test_attention_by_a_kernel_counts_its_products(rows):
    """With and without the rows of the batch in front of the heads."""
    text = """
ENTRY %main (q: bf16[4,512,64], k: bf16[2,768,64]) -> bf16[4,512,64] {
  %q = bf16[4,512,64]{2,1,0} parameter(0)
  %k = bf16[2,768,64]{2,1,0} parameter(1)
  ROOT %splash_mha_dq_no_residuals.1 = bf16[4,512,64]{2,1,0} custom-call(%q, %k), \
custom_call_target="tpu_custom_call"
}
"""
    text = text.replace("bf16[", f"bf16[{rows}")
    assert hlo.analyze(text, 1).flops == (3 if rows else 1) * 3 * 2 * 4 * 512 * 768 * 64


def test_what_lies_in_the_fast_memory_is_not_read_from_hbm():
    assert hlo.analyze(product(*SCORES), 1).hbm_bytes == 32 * 1024 * 128 * 2 + 32 * 1024 * 1024 * 4


def test_a_loop_that_reads_slices_moves_its_operand_once():
    def total(xs):
        return jax.lax.scan(lambda sofar, x: (sofar + jnp.tanh(x), None), jnp.zeros(1000), xs)[0]

    moved = hlo.analyze(compiled(total, (100, 1000)), 1).hbm_bytes
    assert moved == pytest.approx(
        3 * 100 * 1000 * 4, rel=0.5
    )  # a slice, the sum before and the sum after, each turn


def test_collectives_count_their_chips_bytes_and_turns():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    stacked = NamedSharding(mesh, P(None, "fsdp", None))

    def layers(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    text = compiled(
        layers,
        (16, 64),
        (6, 64, 64),
        in_shardings=(NamedSharding(mesh, P("fsdp")), stacked),
        out_shardings=None,
    )
    gathers = [c for c in hlo.analyze(text, 8).collectives if c.times == 6]
    assert [(c.kind, c.chips, c.bytes) for c in gathers] == [("all-gather", 8, 64 * 64 * 4)]
    assert gathers[0].sent_bytes == 64 * 64 * 4 * 7 / 8


@pytest.mark.parametrize(
    "groups, chips",
    [
        ("replica_groups=mesh['a'=8,'b'=4] {'b'}", 4),
        ("replica_groups=[8,4]<=[32]", 4),
        ("replica_groups={{0,1},{2,3}}", 2),
        ("replica_groups={}", 32),
    ],
)
def test_every_way_of_writing_who_takes_part(groups, chips):
    head = "ENTRY %m (x: f32[8]) -> f32[8] {\n  %x = f32[8]{0} parameter(0)\n"
    text = f"{head}  ROOT %r = f32[8]{{0}} all-reduce(%x), {groups}\n}}"
    (collective,) = hlo.analyze(text, 32).collectives
    assert (collective.chips, collective.bytes, collective.times) == (chips, 32, 1)
