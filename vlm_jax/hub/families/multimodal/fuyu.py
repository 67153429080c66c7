"""Fuyu: linear patch projections, without an encoder, and Persimmon's decoder."""

from collections.abc import Collection

from vlm_jax.config import (
    Decoder,
    Experiment,
    Fusion,
    Projector,
    Vision,
)
from vlm_jax.hub.families.decoders.gpt2 import norm_rows
from vlm_jax.hub.families.decoders.llama import dense_rows, is_tied
from vlm_jax.hub.families.decoders.rope import rope_from_hf, rope_to_hf
from vlm_jax.hub.families.family import (
    ACTIVATIONS,
    HUB_ACTIVATIONS,
    Family,
    HfProcessor,
    Json,
    get_or,
    lookup,
    positive_int,
    reject_unless,
)
from vlm_jax.hub.families.multimodal.llava import HEAD, MODULE_NAMES, RENAMES, TEXT
from vlm_jax.hub.families.table import (
    Row,
    Target,
    layers_with,
    row,
)


def config_from_hf(config: Json, names: Collection[str]) -> Experiment:
    reject_unless(config, "num_channels", 3)
    patch_size_px = get_or(config, "patch_size", 30)
    return Experiment(
        vision=Vision(
            kind="none",
            image_size_px=get_or(config, "image_size", 300),
            patch_size_px=patch_size_px,
            positions="none",
            newline_token=True,
        ),
        projector=Projector(kind="linear"),
        fusion=Fusion(kind="unified"),
        decoder=decoder_from_hf(
            get_or(config, "text_config", config), is_tied(config, names, False, HEAD)
        ),
    )


def decoder_from_hf(config: Json, tied: bool) -> Decoder:
    """Reads Persimmon's settings with the defaults of FuyuConfig."""
    return Decoder(
        width=positive_int(config, "hidden_size", 4096),
        depth=positive_int(config, "num_hidden_layers", 36),
        heads=positive_int(config, "num_attention_heads", 64),
        mlp_width=positive_int(config, "intermediate_size", 16384),
        norm="layernorm",
        norm_eps=get_or(config, "layer_norm_eps", 1e-5),
        activation=lookup(config, "hidden_act", ACTIVATIONS, "relu2"),
        qk_norm="head" if get_or(config, "qk_layernorm", True) else "none",
        vocab_size=positive_int(config, "vocab_size", 262144),
        max_positions=positive_int(config, "max_position_embeddings", 16384),
        rope=rope_from_hf(config, theta=25_000.0, fraction=0.5),
        tie_word_embeddings=tied,
    )


def config_to_hf(cfg: Experiment) -> Json:
    """Writes the decoder's keys twice: flat, as published, and in `text_config`, for 5.x."""
    text = decoder_to_hf(cfg.decoder)
    return {
        "architectures": ["FuyuForCausalLM"],
        "model_type": "fuyu",
        "image_size": cfg.vision.image_size_px,
        "patch_size": cfg.vision.patch_size_px,
        "num_channels": 3,
        **text,
        "text_config": {"model_type": "persimmon", **text},
    }


def decoder_to_hf(decoder: Decoder) -> Json:
    return {
        "hidden_size": decoder.width,
        "num_hidden_layers": decoder.depth,
        "num_attention_heads": decoder.heads,
        "intermediate_size": decoder.mlp_width,
        "layer_norm_eps": decoder.norm_eps,
        "hidden_act": HUB_ACTIVATIONS[decoder.activation],
        "qk_layernorm": decoder.qk_norm == "head",
        "vocab_size": decoder.vocab_size,
        "max_position_embeddings": decoder.max_positions,
        "partial_rotary_factor": decoder.rope.fraction,
        "tie_word_embeddings": decoder.tie_word_embeddings,
        **rope_to_hf(decoder.rope),
    }


def param_table(cfg: Experiment) -> list[Row]:
    decoder = cfg.decoder
    rows = dense_rows("vision_embed_tokens", "projector/linear", "D E -> E D", True)
    rows.append(row(f"{TEXT}embed_tokens.weight", "decoder/embedding/table"))
    rows += norm_rows(f"{TEXT}final_layernorm", "decoder/final_norm")
    if not decoder.tie_word_embeddings:
        rows.append(row(HEAD, "decoder/free_head/kernel", "V D -> D V"))
    for n, (block, layer) in enumerate(layers_with(cfg.fusion.sublayers(decoder.depth), "self")):
        hf, param = f"{TEXT}layers.{n}", f"decoder/{block}"
        rows += attention_rows(f"{hf}.self_attn", f"{param}/self", decoder, layer)
        rows += dense_rows(f"{hf}.mlp.dense_h_to_4h", f"{param}/mlp/up", "F D -> D F", True, layer)
        rows += dense_rows(
            f"{hf}.mlp.dense_4h_to_h", f"{param}/mlp/down", "D F -> F D", True, layer
        )
        rows += norm_rows(f"{hf}.input_layernorm", f"{param}/self_norm", layer)
        rows += norm_rows(f"{hf}.post_attention_layernorm", f"{param}/mlp_norm", layer)
    return rows


def attention_rows(hf: str, param: str, decoder: Decoder, layer: int) -> list[Row]:
    """Rows of attention, whose query, key and value are interleaved by head."""

    def targets(leaf):
        names = ("query", "key", "value")
        return tuple(Target(f"{param}/{name}/{leaf}", layer=layer) for name in names)

    rows = [
        Row(
            f"{hf}.query_key_value.weight",
            targets("kernel"),
            interleave="(N parts H) D -> parts D N H",
        ),
        Row(f"{hf}.query_key_value.bias", targets("bias"), interleave="(N parts H) -> parts N H"),
        *dense_rows(f"{hf}.dense", f"{param}/out", "D (N H) -> N H D", True, layer),
    ]
    if decoder.qk_norm == "head":
        rows += norm_rows(f"{hf}.q_layernorm", f"{param}/query_norm", layer)
        rows += norm_rows(f"{hf}.k_layernorm", f"{param}/key_norm", layer)
    return rows


FUYU = Family(
    "fuyu",
    config_from_hf,
    config_to_hf,
    param_table,
    RENAMES,
    image_token=71011,
    processor=HfProcessor("FuyuProcessor", has_prompt_format=True, keeps_image_size=True),
    module_names=MODULE_NAMES,
)
