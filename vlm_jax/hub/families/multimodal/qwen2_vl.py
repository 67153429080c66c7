"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: a ViT over patches of images at native resolution, and Qwen.

Wang et al. 2024 (Qwen2-VL, section 2.1), Bai et al. 2025 (Qwen2.5-VL, section 2.1) and Bai et al.
2025 (Qwen3-VL). Images only: a video is refused. The norm of the merger is the norm after the
encoder's last block.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from vlm_jax.config import (
    CHANNELS,
    CheckpointError,
    Decoder,
    Experiment,
    Fusion,
    PatchRope,
    Projector,
    Vision,
)
from vlm_jax.hub.families.decoders import llama
from vlm_jax.hub.families.decoders.gpt2 import norm_rows
from vlm_jax.hub.families.encoders.vit import KERNELS, side
from vlm_jax.hub.families.family import (
    ACTIVATIONS,
    HUB_ACTIVATIONS,
    Family,
    HfProcessor,
    Json,
    get_or,
    lookup,
    positive_int,
    positive_number,
    text_experiment,
)
from vlm_jax.hub.families.table import Row, Target, row

TOWER, MERGER = "visual.", "visual.merger."
EPS = 1e-6  # of the encoder's norms, in no file
# Of an image, by the processor's default; its settings may have another number.
MAX_PATCHES = 1280 * 4
SECTIONS = [16, 24, 24]  # of the text config, by default
TEXT_DEFAULTS = {  # of Qwen2VLTextConfig
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "max_window_layers": 80,
}
SHARED_DEFAULTS = {  # of both vision configs
    "depth": 32,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
QWEN2_DEFAULTS = {"embed_dim": 1280, "mlp_ratio": 4, "hidden_act": "quick_gelu"}
QWEN2_5_DEFAULTS = {
    "hidden_size": 3584,
    "intermediate_size": 3420,
    "hidden_act": "silu",
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
QKV = ("self/query", "self/key", "self/value")  # kernels of one tensor
# Parameters of a block -> their names in the files.
PLAIN_MLP = {"mlp/up": "mlp.fc1", "mlp/down": "mlp.fc2"}
GATED_MLP = {"mlp/gate": "mlp.gate_proj", "mlp/up": "mlp.up_proj", "mlp/down": "mlp.down_proj"}


def qwen2_vision(config: Json) -> Vision:
    """Reads the encoder of Qwen2-VL."""
    config = QWEN2_DEFAULTS | config
    vision = shared_vision(config, "embed_dim")
    return replace(vision, mlp_width=int(vision.width * positive_number(config, "mlp_ratio")))


def qwen2_5_vision(config: Json) -> Vision:
    """Reads the encoder of Qwen2.5-VL.

    Raises:
      CheckpointError: the windows do not consist of whole squares of the merger.
    """
    config = QWEN2_5_DEFAULTS | config
    vision = shared_vision(config, "hidden_size")
    full = config["fullatt_block_indexes"]
    merge, window = config["spatial_merge_size"], positive_int(config, "window_size")
    squares = window // merge // vision.patch_size_px
    if not squares:
        raise CheckpointError(
            f"config.json: window_size {window} is smaller than the {merge} x {merge} patches of "
            f"{vision.patch_size_px} px that become a token."
        )
    windowed = tuple(i for i in range(vision.depth) if i not in full)
    return replace(
        vision,
        mlp_width=positive_int(config, "intermediate_size"),
        norm="rmsnorm",
        gated_mlp=True,
        window_patches=squares * merge if windowed else None,
        windowed_layers=windowed,
    )


def shared_vision(config: Json, width: str) -> Vision:
    channels = config.get("in_channels", CHANNELS)
    if channels != CHANNELS:
        raise CheckpointError(f"config.json: in_channels is {channels}, but must be {CHANNELS}.")
    rope = get_or(config, "rope_parameters", {})
    return Vision(
        width=positive_int(config, width),
        depth=positive_int(config, "depth"),
        heads=positive_int(config, "num_heads"),
        norm_eps=EPS,
        activation=lookup(config, "hidden_act", ACTIVATIONS, ""),
        max_patches=MAX_PATCHES,
        patch_square=positive_int(config, "spatial_merge_size"),
        patch_size_px=side(config, "patch_size", 14),
        patch_frames=side(config, "temporal_patch_size", 2),
        patch_bias=False,
        positions="none",
        rope=PatchRope("same", theta=float(get_or(rope, "rope_theta", 10_000.0))),
    )


def shared_vision_to_hf(vision: Vision) -> Json:
    return {
        "depth": vision.depth,
        "num_heads": vision.heads,
        "hidden_act": HUB_ACTIVATIONS[vision.activation],
        "in_channels": CHANNELS,
        "patch_size": vision.patch_size_px,
        "temporal_patch_size": vision.patch_frames,
        "spatial_merge_size": vision.patch_square,
    }


def qwen2_vision_to_hf(cfg: Experiment) -> Json:
    vision = cfg.vision
    ratio = vision.mlp_width / vision.width
    return shared_vision_to_hf(vision) | {
        "embed_dim": vision.width,
        "hidden_size": cfg.decoder.width,
        "mlp_ratio": int(ratio) if ratio.is_integer() else ratio,
    }


def qwen2_5_vision_to_hf(cfg: Experiment) -> Json:
    vision = cfg.vision
    window = vision.window_patches or vision.patch_square
    return shared_vision_to_hf(vision) | {
        "hidden_size": vision.width,
        "out_hidden_size": cfg.decoder.width,
        "intermediate_size": vision.mlp_width,
        "window_size": window * vision.patch_size_px,
        "fullatt_block_indexes": [
            i for i in range(vision.depth) if i not in vision.windowed_layers
        ],
    }


def _text_from_hf(config: Json, names: Collection[str]) -> Decoder:
    """Reads the decoder from `text_config` or, as published, from the keys beside it."""
    text = TEXT_DEFAULTS | llama.drop_nulls(get_or(config, "text_config", config))
    tied = get_or(config, "tie_word_embeddings", get_or(text, "tie_word_embeddings", False))
    text["tie_word_embeddings"] = tied
    return with_sections(llama.qwen2_from_hf(text, names).decoder, text, SECTIONS)


def with_sections(
    decoder: Decoder, text: Json, default: Sequence[int], interleaved: bool = False
) -> Decoder:
    """Returns the decoder with M-RoPE.

    Raises:
      CheckpointError: the sections do not divide all frequencies, or these are scaled.
    """
    scaling = get_or(text, "rope_scaling", {}) | get_or(text, "rope_parameters", {})
    sections = tuple(get_or(scaling, "mrope_section", default))
    if decoder.rope.scaling != "none" or sum(sections) != decoder.head_width // 2:
        raise CheckpointError(
            f"config.json: rope_scaling {scaling} is not supported: it must have the type mrope or "
            f"default, and an mrope_section of {decoder.head_width // 2} frequencies in all."
        )
    rope = replace(decoder.rope, sections=sections, interleaved=interleaved)
    return replace(decoder, rope=rope)


def native_projector(vision: Vision) -> Projector:
    """Returns the merger: squares of patches, and an MLP as wide as a square."""
    return Projector(
        "pixel_shuffle",
        factor=vision.patch_square,
        projection="mlp",
        mlp_width=vision.width * vision.patch_square**2,
    )


def param_table(cfg: Experiment) -> list[Row]:
    mlp, vision = "projector/mlp", cfg.vision
    return [
        *vision_rows(vision, TOWER, GATED_MLP if vision.gated_mlp else PLAIN_MLP),
        *_norm_rows(vision, f"{MERGER}ln_q", "vision/final_norm"),
        *llama.dense_rows(f"{MERGER}mlp.0", f"{mlp}/linear_1", "D E -> E D", True),
        *llama.dense_rows(f"{MERGER}mlp.2", f"{mlp}/linear_2", "F D -> D F", True),
        *llama.decoder_rows(cfg.decoder, cfg.fusion),
    ]


def vision_rows(vision: Vision, tower: str, mlp: Mapping[str, str]) -> list[Row]:
    """Rows of patches and blocks.

    Args:
      tower: prefix of the names.
      mlp: kernels of a block's MLP -> their names.
    """
    patch = vision.patch_size_px
    rows = [
        row(
            f"{tower}patch_embed.proj.weight",
            "vision/patch_embed/projection/kernel",
            "D c t p q -> (t p q c) D",
            t=vision.patch_frames,
            p=patch,
            q=patch,
        ),
    ]
    param = "vision/blocks/layers/block_0"
    for layer in range(vision.depth):
        hf = f"{tower}blocks.{layer}"
        rows += _norm_rows(vision, f"{hf}.norm1", f"{param}/self_norm", layer)
        rows += _norm_rows(vision, f"{hf}.norm2", f"{param}/mlp_norm", layer)
        kernels, biases = [], []
        for name in QKV:
            kernels.append(Target(f"{param}/{name}/kernel", KERNELS[name], layer))
            biases.append(Target(f"{param}/{name}/bias", "(N H) -> N H", layer))
        rows.append(Row(f"{hf}.attn.qkv.weight", tuple(kernels)))
        rows.append(Row(f"{hf}.attn.qkv.bias", tuple(biases)))
        rows += llama.dense_rows(
            f"{hf}.attn.proj", f"{param}/self/out", KERNELS["self/out"], True, layer
        )
        for name, module in mlp.items():
            path = f"{param}/{name}"
            rows += llama.dense_rows(f"{hf}.{module}", path, KERNELS[name], True, layer)
    return rows


def _norm_rows(vision: Vision, hf: str, param: str, layer: int | None = None) -> list[Row]:
    if vision.norm == "layernorm":
        return norm_rows(hf, param, layer)
    return [llama.norm_row(hf, param, layer)]


RENAMES = (  # module names of transformers 5, and a model without a head
    (r"^model\.visual\.", TOWER),
    (r"^(model\.)?language_model\.", "model."),
)
MODULE_NAMES = (  # the inverse
    (r"^model\.", "model.language_model."),
    (r"^visual\.", "model.visual."),
)


def family(model_type: str, name: str, vision_from_hf, vision_to_hf) -> Family:
    """Builds the family with the classes of transformers that begin with `name`."""

    def config_from_hf(config: Json, names: Collection[str]) -> Experiment:
        tower = SHARED_DEFAULTS | llama.drop_nulls(get_or(config, "vision_config", {}))
        vision = vision_from_hf(tower)
        return Experiment(
            vision=vision,
            projector=native_projector(vision),
            fusion=Fusion("unified"),
            decoder=_text_from_hf(config, names),
        )

    def config_to_hf(cfg: Experiment) -> Json:
        text = llama.qwen2_to_hf(text_experiment(cfg.decoder))
        return {
            # Published files have the keys of the text beside the others, newer ones in a config.
            **text,
            "text_config": text | {"model_type": f"{model_type}_text"},
            "architectures": [f"{name}ForConditionalGeneration"],
            "model_type": model_type,
            "vision_config": {"model_type": model_type, **vision_to_hf(cfg)},
        }

    return Family(
        model_type,
        config_from_hf,
        config_to_hf,
        param_table,
        RENAMES,
        image_token=151655,
        processor=HfProcessor(f"{name}Processor", image_processor="Qwen2VLImageProcessor"),
        module_names=MODULE_NAMES,
    )


QWEN2_VL = family("qwen2_vl", "Qwen2VL", qwen2_vision, qwen2_vision_to_hf)
QWEN2_5_VL = family("qwen2_5_vl", "Qwen2_5_VL", qwen2_5_vision, qwen2_5_vision_to_hf)
