"""GPT-2, whose Conv1D layers store (in, out) (transformers, models/gpt2/modeling_gpt2.py)."""

from collections.abc import Collection

from vlm_jax.config import Decoder, Experiment, Fusion
from vlm_jax.hub.families.family import (
    ACTIVATIONS,
    HUB_ACTIVATIONS,
    Family,
    Json,
    get_or,
    lookup,
    positive_int,
    reject_unless,
    resolve_aliases,
    text_experiment,
)
from vlm_jax.hub.families.table import Row, Target, layers_with, row

# `attribute_map` of transformers' GPT2Config.
ALIASES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
HEAD = "lm_head.weight"


def decoder_from_hf(config: Json, names: Collection[str], head: str = HEAD) -> Decoder:
    """Reads config.json; a missing key has the default of GPT2Config."""
    config = resolve_aliases(config, ALIASES)
    reject_unless(config, "scale_attn_weights", True)
    reject_unless(config, "scale_attn_by_inverse_layer_idx", False)
    width = positive_int(config, "n_embd", 768)
    return Decoder(
        width=width,
        depth=positive_int(config, "n_layer", 12),
        heads=positive_int(config, "n_head", 12),
        mlp_width=positive_int(config, "n_inner", 4 * width),
        norm="layernorm",
        norm_eps=get_or(config, "layer_norm_epsilon", 1e-5),
        activation=lookup(config, "activation_function", ACTIVATIONS, "gelu_new"),
        vocab_size=positive_int(config, "vocab_size", 50257),
        positions="learned",
        max_positions=positive_int(config, "n_positions", 1024),
        tie_word_embeddings=bool(get_or(config, "tie_word_embeddings", True)) and head not in names,
    )


def decoder_to_hf(decoder: Decoder) -> Json:
    activation = HUB_ACTIVATIONS[decoder.activation]
    return {
        "n_embd": decoder.width,
        "n_layer": decoder.depth,
        "n_head": decoder.heads,
        "n_inner": decoder.mlp_width,
        "layer_norm_epsilon": decoder.norm_eps,
        "activation_function": "gelu_new" if activation == "gelu_pytorch_tanh" else activation,
        "vocab_size": decoder.vocab_size,
        "n_positions": decoder.max_positions,
        "tie_word_embeddings": decoder.tie_word_embeddings,
    }


def decoder_rows(decoder: Decoder, fusion: Fusion, prefix: str = "", head: str = HEAD) -> list[Row]:
    """Rows of GPT-2's blocks; in an encoder-decoder each has cross-attention."""
    rows = [
        row(f"{prefix}wte.weight", "decoder/embedding/table"),
        row(f"{prefix}wpe.weight", "decoder/position_embedding/table"),
        *norm_rows(f"{prefix}ln_f", "decoder/final_norm"),
    ]
    if not decoder.tie_word_embeddings:
        rows.append(row(head, "decoder/free_head/kernel", "V D -> D V"))
    blocks = fusion.sublayers(decoder.depth)
    for n, (block, layer) in enumerate(layers_with(blocks, "self")):
        hf, param = f"{prefix}h.{n}", f"decoder/{block}"
        rows += norm_rows(f"{hf}.ln_1", f"{param}/self_norm", layer)
        rows += fused_rows(f"{hf}.attn.c_attn", f"{param}/self", ("query", "key", "value"), layer)
        rows += output_rows(f"{hf}.attn.c_proj", f"{param}/self/out", layer)
        rows += norm_rows(f"{hf}.ln_2", f"{param}/mlp_norm", layer)
        rows += mlp_rows(f"{hf}.mlp", f"{param}/mlp", layer)
        if "cross" in blocks[n]:
            rows += norm_rows(f"{hf}.ln_cross_attn", f"{param}/cross_norm", layer)
            rows += cross_rows(f"{hf}.crossattention", f"{param}/cross", layer)
    return rows


def norm_rows(hf: str, param: str, layer: int | None = None) -> list[Row]:
    """Rows of a torch LayerNorm."""
    return [
        row(f"{hf}.weight", f"{param}/scale", layer=layer),
        row(f"{hf}.bias", f"{param}/bias", layer=layer),
    ]


def fused_rows(hf: str, param: str, names: tuple[str, ...], layer: int) -> list[Row]:
    """Rows of a Conv1D whose outputs are the heads of several projections, one after another."""
    kernels = [Target(f"{param}/{name}/kernel", "D (N H) -> D N H", layer) for name in names]
    biases = [Target(f"{param}/{name}/bias", "(N H) -> N H", layer) for name in names]
    return [Row(f"{hf}.weight", tuple(kernels), axis=1), Row(f"{hf}.bias", tuple(biases))]


def output_rows(hf: str, param: str, layer: int) -> list[Row]:
    """Rows of the output projection of attention."""
    return [
        row(f"{hf}.weight", f"{param}/kernel", "(N H) D -> N H D", layer),
        row(f"{hf}.bias", f"{param}/bias", layer=layer),
    ]


def cross_rows(hf: str, param: str, layer: int) -> list[Row]:
    """Rows of cross-attention: keys and values are one tensor, queries another."""
    return [
        *fused_rows(f"{hf}.q_attn", param, ("query",), layer),
        *fused_rows(f"{hf}.c_attn", param, ("key", "value"), layer),
        *output_rows(f"{hf}.c_proj", f"{param}/out", layer),
    ]


def mlp_rows(hf: str, param: str, layer: int) -> list[Row]:
    rows = []
    for name, dense in {"c_fc": "up", "c_proj": "down"}.items():
        rows.append(row(f"{hf}.{name}.weight", f"{param}/{dense}/kernel", layer=layer))
        rows.append(row(f"{hf}.{name}.bias", f"{param}/{dense}/bias", layer=layer))
    return rows


def config_from_hf(config: Json, names: Collection[str]) -> Experiment:
    return text_experiment(decoder_from_hf(config, names))


def config_to_hf(cfg: Experiment) -> Json:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **decoder_to_hf(cfg.decoder),
    }


def param_table(cfg: Experiment) -> list[Row]:
    return decoder_rows(cfg.decoder, cfg.fusion)


GPT2 = Family("gpt2", config_from_hf, config_to_hf, param_table, renames=((r"^transformer\.", ""),))
