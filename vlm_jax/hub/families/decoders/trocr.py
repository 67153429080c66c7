"""TrOCR's decoder: BART's, with post-norm (transformers, models/trocr/modeling_trocr.py)."""

from collections.abc import Collection

from vlm_jax.config import Decoder, Fusion
from vlm_jax.hub.families.decoders.gpt2 import norm_rows
from vlm_jax.hub.families.decoders.llama import attention_rows, dense_rows, is_tied
from vlm_jax.hub.families.family import (
    ACTIVATIONS,
    HUB_ACTIVATIONS,
    Json,
    get_or,
    lookup,
    positive_int,
    resolve_aliases,
)
from vlm_jax.hub.families.table import Row, layers_with, row

HEAD = "output_projection.weight"
LEARNED_OFFSET = 2  # the first token has row 2 of the position table

# `attribute_map` of transformers' TrOCRConfig.
ALIASES = {
    "hidden_size": "d_model",
    "num_hidden_layers": "decoder_layers",
    "num_attention_heads": "decoder_attention_heads",
}


def decoder_from_hf(config: Json, names: Collection[str], head: str = HEAD) -> Decoder:
    config = resolve_aliases(config, ALIASES)
    learned = get_or(config, "use_learned_position_embeddings", True)
    return Decoder(
        width=positive_int(config, "d_model", 1024),
        depth=positive_int(config, "decoder_layers", 12),
        heads=positive_int(config, "decoder_attention_heads", 16),
        mlp_width=positive_int(config, "decoder_ffn_dim", 4096),
        norm_eps=1e-5,
        norm_position="post",
        activation=lookup(config, "activation_function", ACTIVATIONS, "gelu"),
        vocab_size=positive_int(config, "vocab_size", 50265),
        embed_scale=get_or(config, "scale_embedding", False),
        embed_norm=get_or(config, "layernorm_embedding", True),
        positions="learned" if learned else "sincos",
        max_positions=positive_int(config, "max_position_embeddings", 512),
        position_offset=LEARNED_OFFSET if learned else get_or(config, "pad_token_id", 1) + 1,
        final_norm=False,
        tie_word_embeddings=is_tied(config, names, True, head),
    )


def decoder_to_hf(decoder: Decoder) -> Json:
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
    """Rows of BART's blocks; in an encoder-decoder each has cross-attention."""
    rows = [row(f"{prefix}embed_tokens.weight", "decoder/embedding/table")]
    if decoder.positions == "learned":
        rows.append(row(f"{prefix}embed_positions.weight", "decoder/position_embedding/table"))
    if decoder.embed_norm:
        rows += norm_rows(f"{prefix}layernorm_embedding", "decoder/embedding_norm")
    if not decoder.tie_word_embeddings:
        rows.append(row(head, "decoder/free_head/kernel", "V D -> D V"))
    if decoder.final_norm:
        rows += norm_rows(f"{prefix}final_layer_norm", "decoder/final_norm")
    attention = {"self_attn": "self"}
    if fusion.is_encoder_decoder:
        attention["encoder_attn"] = "cross"
    for n, (block, layer) in enumerate(layers_with(fusion.sublayers(decoder.depth), "self")):
        hf, param = f"{prefix}layers.{n}", f"decoder/{block}"
        for name, sublayer in attention.items():
            rows += attention_rows(
                f"{hf}.{name}", f"{param}/{sublayer}", decoder, layer, out="out_proj"
            )
            rows += norm_rows(f"{hf}.{name}_layer_norm", f"{param}/{sublayer}_norm", layer)
        bias = decoder.mlp_bias
        rows += dense_rows(f"{hf}.fc1", f"{param}/mlp/up", "F D -> D F", bias, layer)
        rows += dense_rows(f"{hf}.fc2", f"{param}/mlp/down", "D F -> F D", bias, layer)
        rows += norm_rows(f"{hf}.final_layer_norm", f"{param}/mlp_norm", layer)
    return rows
