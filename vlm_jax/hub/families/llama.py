"""Llama, and the families that are Llama but for a few settings: Mistral and Qwen2."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace

from vlm_jax.config import CheckpointError, Decoder, Experiment, Fusion
from vlm_jax.config.bounds import check_numbers
from vlm_jax.hub.families.family import (
    ACTIVATIONS,
    HUB_ACTIVATIONS,
    Family,
    Json,
    choose,
    get,
    size,
    text_experiment,
)
from vlm_jax.hub.families.rope import read_rope, write_rope
from vlm_jax.hub.families.table import (
    Row,
    places,
    row,
    stored_axes,
)

HEAD = "lm_head.weight"


def read_decoder(config: Json, tied: bool) -> Decoder:
    """The settings that all families of Llama's block share. `config` has the defaults of LlamaConfig filled in."""
    heads = size(config, "num_attention_heads", 32)
    width = size(config, "hidden_size", 4096)
    bias = get(config, "attention_bias", False)
    max_positions = size(config, "max_position_embeddings", 2048)
    depth = size(config, "num_hidden_layers", 32)
    check_numbers({"decoder.depth": depth})  # before anything is listed for every layer
    return Decoder(
        width=width,
        depth=depth,
        heads=heads,
        kv_heads=size(config, "num_key_value_heads", heads),
        head_dim=size(config, "head_dim", width // heads),
        mlp_width=size(config, "intermediate_size", 11008),
        norm="rmsnorm",
        norm_eps=get(config, "rms_norm_eps", 1e-6),
        activation=choose(config, "hidden_act", ACTIVATIONS, "silu"),
        gated_mlp=True,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=get(config, "mlp_bias", False),
        vocab_size=size(config, "vocab_size", 32000),
        max_positions=max_positions,
        rope=read_rope(config, max_positions=max_positions),
        tie_word_embeddings=tied,
    )


def write_decoder(decoder: Decoder) -> Json:
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
        **write_rope(decoder.rope, decoder.max_positions),
    }


def is_tied(config: Json, names: Collection[str], default: bool, head: str = HEAD) -> bool:
    """Whether the output head is the embedding: config.json says so, and there is no head of its own beside it."""
    return bool(get(config, "tie_word_embeddings", default)) and head not in names


def norm_row(hub: str, ours: str, turn: int | None = None) -> Row:
    return row(f"{hub}.weight", f"{ours}/scale", turn=turn)


def dense_rows(hub: str, ours: str, pattern: str, bias: bool, turn: int | None = None) -> list[Row]:
    """A Linear of torch, (out, in), and its bias, which has the kernel's outputs."""
    rows = [row(f"{hub}.weight", f"{ours}/kernel", pattern, turn)]
    if bias:
        outputs = " ".join(stored_axes(pattern)[0])
        rows.append(row(f"{hub}.bias", f"{ours}/bias", f"({outputs}) -> {outputs}", turn))
    return rows


def attention_rows(
    hub: str, ours: str, decoder: Decoder, turn: int, out: str = "o_proj"
) -> list[Row]:
    """Separate projections of queries, keys and values."""
    rows = dense_rows(f"{hub}.q_proj", f"{ours}/query", "(N H) D -> D N H", decoder.qkv_bias, turn)
    rows += dense_rows(f"{hub}.k_proj", f"{ours}/key", "(K H) D -> D K H", decoder.qkv_bias, turn)
    rows += dense_rows(f"{hub}.v_proj", f"{ours}/value", "(K H) D -> D K H", decoder.qkv_bias, turn)
    return rows + dense_rows(
        f"{hub}.{out}", f"{ours}/out", "D (N H) -> N H D", decoder.out_bias, turn
    )


def mlp_rows(hub: str, ours: str, decoder: Decoder, turn: int) -> list[Row]:
    names = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
    found = [
        dense_rows(f"{hub}.{a}", f"{ours}/{b}", "F D -> D F", decoder.mlp_bias, turn)
        for a, b in names.items()
    ]
    return sum(found, [])


def outer_rows(decoder: Decoder, prefix: str = "model.", head: str = HEAD) -> list[Row]:
    """Embedding, final norm and head."""
    rows = [
        row(f"{prefix}embed_tokens.weight", "decoder/embedding/table"),
        norm_row(f"{prefix}norm", "decoder/final_norm"),
    ]
    return (
        rows
        if decoder.tie_word_embeddings
        else [*rows, row(head, "decoder/free_head/kernel", "V D -> D V")]
    )


def block_rows(hub: str, ours: str, decoder: Decoder, turn: int) -> list[Row]:
    return [
        *attention_rows(f"{hub}.self_attn", f"{ours}/self", decoder, turn),
        *mlp_rows(f"{hub}.mlp", f"{ours}/mlp", decoder, turn),
        *block_norm_rows(hub, ours, turn),
    ]


def block_norm_rows(hub: str, ours: str, turn: int) -> list[Row]:
    names = {"input_layernorm": "self_norm", "post_attention_layernorm": "mlp_norm"}
    return [norm_row(f"{hub}.{a}", f"{ours}/{b}", turn) for a, b in names.items()]


def decoder_rows(
    decoder: Decoder,
    fusion: Fusion,
    prefix: str = "model.",
    head: str = HEAD,
    block_rows: Callable[[str, str, Decoder, int], list[Row]] = block_rows,
) -> list[Row]:
    """The table of a decoder of such blocks, whatever cross-attention was grafted on it."""
    rows = outer_rows(decoder, prefix, head)
    for n, (block, turn) in enumerate(places(fusion.sublayers(decoder.depth), "self")):
        rows += block_rows(f"{prefix}layers.{n}", f"decoder/{block}", decoder, turn)
    return rows


def rows(cfg: Experiment) -> list[Row]:
    return decoder_rows(cfg.decoder, cfg.fusion)


def read_llama(config: Json, names: Collection[str]) -> Experiment:
    return text_experiment(read_decoder(config, is_tied(config, names, False)))


def write_llama(cfg: Experiment) -> Json:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **write_decoder(cfg.decoder),
    }


def read_mistral(config: Json, names: Collection[str]) -> Experiment:
    defaults = {
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
    }
    decoder = read_decoder(defaults | given(config), is_tied(config, names, False))
    window = config.get("sliding_window", 4096) or 0  # null is no window, a missing key the default
    return text_experiment(slide(decoder, window, range(decoder.depth) if window else ()))


def write_mistral(cfg: Experiment) -> Json:
    config = write_decoder(cfg.decoder) | {"sliding_window": cfg.decoder.sliding_window or None}
    return {"architectures": ["MistralForCausalLM"], "model_type": "mistral", **config}


def read_qwen2(config: Json, names: Collection[str]) -> Experiment:
    defaults = {
        "num_key_value_heads": 32,
        "intermediate_size": 22016,
        "max_position_embeddings": 32768,
    }
    defaults |= {"vocab_size": 151936}
    decoder = read_decoder(defaults | given(config), is_tied(config, names, False))
    decoder = replace(decoder, qkv_bias=True)
    window = get(config, "sliding_window", 4096) if get(config, "use_sliding_window", False) else 0
    first = get(config, "max_window_layers", 28)
    sliding = sliding_layers(config, decoder.depth, range(first, decoder.depth)) if window else ()
    return text_experiment(slide(decoder, window, sliding))


def write_qwen2(cfg: Experiment) -> Json:
    decoder = cfg.decoder
    config = write_decoder(decoder)
    for key in ("attention_bias", "mlp_bias", "head_dim"):
        config.pop(key)
    sliding = decoder.sliding_layers
    config |= {
        "use_sliding_window": bool(sliding),
        "sliding_window": decoder.sliding_window or None,
        "max_window_layers": min(sliding, default=decoder.depth),
        "layer_types": layer_types(decoder),
    }
    return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **config}


def slide(decoder: Decoder, window: int, layers) -> Decoder:
    """The decoder with a sliding window in the given layers."""
    layers = tuple(layers)
    return replace(decoder, sliding_window=window if layers else 0, sliding_layers=layers)


SLIDES = {"sliding_attention": True, "full_attention": False}


def sliding_layers(config: Json, depth: int, default: Iterable[int]) -> tuple[int, ...]:
    """The layers that `layer_types` lets slide; without that key, the family's default."""
    kinds = config.get("layer_types")
    if kinds is None:
        return tuple(default)
    if len(kinds) != depth:
        raise CheckpointError(
            f"config.json: layer_types has {len(kinds)} words, not {depth} as num_hidden_layers says."
        )
    return tuple(
        i
        for i, kind in enumerate(kinds)
        if choose({"layer_types": kind}, "layer_types", SLIDES, kind)
    )


def layer_types(decoder: Decoder) -> list[str]:
    return [
        f"{'sliding' if i in decoder.sliding_layers else 'full'}_attention"
        for i in range(decoder.depth)
    ]


def given(config: Json) -> Json:
    """Without the keys that are null, for a family's defaults to stand in their place."""
    return {key: value for key, value in config.items() if value is not None}


RENAMES = ((r"^(?!model\.|lm_head\.)", "model."),)  # the bare model without a head
LLAMA = Family("llama", read_llama, write_llama, rows, RENAMES)
MISTRAL = Family("mistral", read_mistral, write_mistral, rows, RENAMES)
QWEN2 = Family("qwen2", read_qwen2, write_qwen2, rows, RENAMES)
