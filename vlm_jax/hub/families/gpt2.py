"""GPT-2, whose Conv1D weights are (in, out)."""

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
from vlm_jax.hub.families.table import (
    Row,
    Target,
    layers_with,
    row,
)

ALIASES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}


def decoder_from_hf(config: Json, names: Collection[str], head: str = "lm_head.weight") -> Decoder:
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


def norm_rows(hf: str, param: str, layer: int | None = None) -> list[Row]:
    """A LayerNorm of torch."""
    return [
        row(f"{hf}.weight", f"{param}/scale", layer=layer),
        row(f"{hf}.bias", f"{param}/bias", layer=layer),
    ]


def fused_rows(hf: str, param: str, parts: tuple[str, ...], layer: int) -> list[Row]:
    """A Conv1D whose outputs are heads of queries, keys or values one after another."""
    kernels = tuple(Target(f"{param}/{part}/kernel", "D (N H) -> D N H", layer) for part in parts)
    biases = tuple(Target(f"{param}/{part}/bias", "(N H) -> N H", layer) for part in parts)
    return [Row(f"{hf}.weight", kernels, axis=1), Row(f"{hf}.bias", biases)]


def attention_rows(hf: str, param: str, fused: dict[str, tuple[str, ...]], layer: int) -> list[Row]:
    rows = [row(f"{hf}.c_proj.weight", f"{param}/out/kernel", "(N H) D -> N H D", layer)]
    rows.append(row(f"{hf}.c_proj.bias", f"{param}/out/bias", layer=layer))
    return rows + sum(
        (fused_rows(f"{hf}.{name}", param, parts, layer) for name, parts in fused.items()), []
    )


def mlp_rows(hf: str, param: str, layer: int) -> list[Row]:
    rows = []
    for name, part in {"c_fc": "up", "c_proj": "down"}.items():
        rows.append(row(f"{hf}.{name}.weight", f"{param}/{part}/kernel", layer=layer))
        rows.append(row(f"{hf}.{name}.bias", f"{param}/{part}/bias", layer=layer))
    return rows


def decoder_rows(
    decoder: Decoder, fusion: Fusion, prefix: str = "", head: str = "lm_head.weight"
) -> list[Row]:
    """The table of a decoder of GPT-2's blocks; those of an encoder-decoder have cross-attention in between."""
    rows = [row(f"{prefix}wte.weight", "decoder/embedding/table")]
    rows.append(row(f"{prefix}wpe.weight", "decoder/position_embedding/table"))
    rows += norm_rows(f"{prefix}ln_f", "decoder/final_norm")
    if not decoder.tie_word_embeddings:
        rows.append(row(head, "decoder/free_head/kernel", "V D -> D V"))
    for n, (block, layer) in enumerate(layers_with(fusion.sublayers(decoder.depth), "self")):
        hf, param = f"{prefix}h.{n}", f"decoder/{block}"
        rows += norm_rows(f"{hf}.ln_1", f"{param}/self_norm", layer)
        rows += attention_rows(
            f"{hf}.attn", f"{param}/self", {"c_attn": ("query", "key", "value")}, layer
        )
        rows += norm_rows(f"{hf}.ln_2", f"{param}/mlp_norm", layer)
        rows += mlp_rows(f"{hf}.mlp", f"{param}/mlp", layer)
        if fusion.kind == "encoder_decoder":
            rows += norm_rows(f"{hf}.ln_cross_attn", f"{param}/cross_norm", layer)
            fused = {"q_attn": ("query",), "c_attn": ("key", "value")}
            rows += attention_rows(f"{hf}.crossattention", f"{param}/cross", fused, layer)
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


GPT2 = Family("gpt2", config_from_hf, config_to_hf, param_table, ((r"^transformer\.", ""),))
