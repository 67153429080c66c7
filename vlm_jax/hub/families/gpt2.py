"""GPT-2, whose Conv1D weights are (in, out)."""

from collections.abc import Collection

from vlm_jax.config import Decoder, Experiment, Fusion
from vlm_jax.hub.families.family import (
    ACTIVATIONS,
    HUB_ACTIVATIONS,
    Family,
    Json,
    choose,
    get,
    refuse,
    size,
    text_experiment,
    unaliased,
)
from vlm_jax.hub.families.table import (
    Part,
    Row,
    places,
    row,
)

ALIASES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}


def read_decoder(config: Json, names: Collection[str], head: str = "lm_head.weight") -> Decoder:
    config = unaliased(config, ALIASES)
    refuse(config, "scale_attn_weights", True)
    refuse(config, "scale_attn_by_inverse_layer_idx", False)
    width = size(config, "n_embd", 768)
    return Decoder(
        width=width,
        depth=size(config, "n_layer", 12),
        heads=size(config, "n_head", 12),
        mlp_width=size(config, "n_inner", 4 * width),
        norm="layernorm",
        norm_eps=get(config, "layer_norm_epsilon", 1e-5),
        activation=choose(config, "activation_function", ACTIVATIONS, "gelu_new"),
        vocab_size=size(config, "vocab_size", 50257),
        positions="learned",
        max_positions=size(config, "n_positions", 1024),
        tie_word_embeddings=bool(get(config, "tie_word_embeddings", True)) and head not in names,
    )


def write_decoder(decoder: Decoder) -> Json:
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


def norm_rows(hub: str, ours: str, turn: int | None = None) -> list[Row]:
    """A LayerNorm of torch."""
    return [
        row(f"{hub}.weight", f"{ours}/scale", turn=turn),
        row(f"{hub}.bias", f"{ours}/bias", turn=turn),
    ]


def fused_rows(hub: str, ours: str, parts: tuple[str, ...], turn: int) -> list[Row]:
    """A Conv1D whose outputs are heads of queries, keys or values one after another."""
    kernels = tuple(Part(f"{ours}/{part}/kernel", "D (N H) -> D N H", turn) for part in parts)
    biases = tuple(Part(f"{ours}/{part}/bias", "(N H) -> N H", turn) for part in parts)
    return [Row(f"{hub}.weight", kernels, axis=1), Row(f"{hub}.bias", biases)]


def attention_rows(hub: str, ours: str, fused: dict[str, tuple[str, ...]], turn: int) -> list[Row]:
    rows = [row(f"{hub}.c_proj.weight", f"{ours}/out/kernel", "(N H) D -> N H D", turn)]
    rows.append(row(f"{hub}.c_proj.bias", f"{ours}/out/bias", turn=turn))
    return rows + sum(
        (fused_rows(f"{hub}.{name}", ours, parts, turn) for name, parts in fused.items()), []
    )


def mlp_rows(hub: str, ours: str, turn: int) -> list[Row]:
    rows = []
    for name, part in {"c_fc": "up", "c_proj": "down"}.items():
        rows.append(row(f"{hub}.{name}.weight", f"{ours}/{part}/kernel", turn=turn))
        rows.append(row(f"{hub}.{name}.bias", f"{ours}/{part}/bias", turn=turn))
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
    for n, (block, turn) in enumerate(places(fusion.sublayers(decoder.depth), "self")):
        hub, ours = f"{prefix}h.{n}", f"decoder/{block}"
        rows += norm_rows(f"{hub}.ln_1", f"{ours}/self_norm", turn)
        rows += attention_rows(
            f"{hub}.attn", f"{ours}/self", {"c_attn": ("query", "key", "value")}, turn
        )
        rows += norm_rows(f"{hub}.ln_2", f"{ours}/mlp_norm", turn)
        rows += mlp_rows(f"{hub}.mlp", f"{ours}/mlp", turn)
        if fusion.is_encoder_decoder:
            rows += norm_rows(f"{hub}.ln_cross_attn", f"{ours}/cross_norm", turn)
            fused = {"q_attn": ("query",), "c_attn": ("key", "value")}
            rows += attention_rows(f"{hub}.crossattention", f"{ours}/cross", fused, turn)
    return rows


def read(config: Json, names: Collection[str]) -> Experiment:
    return text_experiment(read_decoder(config, names))


def write(cfg: Experiment) -> Json:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **write_decoder(cfg.decoder),
    }


def rows(cfg: Experiment) -> list[Row]:
    return decoder_rows(cfg.decoder, cfg.fusion)


GPT2 = Family("gpt2", read, write, rows, ((r"^transformer\.", ""),))
