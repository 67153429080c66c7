"""A copy of any view is the view, whatever its strides."""

import jax
import ml_dtypes
import numpy as np
import pytest

from vlm_jax.hub.tensors import transpose
from vlm_jax.hub.tensors.transpose import copy_into, empty_aligned

BASE = np.arange(6 * 70 * 40, dtype=np.float32).reshape(6, 70, 40)
VIEWS = {
    "as it lies": BASE,
    "a transposed matrix": BASE[0].T,
    "heads out of rows": BASE.reshape(420, 40).T.reshape(40, 6, 70),
    "heads out of columns": BASE[0].T.reshape(8, 5, 70),
    "all axes turned": BASE.transpose(2, 1, 0),
    "axes that do not lie one in the other": BASE.transpose(1, 0, 2),
    "a slice of a transposed matrix": BASE[0].T[3:9, 1::2],
    "backwards": BASE[0].T[::-1],
    "a vector": BASE[0, 0],
    "a number": BASE[0, 0, 0, ...],
    "nothing": BASE[:0].T,
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_a_copy_is_the_view(view, dtype):
    target = np.full(view.shape, -1, dtype)
    copy_into(target, view)
    np.testing.assert_array_equal(target, view.astype(dtype))


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_bfloat16_becomes_the_float32_of_the_same_value(view):
    numbers = (view.astype(np.float32) / 7 - 300).astype(ml_dtypes.bfloat16)
    target = empty_aligned(view.shape, np.float32)
    copy_into(target, numbers)
    np.testing.assert_array_equal(target, numbers.astype(np.float32))


@pytest.mark.parametrize(
    "name", ["a transposed matrix", "heads out of rows", "heads out of columns"]
)
def test_transposed_tensors_are_copied_in_strips(name):
    assert transpose._as_matrices(np.empty(VIEWS[name].shape), VIEWS[name]) is not None


@pytest.mark.parametrize("shape", [(), (3,), (5, 7), (0, 4)])
def test_an_aligned_array_is_taken_over_by_jax(shape):
    array = empty_aligned(shape, np.float32)
    array[...] = 2
    assert array.ctypes.data % 64 == 0 or not array.size
    np.testing.assert_array_equal(jax.device_put(array), np.full(shape, 2, np.float32))
    big = empty_aligned((1024, 1024), np.float32)
    assert jax.device_put(big).unsafe_buffer_pointer() == big.ctypes.data
