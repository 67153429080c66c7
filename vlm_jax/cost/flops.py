"""Matmul FLOPs of one training step, by model part (everything else is under 1 %).

The forward pass is traced, and its matrix products and convolutions are counted by the modules
that they belong to, so that no module is described a second time here. A product of n tokens with
a kernel takes 2 * n * size FLOPs forward and as many for the gradient of each of its two inputs
(Kaplan et al. 2020, section 2.1). A gradient is counted only if it is needed: a frozen kernel has
none, and nothing flows back to where nothing is trained.

Attention counts every pair of query and key, masked pairs too, as the program computes them. The
output head counts as if all text of a row were scored. Remat recomputation is not counted: it is
not work of the model.
"""

import functools
import math
from collections import defaultdict
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import traverse_util
from flax.linen import meta
from jax.extend import core
from jax.interpreters import partial_eval

from vlm_jax import axes
from vlm_jax.config import Experiment, Model
from vlm_jax.config.tile_maps import has_maps_in_memory, map_memory_length
from vlm_jax.cost.scan import carried_inputs
from vlm_jax.nn.models import abstract_params
from vlm_jax.nn.parts import PARTS, Path, find_part, trained_paths
from vlm_jax.nn.tiled_vit import TOKEN_MULTIPLE
from vlm_jax.nn.vlm import VLM, example_batch

NO_MESH = jax.sharding.AbstractMesh((), ())


@dataclass(frozen=True)
class Tokens:
    """Tokens of one training row at every stage of the model; of all its images where noted."""

    images: int
    tiles: int  # J: encoder inputs per image, its thumbnail included
    patches: int  # P of each tile
    encoder: int  # sequence length in the encoder: class tokens and padding included
    features: int  # input of the projector, all images
    projected: int  # output of the projector, all images
    sequence: int  # S: sequence length in the decoder
    memory: int  # keys of cross-attention, all images


@dataclass(frozen=True)
class Flops:
    forward: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def times(self, count: float) -> "Flops":
        return Flops(self.forward * count, self.backward * count)


def token_flow(cfg: Experiment) -> Tokens:
    """Tokens of a row with as many images as it has room for."""
    vision, tiles = cfg.vision, cfg.vision.pictures
    if not cfg.fusion.has_images:
        return Tokens(0, 0, 0, 0, 0, 0, cfg.row_length, 0)
    images, patches = cfg.data.images_per_row, math.prod(vision.grid)
    if vision.is_native:
        # The patches of all images are one sequence.
        return Tokens(
            images=images,
            tiles=1,
            patches=vision.most_patches,
            encoder=cfg.patches_per_row,
            features=cfg.patches_per_row,
            projected=cfg.image_tokens_per_row,
            sequence=cfg.row_length,
            memory=cfg.image_tokens_per_row if cfg.fusion.image_in_memory else 0,
        )
    encoder = patches + vision.prefix_tokens
    if vision.tile_layouts:
        encoder = tiles * math.ceil(encoder / TOKEN_MULTIPLE) * TOKEN_MULTIPLE
    tiles_in_memory = vision.cut_tiles if cfg.fusion.splits_views else tiles
    keys = tiles_in_memory * cfg.image_tokens
    if has_maps_in_memory(vision, cfg.fusion):
        keys = map_memory_length(vision, cfg.projector, cfg.fusion)
    return Tokens(
        images=images,
        tiles=tiles,
        patches=patches,
        encoder=encoder,
        features=images * tiles * (patches + vision.extra_tokens),
        projected=images * tiles * cfg.image_tokens,
        sequence=cfg.row_length,
        memory=images * keys if cfg.fusion.image_in_memory else 0,
    )


def train_flops(cfg: Experiment) -> float:
    """FLOPs of one optimizer step over the global batch, forward and backward."""
    return sum((flops.total for flops in flops_by_part(cfg).values()), 0.0)


def flops_by_part(cfg: Experiment) -> dict[str, Flops]:
    """FLOPs of one optimizer step over the global batch, by part (`nn.parts.PARTS`)."""
    paths = traverse_util.flatten_dict(meta.unbox(abstract_params(cfg)))
    trained = frozenset(trained_paths(paths, cfg.optim))
    sizes = cfg.row_length, cfg.data.text_length, cfg.data.images_per_row, cfg.patches_per_row
    row = _row_flops(cfg.model, *sizes, trained)
    return {part: row.get(part, Flops()).times(cfg.train.batch_size) for part in PARTS}


@functools.cache
def _row_flops(
    model: Model,
    length: int,
    text_length: int,
    images: int,
    patches: int | None,
    trained: frozenset[Path],
) -> dict[str, Flops]:
    """FLOPs of one training row, by part."""
    program, inputs = _row_program(model, length, text_length, images, patches)
    has_gradient = [path in trained for path in inputs]
    flops = defaultdict(Flops)
    _count(program, has_gradient, flops)
    return dict(flops)


# Cached without the trained parts, which the program does not depend on.
@functools.cache
def _row_program(
    model: Model, length: int, text_length: int, images: int, patches: int | None
) -> tuple[core.Jaxpr, list[tuple[str, ...] | None]]:
    """Forward pass of one training row, with the path of each input (None: of the batch)."""
    params = traverse_util.flatten_dict(meta.unbox(abstract_params(model)))

    def forward(params, batch):
        variables = {"params": traverse_util.unflatten_dict(params)}
        hidden, _ = VLM(model).apply(variables, batch, method="hidden")
        return VLM(model).apply(variables, hidden[:, :text_length], method="head")

    batch = jax.eval_shape(lambda: example_batch(model, length, 1, images, patches))
    # Kernels of accelerators hide their products, so the program for a CPU is counted.
    # JAX sets a mesh of another size only after the current one is unset.
    with jax.sharding.use_abstract_mesh(NO_MESH), jax.sharding.use_abstract_mesh(axes.ABSTRACT_CPU):
        program = jax.make_jaxpr(forward)(params, batch).jaxpr
    program, _ = partial_eval.dce_jaxpr(program, [True] * len(program.outvars), instantiate=True)
    inputs = [*sorted(params), *[None] * len(jax.tree.leaves(batch))]
    return program, inputs


def _count(
    program: core.Jaxpr,
    has_gradient: list[bool],
    flops: dict[str, Flops],
    scope: str = "",
    times: int = 1,
) -> list[bool]:
    """Adds the products of a program to `flops`, by part; returns which outputs have gradients.

    Args:
      has_gradient: for each input, whether a trained parameter contributes to it.
      scope: names of the modules around the program.
      times: how often the program runs.
    """
    active = {x for x, flag in zip(program.invars, has_gradient, strict=True) if flag}

    def flags(values) -> list[bool]:
        return [not isinstance(x, core.Literal) and x in active for x in values]

    for equation in program.eqns:
        names = f"{scope}/{equation.source_info.name_stack}"
        outputs = _count_equation(equation, flags(equation.invars), flops, names, times)
        active |= {x for x, flag in zip(equation.outvars, outputs, strict=True) if flag}
    return flags(program.outvars)


def _count_equation(
    equation: core.JaxprEqn,
    has_gradient: list[bool],
    flops: dict[str, Flops],
    scope: str,
    times: int,
) -> list[bool]:
    """As `_count`, for one equation and all programs in it."""
    programs = list(core.jaxprs_in_params(equation.params))
    if equation.primitive.name.startswith("scatter"):
        # Its program combines two numbers, and does not take its inputs.
        programs = []
    if equation.primitive.name == "scan":
        has_gradient = _loop_gradients(equation, has_gradient, scope)
        return _count(programs[0], has_gradient, flops, scope, times * equation.params["length"])
    if len(programs) > 1:
        raise NotImplementedError(f"FLOPs of {equation.primitive.name} in {scope} are not counted")
    if programs:
        return _count(programs[0], has_gradient, flops, scope, times)
    size = _multiplications(equation)
    if size:
        # The gradient of each factor is a product of the same size.
        product = Flops(2.0 * size, 2.0 * size * sum(has_gradient))
        flops[_part(scope)] += product.times(times)
    is_float = [jnp.issubdtype(x.aval.dtype, jnp.inexact) for x in equation.outvars]
    return [any(has_gradient) and flag for flag in is_float]


def _loop_gradients(scan: core.JaxprEqn, has_gradient: list[bool], scope: str) -> list[bool]:
    """Returns which inputs of a loop's body have gradients in any of its iterations.

    A loop is differentiated as a whole: a carry with a gradient after one iteration has it in all.
    """
    (body,) = core.jaxprs_in_params(scan.params)
    carried = carried_inputs(scan.params)
    while True:
        outputs = _count(body, has_gradient, defaultdict(Flops), scope)
        carries = [old or new for old, new in zip(has_gradient[carried], outputs)]
        if carries == has_gradient[carried]:
            return has_gradient
        has_gradient = [*has_gradient[: carried.start], *carries, *has_gradient[carried.stop :]]


def _multiplications(equation: core.JaxprEqn) -> int:
    """Scalar multiplications of a matrix product or a convolution; 0 for other equations."""
    name, params = equation.primitive.name, equation.params
    if name not in ("dot_general", "conv_general_dilated"):
        return 0
    left, right = [x.aval.shape for x in equation.invars]
    outputs = math.prod(equation.outvars[0].aval.shape)
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return outputs * math.prod(left[axis] for axis in contracted)
    output_features = right[params["dimension_numbers"].rhs_spec[0]]
    return outputs * math.prod(right) // output_features


def _part(scope: str) -> str:
    """Returns the part of a module, given the scope "VLM.hidden/decoder/blocks/..." of its call."""
    names = [name.partition(".")[0] for name in scope.split("/")]
    return find_part(tuple(name for name in names if name not in ("", VLM.__name__)))
