"""CLIP in OpenCLIP's format: open_clip_config.json, and projections stored as (in, out).

The reference is open_clip, src/open_clip/model.py and transformer.py.
"""

from collections.abc import Collection
from dataclasses import replace

from vlm_jax.config import (
    CheckpointError,
    Contrastive,
    Decoder,
    Transformer,
    Vision,
)
from vlm_jax.hub.families.decoders.gpt2 import norm_rows
from vlm_jax.hub.families.encoders.vit import (
    block_rows,
    fused_rows,
    mlp_ratio,
    patch_rows,
    side,
)
from vlm_jax.hub.families.family import (
    Family,
    Json,
    get_or,
    lookup,
    positive_int,
    positive_number,
    reject_unless,
)
from vlm_jax.hub.families.table import Row, Target, row

BLOCK = {"self_norm": "ln_1", "mlp_norm": "ln_2", "mlp/up": "mlp.c_fc", "mlp/down": "mlp.c_proj"}
EPS = 1e-5
POOLED = {"argmax": "largest_id", "last": "last"}
# Supported values of keys that would change the architecture.
PLAIN = {
    "ls_init_value": (None,),
    "norm_kwargs": (None, {}),
    "act_kwargs": (None, {}),
    "final_ln_after_pool": (False,),
}
PLAIN_VISION = PLAIN | {
    "timm_model_name": (None,),
    "attentional_pool": (False,),
    "no_ln_pre": (False,),
    "pos_embed_type": ("learnable",),
    "pool_type": ("tok",),
}
PLAIN_TEXT = PLAIN | {
    "hf_model_name": (None,),
    "embed_cls": (False,),
    "proj_type": ("linear",),
    "proj_bias": (False,),
}


def config_from_hf(config: Json, names: Collection[str]) -> Contrastive:
    model = get_or(config, "model_cfg", {})
    vision, text = get_or(model, "vision_cfg", {}), get_or(model, "text_cfg", {})
    for tower, plain in ((vision, PLAIN_VISION), (text, PLAIN_TEXT)):
        for key, allowed in plain.items():
            reject_unless(tower, key, *allowed)
    activation = "quick_gelu" if get_or(model, "quick_gelu", False) else "gelu"
    return Contrastive(
        vision=replace(vision_from_hf(vision), activation=activation),
        text=replace(text_from_hf(text), activation=activation),
        embed_width=positive_int(model, "embed_dim", 512),
        causal=not get_or(text, "no_causal_mask", False),
        text_pool=lookup(text, "pool_type", POOLED, "argmax"),
    )


def vision_from_hf(config: Json) -> Vision:
    width, layers = positive_int(config, "width", 768), get_or(config, "layers", 12)
    if isinstance(layers, list):
        raise CheckpointError(
            f"open_clip_config.json: layers {layers} describes a ResNet, which is not supported."
        )
    return Vision(
        width=width,
        depth=positive_int(config, "layers", 12),
        heads=width // positive_int(config, "head_width", 64),
        mlp_width=int(width * positive_number(config, "mlp_ratio", 4)),
        norm_eps=EPS,
        image_size_px=side(config, "image_size", 224),
        patch_size_px=side(config, "patch_size", 16),
        patch_bias=False,
        class_token=True,
        pre_norm=True,
        final_norm="pooled",
        pool="class",
    )


def text_from_hf(config: Json) -> Decoder:
    width = positive_int(config, "width", 512)
    return Decoder(
        width=width,
        depth=positive_int(config, "layers", 12),
        heads=positive_int(config, "heads", 8),
        mlp_width=int(width * positive_number(config, "mlp_ratio", 4)),
        norm_eps=EPS,
        vocab_size=positive_int(config, "vocab_size", 49408),
        positions="learned",
        max_positions=positive_int(config, "context_length", 77),
    )


def config_to_hf(cfg: Contrastive) -> Json:
    pool_types = {pool: pool_type for pool_type, pool in POOLED.items()}
    vision, text = tower_to_hf(cfg.vision), tower_to_hf(cfg.text)
    vision |= {
        "head_width": cfg.vision.head_width,
        "image_size": cfg.vision.image_size_px,
        "patch_size": cfg.vision.patch_size_px,
    }
    text |= {
        "heads": cfg.text.heads,
        "vocab_size": cfg.text.vocab_size,
        "context_length": cfg.text.max_positions,
        "no_causal_mask": not cfg.causal,
        "pool_type": pool_types[cfg.text_pool],
    }
    quick = cfg.vision.activation == "quick_gelu"
    return {
        "model_cfg": {
            "embed_dim": cfg.embed_width,
            "quick_gelu": quick,
            "vision_cfg": vision,
            "text_cfg": text,
        }
    }


def tower_to_hf(cfg: Transformer) -> Json:
    return {
        "width": cfg.width,
        "layers": cfg.depth,
        "mlp_ratio": mlp_ratio(cfg.width, cfg.mlp_width),
    }


def param_table(cfg: Contrastive) -> list[Row]:
    positions = (
        Target("vision/class_position", "1 D -> D"),
        Target("vision/patch_embed/positions"),
    )
    return [
        row("visual.class_embedding", "vision/class_token"),
        Row("visual.positional_embedding", positions),
        *patch_rows("visual.conv1", "vision/", cfg.vision),
        *norm_rows("visual.ln_pre", "vision/pre_norm"),
        *tower_rows("visual.", "vision/", cfg.vision),
        *norm_rows("visual.ln_post", "vision/final_norm"),
        row("visual.proj", "image_projection/kernel"),
        row("token_embedding.weight", "text/embedding/table"),
        row("positional_embedding", "text/position_embedding/table"),
        *tower_rows("", "text/", cfg.text),
        *norm_rows("ln_final", "text/final_norm"),
        row("text_projection", "text_projection/kernel"),
        row("logit_scale", "logit_scale", "-> 1"),
    ]


def tower_rows(hf: str, param: str, cfg: Transformer) -> list[Row]:
    blocks = f"{hf}transformer.resblocks"
    rows = block_rows(blocks, param, cfg, BLOCK)
    for layer in range(cfg.depth):
        rows += fused_rows(f"{blocks}.{layer}.attn", f"{param}blocks/layers/block_0/self", layer)
    return rows


RENAMES = ((r"^text\.", ""),)  # files whose text tower is a submodule
OPEN_CLIP = Family(
    "open_clip",
    config_from_hf,
    config_to_hf,
    param_table,
    RENAMES,
    config_file="open_clip_config.json",
    weights_file="open_clip_model.safetensors",
)
