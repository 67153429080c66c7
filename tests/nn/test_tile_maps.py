"""Maps of tiles in the model: every slot of the sequence holds the image at its place."""

from dataclasses import replace

import einops
import jax
import numpy as np

from vlm_jax.data import text, tiling
from vlm_jax.data.batching import stack_fields
from vlm_jax.nn.parts import find_part
from vlm_jax.nn.vlm import VLM
from vlm_jax.structs import NEWLINE, NO_IMAGE, Batch
from vlm_jax.testing import random_params, tiny


def test_a_slot_holds_the_patch_at_its_place():
    """Images of two grids in a batch; the larger map is resized, and tiles leave no trace."""
    # Without an encoder a token is its patch, which the projector reduces to its mean.
    vision = replace(
        tiny().vision,
        kind="none",
        positions="none",
        patch_size_px=4,
        tiles=4,
        tile_grids=((1, 2), (2, 2)),
        max_map_tiles=2,
    )
    cfg = tiny(vision=vision)
    params = random_params(cfg)
    linear = params["projector"]["linear"]
    linear["kernel"] = np.full_like(linear["kernel"], 1 / vision.patch_dim)
    linear["bias"] = np.zeros_like(linear["bias"])

    rng = np.random.default_rng(0)
    images = [rng.normal(size=(*shape, 3)).astype(np.float32) for shape in ((16, 32), (32, 32))]
    rows = []
    for image in images:
        row = text.pack_row(cfg, [([10, 11], [12])], tiling.describe_tiles(image, vision))
        rows.append(row | {"images": tiling.stack_views([image], vision)})
    batch = Batch(**stack_fields(rows))
    read = jax.jit(VLM(cfg.model).apply, static_argnames="method")
    inputs = np.asarray(read({"params": params}, batch, method=VLM.decoder_inputs).x)

    index = batch.image_token_index
    (newline,) = np.unique(inputs[index == NEWLINE], axis=0)
    np.testing.assert_array_equal(newline, params["projector"]["newline"])
    embedding = params["decoder"]["embedding"]["table"]
    is_text = index == NO_IMAGE
    np.testing.assert_array_equal(inputs[is_text], embedding[batch.tokens[is_text]])

    for row, (image, shape) in enumerate(zip(images, [(4, 8), (5, 5)])):
        means = einops.reduce(image, "(h p) (w q) d -> h w", "mean", p=4, q=4)
        expected = jax.image.resize(means, shape, "bilinear", antialias=False)
        after_thumbnail = inputs[row, index[row] != NO_IMAGE, 0][cfg.image_tokens :]
        found = after_thumbnail.reshape(shape[0], shape[1] + 1)[:, :-1]
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_vector_that_ends_a_row_is_trained_with_the_projector():
    assert find_part(("projector", "newline")) == "projector"
