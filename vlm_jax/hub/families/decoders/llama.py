"""Llama, and the families that differ from it in a few settings: Mistral, Qwen2 and Qwen3."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace

from vlm_jax.config import CheckpointError, Decoder, Experiment, Fusion, Transformer
from vlm_jax.config.bounds import check_number
from vlm_jax.hub.families.decoders.rope import rope_from_hf, rope_to_hf
from vlm_jax.hub.families.family import (
    ACTIVATIONS,
    HUB_ACTIVATIONS,
    Family,
    Json,
    get_or,
    lookup,
    positive_int,
    text_experiment,
)
from vlm_jax.hub.families.table import (
    Row,
    layers_with,
    row,
    stored_axes,
)

HEAD = "lm_head.weight"
# Names of a block's norms in the files, by `norm_position`. No family has "post" yet: a run that
# has it is compared with the families by these names.
BLOCK_NORMS = {
    "pre": {"input_layernorm": "self_norm", "post_attention_layernorm": "mlp_norm"},
    "post": {"input_layernorm": "self_norm", "post_attention_layernorm": "mlp_norm"},
    "sandwich": {
        "input_layernorm": "self_norm",
        "post_attention_layernorm": "self_post_norm",
        "pre_feedforward_layernorm": "mlp_norm",
        "post_feedforward_layernorm": "mlp_post_norm",
    },
    "output": {
        "post_attention_layernorm": "self_post_norm",
        "post_feedforward_layernorm": "mlp_post_norm",
    },
}
# Patterns of the scales of the query's and the key's norm, by `qk_norm`.
QK_NORM_PATTERNS = {"none": (), "head": ("", ""), "all_heads": ("(N H) -> N H", "(K H) -> K H")}


def decoder_from_hf(config: Json, tied: bool) -> Decoder:
    """Reads the settings shared by all families of Llama's block, with LlamaConfig's defaults."""
    heads = positive_int(config, "num_attention_heads", 32)
    width = positive_int(config, "hidden_size", 4096)
    bias = get_or(config, "attention_bias", False)
    max_positions = positive_int(config, "max_position_embeddings", 2048)
    depth = positive_int(config, "num_hidden_layers", 32)
    # Checked here because lists of layers are built below.
    check_number("decoder.depth", depth)
    return Decoder(
        width=width,
        depth=depth,
        heads=heads,
        kv_heads=positive_int(config, "num_key_value_heads", heads),
        head_dim=positive_int(config, "head_dim", width // heads),
        mlp_width=positive_int(config, "intermediate_size", 11008),
        norm="rmsnorm",
        norm_eps=get_or(config, "rms_norm_eps", 1e-6),
        activation=lookup(config, "hidden_act", ACTIVATIONS, "silu"),
        gated_mlp=True,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=get_or(config, "mlp_bias", False),
        vocab_size=positive_int(config, "vocab_size", 32000),
        max_positions=max_positions,
        rope=rope_from_hf(config, max_positions=max_positions),
        tie_word_embeddings=tied,
    )


def decoder_to_hf(decoder: Decoder) -> Json:
    return {
        "hidden_size": decoder.width,
        "num_hidden_layers": decoder.depth,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.num_kv_heads,
        "head_dim": decoder.head_width,
        "intermediate_size": decoder.mlp_width,
        "rms_norm_eps": decoder.norm_eps,
        "hidden_act": HUB_ACTIVATIONS[decoder.activation],
        "attention_bias": decoder.qkv_bias,
        "mlp_bias": decoder.mlp_bias,
        "vocab_size": decoder.vocab_size,
        "max_position_embeddings": decoder.max_positions,
        "tie_word_embeddings": decoder.tie_word_embeddings,
        **rope_to_hf(decoder.rope, decoder.max_positions),
    }


def is_tied(config: Json, names: Collection[str], default: bool, head: str = HEAD) -> bool:
    """Returns whether the head is the embedding: by config.json, and no head is stored."""
    return bool(get_or(config, "tie_word_embeddings", default)) and head not in names


def norm_row(hf: str, param: str, layer: int | None = None) -> Row:
    return row(f"{hf}.weight", f"{param}/scale", layer=layer)


def dense_rows(
    hf: str, param: str, pattern: str, bias: bool, layer: int | None = None
) -> list[Row]:
    """Rows of a torch Linear, (out, in); its bias has the kernel's output axes."""
    rows = [row(f"{hf}.weight", f"{param}/kernel", pattern, layer)]
    if bias:
        outputs = " ".join(stored_axes(pattern)[0])
        rows.append(row(f"{hf}.bias", f"{param}/bias", f"({outputs}) -> {outputs}", layer))
    return rows


def attention_rows(
    hf: str, param: str, decoder: Decoder, layer: int, out: str = "o_proj"
) -> list[Row]:
    """Rows of attention with separate query, key and value projections."""
    rows = dense_rows(f"{hf}.q_proj", f"{param}/query", "(N H) D -> D N H", decoder.qkv_bias, layer)
    rows += dense_rows(f"{hf}.k_proj", f"{param}/key", "(K H) D -> D K H", decoder.qkv_bias, layer)
    rows += dense_rows(
        f"{hf}.v_proj", f"{param}/value", "(K H) D -> D K H", decoder.qkv_bias, layer
    )
    return rows + dense_rows(
        f"{hf}.{out}", f"{param}/out", "D (N H) -> N H D", decoder.out_bias, layer
    )


def qk_norm_rows(hf: str, param: str, cfg: Transformer, layer: int) -> list[Row]:
    """Rows of the norms of queries and keys, if the attention has them."""
    names = {"q_norm": "query_norm", "k_norm": "key_norm"}
    return [
        row(f"{hf}.{name}.weight", f"{param}/{norm}/scale", pattern, layer)
        for (name, norm), pattern in zip(names.items(), QK_NORM_PATTERNS[cfg.qk_norm])
    ]


def mlp_rows(hf: str, param: str, decoder: Decoder, layer: int) -> list[Row]:
    names = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
    rows = []
    for name, dense in names.items():
        rows += dense_rows(
            f"{hf}.{name}", f"{param}/{dense}", "F D -> D F", decoder.mlp_bias, layer
        )
    return rows


def outer_rows(decoder: Decoder, prefix: str = "model.", head: str = HEAD) -> list[Row]:
    """Rows of embedding, final norm and head."""
    rows = [
        row(f"{prefix}embed_tokens.weight", "decoder/embedding/table"),
        norm_row(f"{prefix}norm", "decoder/final_norm"),
    ]
    if not decoder.tie_word_embeddings:
        rows.append(row(head, "decoder/free_head/kernel", "V D -> D V"))
    return rows


def block_rows(hf: str, param: str, decoder: Decoder, layer: int) -> list[Row]:
    attention = f"{hf}.self_attn", f"{param}/self"
    return [
        *attention_rows(*attention, decoder, layer),
        *qk_norm_rows(*attention, decoder, layer),
        *mlp_rows(f"{hf}.mlp", f"{param}/mlp", decoder, layer),
        *block_norm_rows(hf, param, decoder, layer),
    ]


def block_norm_rows(hf: str, param: str, decoder: Decoder, layer: int) -> list[Row]:
    names = BLOCK_NORMS[decoder.norm_position]
    return [norm_row(f"{hf}.{a}", f"{param}/{b}", layer) for a, b in names.items()]


def decoder_rows(
    decoder: Decoder,
    fusion: Fusion,
    prefix: str = "model.",
    head: str = HEAD,
    block_rows: Callable[[str, str, Decoder, int], list[Row]] = block_rows,
) -> list[Row]:
    """Rows of a decoder of such blocks, without the cross-attention that a fusion style adds."""
    rows = outer_rows(decoder, prefix, head)
    for n, (block, layer) in enumerate(layers_with(fusion.sublayers(decoder.depth), "self")):
        rows += block_rows(f"{prefix}layers.{n}", f"decoder/{block}", decoder, layer)
    return rows


def param_table(cfg: Experiment) -> list[Row]:
    return decoder_rows(cfg.decoder, cfg.fusion)


def llama_from_hf(config: Json, names: Collection[str]) -> Experiment:
    return text_experiment(decoder_from_hf(config, is_tied(config, names, False)))


def llama_to_hf(cfg: Experiment) -> Json:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **decoder_to_hf(cfg.decoder),
    }


def mistral_from_hf(config: Json, names: Collection[str]) -> Experiment:
    defaults = {
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
    }
    decoder = decoder_from_hf(defaults | drop_nulls(config), is_tied(config, names, False))
    # Null means no window; a missing key means the default.
    window = config.get("sliding_window", 4096)
    return text_experiment(
        with_sliding_window(decoder, window, range(decoder.depth) if window else ())
    )


def mistral_to_hf(cfg: Experiment) -> Json:
    config = decoder_to_hf(cfg.decoder) | {"sliding_window": cfg.decoder.sliding_window}
    return {"architectures": ["MistralForCausalLM"], "model_type": "mistral", **config}


def qwen2_from_hf(config: Json, names: Collection[str]) -> Experiment:
    defaults = QWEN_DEFAULTS | {"num_key_value_heads": 32}
    decoder = _read_qwen(defaults | drop_nulls(config), names)
    return text_experiment(replace(decoder, qkv_bias=True, out_bias=False, mlp_bias=False))


def qwen2_to_hf(cfg: Experiment) -> Json:
    config = decoder_to_hf(cfg.decoder)
    for key in ("attention_bias", "mlp_bias", "head_dim"):
        config.pop(key)
    config |= _qwen_window_to_hf(cfg.decoder)
    return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **config}


def qwen3_from_hf(config: Json, names: Collection[str]) -> Experiment:
    """Reads Qwen3's settings: query and key heads are normalized; biases by `attention_bias`."""
    defaults = QWEN_DEFAULTS | {"num_key_value_heads": 32, "head_dim": 128}
    decoder = _read_qwen(defaults | drop_nulls(config), names)
    return text_experiment(replace(decoder, qk_norm="head", mlp_bias=False))


def qwen3_to_hf(cfg: Experiment) -> Json:
    config = decoder_to_hf(cfg.decoder)
    config.pop("mlp_bias")
    config |= _qwen_window_to_hf(cfg.decoder)
    return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **config}


QWEN_DEFAULTS = {
    "intermediate_size": 22016,
    "max_position_embeddings": 32768,
    "vocab_size": 151936,
}


def _read_qwen(config: Json, names: Collection[str]) -> Decoder:
    """Reads the settings that Qwen2 and Qwen3 share; the last blocks may have a window."""
    decoder = decoder_from_hf(config, is_tied(config, names, False))
    slides = get_or(config, "use_sliding_window", False)
    window = get_or(config, "sliding_window", 4096) if slides else None
    first = get_or(config, "max_window_layers", 28)
    sliding = sliding_layers(config, decoder.depth, range(first, decoder.depth)) if window else ()
    return with_sliding_window(decoder, window, sliding)


def _qwen_window_to_hf(decoder: Decoder) -> Json:
    sliding = decoder.sliding_layers
    return {
        "use_sliding_window": bool(sliding),
        "sliding_window": decoder.sliding_window,
        "max_window_layers": min(sliding, default=decoder.depth),
        "layer_types": layer_types(decoder),
    }


def with_sliding_window(decoder: Decoder, window: int | None, layers) -> Decoder:
    """Returns the decoder with a sliding window in these layers."""
    layers = tuple(layers)
    return replace(decoder, sliding_window=window if layers else None, sliding_layers=layers)


SLIDES = {"sliding_attention": True, "full_attention": False}


def sliding_layers(config: Json, depth: int, default: Iterable[int]) -> tuple[int, ...]:
    """Layers with a sliding window: by `layer_types` or, without that key, the family's default."""
    types = config.get("layer_types")
    if types is None:
        return tuple(default)
    if len(types) != depth:
        raise CheckpointError(
            f"config.json: layer_types has {len(types)} entries, but num_hidden_layers is {depth}."
        )
    is_sliding = [lookup({"layer_types": name}, "layer_types", SLIDES, name) for name in types]
    return tuple(i for i, slides in enumerate(is_sliding) if slides)


def layer_types(decoder: Decoder) -> list[str]:
    return [
        f"{'sliding' if i in decoder.sliding_layers else 'full'}_attention"
        for i in range(decoder.depth)
    ]


def drop_nulls(config: Json) -> Json:
    """Drops keys that are null, so that a family's defaults apply."""
    return {key: value for key, value in config.items() if value is not None}


RENAMES = ((r"^(?!model\.|lm_head\.)", "model."),)  # files of a model without a head
LLAMA = Family("llama", llama_from_hf, llama_to_hf, param_table, RENAMES)
MISTRAL = Family("mistral", mistral_from_hf, mistral_to_hf, param_table, RENAMES)
QWEN2 = Family("qwen2", qwen2_from_hf, qwen2_to_hf, param_table, RENAMES)
QWEN3 = Family("qwen3", qwen3_from_hf, qwen3_to_hf, param_table, RENAMES)
