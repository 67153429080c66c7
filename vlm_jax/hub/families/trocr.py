"""TrOCR's decoder: BART's, whose norms stand behind the sums (transformers, models/trocr/modeling_trocr.py)."""

from collections.abc import Collection

from vlm_jax.config import Decoder, Fusion
from vlm_jax.hub.families.family import (
    ACTIVATIONS,
    HUB_ACTIVATIONS,
    Json,
    choose,
    get,
    size,
    unaliased,
)
from vlm_jax.hub.families.gpt2 import norm_rows
from vlm_jax.hub.families.llama import attention_rows, dense_rows, is_tied
from vlm_jax.hub.families.table import Row, places, row

HEAD = "output_projection.weight"
LEARNED_OFFSET = 2  # rows of the position table before that of the first token


ALIASES = {
    "hidden_size": "d_model",
    "num_hidden_layers": "decoder_layers",
    "num_attention_heads": "decoder_attention_heads",
}


def read_decoder(config: Json, names: Collection[str], head: str = HEAD) -> Decoder:
    config = unaliased(config, ALIASES)
    learned = get(config, "use_learned_position_embeddings", True)
    return Decoder(
        width=size(config, "d_model", 1024),
        depth=size(config, "decoder_layers", 12),
        heads=size(config, "decoder_attention_heads", 16),
        mlp_width=size(config, "decoder_ffn_dim", 4096),
        norm_eps=1e-5,
        norm_position="post",
        activation=choose(config, "activation_function", ACTIVATIONS, "gelu"),
        vocab_size=size(config, "vocab_size", 50265),
        embed_scale=get(config, "scale_embedding", False),
        embed_norm=get(config, "layernorm_embedding", True),
        positions="learned" if learned else "sincos",
        max_positions=size(config, "max_position_embeddings", 512),
        position_offset=LEARNED_OFFSET if learned else get(config, "pad_token_id", 1) + 1,
        final_norm=False,
        tie_word_embeddings=is_tied(config, names, True, head),
    )


def write_decoder(decoder: Decoder) -> Json:
    learned = decoder.positions == "learned"
    config = {
        "d_model": decoder.width,
        "decoder_layers": decoder.depth,
        "decoder_attention_heads": decoder.heads,
        "decoder_ffn_dim": decoder.mlp_width,
        "activation_function": HUB_ACTIVATIONS[decoder.activation],
        "vocab_size": decoder.vocab_size,
        "scale_embedding": decoder.embed_scale,
        "layernorm_embedding": decoder.embed_norm,
        "use_learned_position_embeddings": learned,
        "max_position_embeddings": decoder.max_positions,
        "tie_word_embeddings": decoder.tie_word_embeddings,
    }
    return config if learned else config | {"pad_token_id": decoder.position_offset - 1}


def decoder_rows(
    decoder: Decoder, fusion: Fusion, prefix: str = "model.decoder.", head: str = HEAD
) -> list[Row]:
    found = [row(f"{prefix}embed_tokens.weight", "decoder/embedding/table")]
    if decoder.positions == "learned":
        found.append(row(f"{prefix}embed_positions.weight", "decoder/position_embedding/table"))
    if decoder.embed_norm:
        found += norm_rows(f"{prefix}layernorm_embedding", "decoder/embedding_norm")
    if not decoder.tie_word_embeddings:
        found.append(row(head, "decoder/free_head/kernel", "V D -> D V"))
    for n, (block, turn) in enumerate(places(fusion.sublayers(decoder.depth), "self")):
        hub, ours = f"{prefix}layers.{n}", f"decoder/{block}"
        for theirs, part in {"self_attn": "self", "encoder_attn": "cross"}.items():
            found += attention_rows(
                f"{hub}.{theirs}", f"{ours}/{part}", decoder, turn, out="out_proj"
            )
            found += norm_rows(f"{hub}.{theirs}_layer_norm", f"{ours}/{part}_norm", turn)
        found += dense_rows(f"{hub}.fc1", f"{ours}/mlp/up", "F D -> D F", True, turn)
        found += dense_rows(f"{hub}.fc2", f"{ours}/mlp/down", "D F -> F D", True, turn)
        found += norm_rows(f"{hub}.final_layer_norm", f"{ours}/mlp_norm", turn)
    return found
