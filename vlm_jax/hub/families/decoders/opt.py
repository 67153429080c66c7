"""OPT (Zhang et al. 2022), with the tensor names of TrOCR's decoder.

Reference: transformers, models/opt/modeling_opt.py. OPT 350M, with embeddings narrower than its
blocks, is refused.
"""

from collections.abc import Collection

from vlm_jax.config import Decoder, Experiment
from vlm_jax.hub.families.decoders import trocr
from vlm_jax.hub.families.decoders.llama import HEAD, is_tied
from vlm_jax.hub.families.family import (
    ACTIVATIONS,
    HUB_ACTIVATIONS,
    Family,
    Json,
    get_or,
    lookup,
    positive_int,
    reject_unless,
    text_experiment,
)
from vlm_jax.hub.families.table import Row

NORM_EPS = 1e-5  # of all LayerNorms, in no file


def decoder_from_hf(config: Json, names: Collection[str], head: str = HEAD) -> Decoder:
    """Reads config.json; a missing key has the default of OPTConfig."""
    width = positive_int(config, "hidden_size", 768)
    reject_unless(config, "word_embed_proj_dim", width, None)
    reject_unless(config, "layer_norm_elementwise_affine", True, None)
    is_pre_norm = bool(get_or(config, "do_layer_norm_before", True))
    bias = bool(get_or(config, "enable_bias", True))
    return Decoder(
        width=width,
        depth=positive_int(config, "num_hidden_layers", 12),
        heads=positive_int(config, "num_attention_heads", 12),
        mlp_width=positive_int(config, "ffn_dim", 3072),
        norm_eps=NORM_EPS,
        norm_position="pre" if is_pre_norm else "post",
        activation=lookup(config, "activation_function", ACTIVATIONS, "relu"),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        vocab_size=positive_int(config, "vocab_size", 50272),
        positions="learned",
        max_positions=positive_int(config, "max_position_embeddings", 2048),
        position_offset=trocr.LEARNED_OFFSET,
        final_norm=is_pre_norm and not get_or(config, "_remove_final_layer_norm", False),
        tie_word_embeddings=is_tied(config, names, True, head),
    )


def decoder_to_hf(decoder: Decoder) -> Json:
    is_pre_norm = decoder.norm_position == "pre"
    return {
        "hidden_size": decoder.width,
        "word_embed_proj_dim": decoder.width,
        "num_hidden_layers": decoder.depth,
        "num_attention_heads": decoder.heads,
        "ffn_dim": decoder.mlp_width,
        "activation_function": HUB_ACTIVATIONS[decoder.activation],
        "do_layer_norm_before": is_pre_norm,
        "_remove_final_layer_norm": is_pre_norm and not decoder.final_norm,
        "enable_bias": decoder.mlp_bias,
        "vocab_size": decoder.vocab_size,
        "max_position_embeddings": decoder.max_positions,
        "tie_word_embeddings": decoder.tie_word_embeddings,
    }


def config_from_hf(config: Json, names: Collection[str]) -> Experiment:
    return text_experiment(decoder_from_hf(config, names))


def config_to_hf(cfg: Experiment) -> Json:
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        **decoder_to_hf(cfg.decoder),
    }


def param_table(cfg: Experiment) -> list[Row]:
    return trocr.decoder_rows(cfg.decoder, cfg.fusion, head=HEAD)


OPT = Family(
    "opt",
    config_from_hf,
    config_to_hf,
    param_table,
    renames=((r"^decoder\.", "model.decoder."),),  # files of a model without a head
    counts_positions=True,
)
