"""What the products of matrices in one training step cost, part by part; everything else is under a percent.

A product of n tokens with a kernel takes 2 n size FLOPs forward, as many for its weights' gradient and as many for its
input's (Kaplan et al. 2020, section 2.1). The last two are there only where they are needed: a frozen kernel has no
gradient, and nothing flows back to where nothing trained lies. Attention counts every pair of query and key, masked
ones too, as the program computes them. The output head counts as if all text of a row were scored. What remat computes
again is no work of the model and not in it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from flax import traverse_util
from flax.linen import meta

from vlm_jax.config import Experiment
from vlm_jax.nn.models import abstract_params
from vlm_jax.nn.tiled_vit import TOKEN_MULTIPLE
from vlm_jax.train import optim

Path = tuple[str, ...]


@dataclass(frozen=True)
class Tokens:
    """Tokens of one training row at every stage of the flow; of all its images where it says so."""

    images: int
    tiles: int  # J: pictures of each that the encoder reads, the thumbnail among them
    patches: int  # P of each tile
    encoder: int  # that attend to each other in the encoder: class tokens and filling included
    encoded: int  # runs of the encoder over so many
    features: int  # that reach the projector, of all images
    projected: int  # that leave it, of all images
    sequence: int  # S: rows of the decoder
    memory: int  # that cross-attention reads, of all images


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


@dataclass(frozen=True)
class Gradients:
    """Where gradients flow; a loop over depth is differentiated as a whole."""

    trained: frozenset[str]  # parts
    features: bool  # to what leaves the encoder
    image: bool  # to what leaves the projector
    decoder: bool  # through the decoder's blocks
    cross: bool  # to the keys and values of cross-attention


def token_flow(cfg: Experiment) -> Tokens:
    """Tokens of a row with as many images as it has room for."""
    vision, together, tiles = cfg.vision, bool(cfg.vision.tile_layouts), cfg.vision.pictures
    if not cfg.fusion.has_images:
        return Tokens(0, 0, 0, 0, 0, 0, 0, cfg.row_length, 0)
    images, patches = cfg.data.images_per_row, math.prod(vision.grid)
    encoder = patches + int(vision.kind == "vit" and vision.class_token)
    if together:
        encoder = tiles * math.ceil(encoder / TOKEN_MULTIPLE) * TOKEN_MULTIPLE
    read = vision.cut_tiles if cfg.fusion.kind == "hybrid" else tiles
    return Tokens(
        images=images,
        tiles=tiles,
        patches=patches,
        encoder=encoder,
        encoded=images if together else images * tiles,
        features=images * tiles * (patches + vision.extra_tokens),
        projected=images * tiles * cfg.image_tokens,
        sequence=cfg.row_length,
        memory=images * read * cfg.image_tokens if cfg.fusion.image_in_memory else 0,
    )


def gradient_flow(cfg: Experiment) -> Gradients:
    trained = optim.trained_parts(cfg.optim)
    if not cfg.fusion.has_images:
        trained &= {"decoder"}
    features = "vision" in trained and cfg.vision.kind == "vit"
    image = features or "projector" in trained
    cross = cfg.fusion.image_in_memory and (image or "cross_attention" in trained)
    return Gradients(
        trained=frozenset(trained),
        features=features,
        image=image,
        decoder="decoder" in trained or cross or (cfg.fusion.image_in_sequence and image),
        cross=cross,
    )


def train_flops(cfg: Experiment) -> float:
    """FLOPs of one optimizer step over the global batch: forward, and backward as far as anything is trained."""
    return sum((flops.total for flops in flops_by_part(cfg).values()), 0.0)


def flops_by_part(cfg: Experiment) -> dict[str, Flops]:
    """FLOPs of one optimizer step over the global batch, by `optim.PARTS`."""
    tokens, gradients = token_flow(cfg), gradient_flow(cfg)
    found = dict.fromkeys(optim.PARTS, Flops())
    for path, flops in (*_products(cfg, tokens, gradients), *_attentions(cfg, tokens, gradients)):
        found[optim.part_of(path)] += flops.times(cfg.train.batch_size)
    return found


def _products(
    cfg: Experiment, tokens: Tokens, gradients: Gradients
) -> Iterator[tuple[Path, Flops]]:
    """Every kernel with the FLOPs of one row."""
    shapes = traverse_util.flatten_dict(meta.unbox(abstract_params(cfg)))
    for path, kernel in shapes.items():
        is_head = path[:2] == ("decoder", "embedding") and cfg.decoder.tie_word_embeddings
        if path[-1] != "kernel" and not is_head:
            continue
        forward = 2.0 * _rows(cfg, path, tokens) * math.prod(kernel.shape)
        back = (optim.part_of(path) in gradients.trained) + _has_input_gradient(path, gradients)
        yield path, Flops(forward, forward * back)


def _rows(cfg: Experiment, path: Path, tokens: Tokens) -> int:
    """How many tokens of a row a kernel reads."""
    reads_memory = "cross" in path and path[-2] in ("key", "value")
    if path[:2] in (("decoder", "embedding"), ("decoder", "free_head")):
        return cfg.data.text_length
    if path[0] == "decoder":
        return tokens.memory if reads_memory else tokens.sequence
    if path[0] == "projector":
        if cfg.projector.kind == "resampler" and path[1] != "linear":
            queries = tokens.projected
            return tokens.features + queries if reads_memory else queries
        return (
            tokens.projected
            if cfg.projector.kind in ("pixel_shuffle", "average_pool")
            else tokens.features
        )
    if "patch_embed" in path:
        return tokens.images * tokens.tiles * tokens.patches
    if path[1] in ("pool", "classifier"):  # no projector reads them
        return 0
    return tokens.encoded * tokens.encoder


def _has_input_gradient(path: Path, gradients: Gradients) -> bool:
    if path[0] == "vision":
        return "vision" in gradients.trained and "patch_embed" not in path
    if path[0] == "projector":
        return gradients.features if path[1] in ("linear", "linear_1") else gradients.image
    if "cross" in path and path[-2] in ("key", "value"):
        return gradients.image
    return gradients.decoder


def _attentions(
    cfg: Experiment, tokens: Tokens, gradients: Gradients
) -> Iterator[tuple[Path, Flops]]:
    """The two products of every attention, scores and mix, with the FLOPs of one row."""
    vision, decoder, projector = cfg.vision, cfg.decoder, cfg.projector
    if tokens.images and vision.kind == "vit":
        pairs = tokens.encoded * tokens.encoder**2 * (vision.depth + vision.num_global_layers)
        back = 2 * gradients.features
        yield ("vision",), _attention(pairs * vision.heads * vision.head_width, back)
    if tokens.images and projector.kind == "resampler":
        keys = tokens.features // (tokens.images * tokens.tiles) + projector.queries
        pairs = tokens.projected * keys * projector.depth
        yield ("projector",), _attention(pairs * decoder.width, 2 * gradients.image)
    names = [name for block in cfg.fusion.sublayers(decoder.depth) for name in block]
    for name, keys in (("self", tokens.sequence), ("cross", tokens.memory)):
        size = names.count(name) * tokens.sequence * keys * decoder.heads * decoder.head_width
        to_keys = gradients.decoder if name == "self" else gradients.cross
        yield ("decoder", name), _attention(size, gradients.decoder + to_keys)


def _attention(size: int, back: int) -> Flops:
    """Of queries x keys x heads x numbers of a head; `back`: gradients to queries and to keys and values, 0 to 2."""
    return Flops(4.0 * size, 4.0 * size * back)
