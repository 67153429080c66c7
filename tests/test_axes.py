"""Logical axes and their mesh axes: a misspelled letter is an error, never 'replicated'."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from vlm_jax import axes, config, sharding
from vlm_jax.config import UserError


def mesh(data=2, fsdp=2, tensor=2):
    return axes.make_mesh(config.Mesh(data, fsdp, tensor))


def parameter(letters, *shape, **sizes):
    return axes.parameter_spec(letters, shape, mesh(**sizes))


def activation(letters, *shape, **sizes):
    return axes.activation_spec(letters, shape, mesh(**sizes))


@pytest.mark.parametrize("spec", [parameter, activation])
@pytest.mark.parametrize("letters", ["Z", "d", "DN", "B?"])
def test_an_unknown_letter_is_a_key_error(spec, letters):
    with pytest.raises(KeyError):
        spec(letters, 8)


@pytest.mark.parametrize("spec", [parameter, activation])
def test_a_letter_too_few_is_an_error(spec):
    with pytest.raises(ValueError, match="1 letters for an array of shape"):
        spec("D", 8, 8)


def test_the_width_of_a_parameter_is_split_over_fsdp_and_that_of_an_activation_is_not():
    assert parameter("D F", 8, 8) == PartitionSpec("fsdp", "tensor")
    assert activation("B S D", 8, 6, 8) == PartitionSpec(("data", "fsdp"), None, None)


def test_heads_vocabulary_and_hidden_numbers_are_split_over_tensor_in_both():
    for letter in "NKFV":
        assert parameter(f"D {letter}", 8, 8) == PartitionSpec("fsdp", "tensor")
        assert activation(f"B S {letter}", 8, 6, 8) == PartitionSpec(
            ("data", "fsdp"), None, "tensor"
        )


@pytest.mark.parametrize(
    "letters, expected",
    [
        ("E D", ("fsdp", None)),
        ("N F", ("tensor", None)),
        ("L D N H", (None, "fsdp", "tensor", None)),
    ],
)
def test_a_mesh_axis_is_used_once_by_the_first_letter_that_wants_it(letters, expected):
    assert parameter(letters, *[8] * len(expected)) == PartitionSpec(*expected)


def test_what_the_mesh_does_not_divide_is_whole_and_leaves_the_axis_to_the_next_letter():
    assert parameter("D K H", 8, 1, 4) == PartitionSpec("fsdp", None, None)
    assert parameter("V D", 301, 8) == PartitionSpec(None, "fsdp")
    assert parameter("E D", 7, 8) == PartitionSpec(None, "fsdp")
    assert activation("B S D", 6, 4, 8) == PartitionSpec(
        None, None, None
    )  # 6 rows on 2 x 2 devices


def test_constrain_pins_to_the_mesh():
    x = jnp.zeros((8, 4, 6))
    with jax.set_mesh(mesh()):
        y = jax.jit(lambda x: axes.constrain(x + 1, "B S F"))(x)
    assert y.sharding.spec == PartitionSpec(("data", "fsdp"), None, "tensor")
    assert {shard.data.shape for shard in y.addressable_shards} == {(2, 4, 3)}
    np.testing.assert_array_equal(y, 1)


def test_constrain_refuses_an_unknown_letter_on_a_mesh():
    with jax.set_mesh(mesh()), pytest.raises(KeyError):
        jax.jit(lambda x: axes.constrain(x, "B Z"))(jnp.zeros((8, 4)))


def test_constrain_does_nothing_without_a_mesh():
    x = jnp.zeros((8, 4))
    assert axes.constrain(x, "B D") is x
    assert "sharding" not in str(jax.make_jaxpr(lambda x: axes.constrain(x, "B D"))(x))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x @ self.param("kernel", axes.with_axes(nn.initializers.ones, "D F"), (4, 4)), None


class Stacked(nn.Module):
    @nn.compact
    def __call__(self, x):
        metadata = {nn.meta.PARTITION_NAME: "L"}
        loop = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
            metadata_params=metadata,
        )
        return loop(name="loop")(x, None)[0]


def test_a_loop_over_depth_puts_l_in_front_and_the_sharding_follows():
    boxed = jax.eval_shape(Stacked().init, jax.random.key(0), jnp.zeros((2, 4)))["params"]
    assert boxed["loop"]["kernel"].letters == "L D F"
    assert boxed["loop"]["kernel"].value.shape == (3, 4, 4)
    shardings = sharding.parameter_shardings(boxed, mesh())
    assert shardings["loop"]["kernel"].spec == PartitionSpec(None, "fsdp", "tensor")


def test_letters_must_match_the_shape_of_the_parameter():
    with pytest.raises(ValueError, match="letters 'D' for a parameter of shape"):
        axes.with_axes(nn.initializers.ones, "D")(jax.random.key(0), (2, 2))


def test_rows_of_a_batch_are_split_over_data_and_fsdp():
    rows = jax.device_put(np.arange(8), sharding.row_sharding(mesh()))
    assert {shard.data.shape for shard in rows.addressable_shards} == {(2,)}


@pytest.mark.parametrize(
    "cfg, sizes", [((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((1, 4, 2), (1, 4, 2))]
)
def test_the_mesh_takes_all_devices(cfg, sizes):
    assert tuple(mesh(*cfg).shape[name] for name in axes.MESH_AXES) == sizes


def test_a_platform_that_is_not_there_is_refused_in_a_sentence(monkeypatch):
    def devices():
        raise RuntimeError("Unable to initialize backend 'tpu'")

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(UserError, match="backend 'tpu'"):
        mesh()


@pytest.mark.parametrize(
    "sizes",
    [
        (3, 1, 1),
        (2, 2, 1),
        (-1, -1, 1),
        (-1, 3, 1),
        (16, 1, 1),
        (0, 1, -1),
        (-2, -4, 1),
        (-1, -2, -2),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused_with_its_fields(sizes):
    with pytest.raises(UserError, match="mesh.data x mesh.fsdp x mesh.tensor .* 8 device"):
        mesh(*sizes)


@pytest.mark.parametrize(
    ("devices", "sizes", "message"),
    [
        (4, (3, 1, 1), "choose 4 x 1 x 1, 2 x 2 x 1, 2 x 1 x 2, 1 x 4 x 1, 1 x 1 x 4, 1 x 2 x 2."),
        (64, (16, 8, 1), "choose 16 x 4 x 1, 8 x 8 x 1, 64 x 1 x 1, "),
    ],
)
def test_the_meshes_that_would_fit_are_named_the_nearest_first(devices, sizes, message):
    with pytest.raises(UserError) as error:
        config.Mesh(*sizes).sizes(devices)
    assert message in str(error.value)
    assert str(error.value).endswith(", or another.") == (devices == 64)


VOCABS = {"a split vocabulary": 12, "one that does not divide": 13, "fewer rows than ids": 4}


@pytest.mark.parametrize("vocab", VOCABS.values(), ids=VOCABS)
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 4, 2), (4, 2, 1)])
def test_a_lookup_over_the_mesh_is_take_and_so_is_its_gradient(sizes, vocab):
    rng, shape = np.random.default_rng(0), mesh(*sizes)
    table, ids = (
        jnp.asarray(rng.normal(size=(vocab, 8)), jnp.float32),
        jnp.asarray(rng.integers(0, vocab, (8, 5))),
    )
    weights = jnp.asarray(rng.normal(size=(8, 5, 8)), jnp.float32)

    def compiled(lookup):
        total = jax.jit(
            jax.value_and_grad(lambda table, ids: jnp.sum(lookup(table, ids) * weights))
        )
        return total(table, jax.device_put(ids, sharding.row_sharding(shape)))

    with jax.set_mesh(shape):
        actual = compiled(lambda table, ids: axes.embedding_lookup(table, ids, "V D"))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        actual,
        compiled(lambda t, i: t[i]),
    )


def test_a_lookup_never_gathers_the_table_nor_its_gradient():
    shape = mesh(1, 8, 1)
    table = jax.ShapeDtypeStruct(
        (512, 64), jnp.float32, sharding=NamedSharding(shape, PartitionSpec("tensor", "fsdp"))
    )
    ids = jax.ShapeDtypeStruct((8, 5), jnp.int32, sharding=sharding.row_sharding(shape))

    def total(table, ids):
        return jnp.sum(jnp.square(axes.embedding_lookup(table, ids, "V D")))

    with jax.set_mesh(shape):
        program = jax.jit(jax.grad(total), out_shardings=table.sharding).lower(table, ids).compile()
    assert "all-to-all" in program.as_text()
    assert "f32[512,64]" not in program.as_text()


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (8, 1, 1)])
def test_sums_over_rows_are_split_like_the_parameter(sizes):
    shape = mesh(*sizes)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 13, 16)), jnp.float32)
    with jax.set_mesh(shape):
        spec = axes.parameter_spec("V D", x.shape[1:], shape)
        total = jax.jit(lambda x: axes.sum_rows(x, "V D"))(
            jax.device_put(x, sharding.row_sharding(shape))
        )
    assert total.sharding.is_equivalent_to(NamedSharding(shape, spec), 2)
    np.testing.assert_allclose(total, np.sum(x, axis=0), rtol=1e-5, atol=1e-6)


def test_a_single_row_is_looked_up_on_a_mesh_that_does_not_divide_it():
    with jax.set_mesh(mesh(4, 2, 1)):
        np.testing.assert_array_equal(
            axes.embedding_lookup(jnp.eye(4), jnp.array([[2, 1]]), "V D"), np.eye(4)[[[2, 1]]]
        )
