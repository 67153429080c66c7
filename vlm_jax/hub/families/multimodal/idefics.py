"""Idefics (version 1): CLIP, a Perceiver resampler, and gated cross-attention between Llama's
blocks (Laurençon et al. 2023, OBELICS, section 4.1; transformers, models/idefics)."""

from collections.abc import Collection
from dataclasses import replace

from vlm_jax.config import CheckpointError, Decoder, Experiment, Fusion, Projector
from vlm_jax.hub.families.decoders import llama
from vlm_jax.hub.families.decoders.gpt2 import norm_rows
from vlm_jax.hub.families.decoders.llama import attention_rows, dense_rows, norm_row
from vlm_jax.hub.families.encoders import clip
from vlm_jax.hub.families.family import (
    Family,
    HfProcessor,
    Json,
    get_or,
    lookup,
    positive_int,
    reject_unless,
)
from vlm_jax.hub.families.table import Row, layers_with, row

TEXT, HEAD, ADDED_HEAD = "model.", "lm_head.weight", "lm_head.additional_fc.weight"
TOWER, RESAMPLER = "model.vision_model.", "model.perceiver_resampler"
UNKNOWN = ("head_dim", "num_key_value_heads", "attention_bias", "mlp_bias")  # to IdeficsConfig
RESAMPLER_EPS = 1e-5  # of the resampler's LayerNorms, in no file
VISION_DEFAULTS = {  # of IdeficsVisionConfig
    "embed_dim": 768,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "patch_size": 14,
    "hidden_act": "gelu",
}
GATES = {"float": "scalar", "vector": "vector"}  # by alpha_type
GATE_PATTERNS = {"scalar": "", "vector": "1 1 D -> D"}


def config_from_hf(config: Json, names: Collection[str]) -> Experiment:
    tower = VISION_DEFAULTS | llama.drop_nulls(get_or(config, "vision_config", {}))
    text = {key: value for key, value in config.items() if key not in UNKNOWN}
    decoder = llama.decoder_from_hf(text, llama.is_tied(config, names, False))
    every = positive_int(config, "cross_layer_interval", 1)
    if decoder.depth % every:
        raise CheckpointError(
            f"config.json: cross_layer_interval {every} is not supported: it must divide "
            f"num_hidden_layers {decoder.depth}."
        )
    return Experiment(
        vision=replace(
            clip.vision_from_hf(tower | {"hidden_size": tower["embed_dim"]}),
            keep_class_token=True,
        ),
        projector=projector_from_hf(config),
        fusion=Fusion(
            "cross_attention",
            cross_every=every,
            gated=True,
            gate=lookup(config, "alpha_type", GATES, "float"),
            qk_norm=bool(get_or(config, "qk_layer_norms", False)),
            placeholder=True,
            tokens_without_image="mask_attention",
        ),
        decoder=replace(decoder, added_tokens=added_tokens(config)),
    )


def added_tokens(config: Json) -> int:
    """Reads the number of tokens after the vocabulary."""
    if not get_or(config, "additional_vocab_size", 0):
        return 0
    return positive_int(config, "additional_vocab_size")


def projector_from_hf(config: Json) -> Projector:
    """Reads the resampler, whose blocks have the encoder's width; without it, memory is patches."""
    if not get_or(config, "use_resampler", False):
        return Projector("none")
    resampler = get_or(config, "perceiver_config", {})
    reject_unless(resampler, "use_resampler", True, False, None)
    return Projector(
        "resampler",
        queries=positive_int(resampler, "resampler_n_latents", 64),
        depth=positive_int(resampler, "resampler_depth", 6),
        heads=positive_int(resampler, "resampler_n_heads", 16),
        head_dim=positive_int(resampler, "resampler_head_dim", 96),
        qk_norm=bool(get_or(resampler, "qk_layer_norms_perceiver", False)),
        block_norms=True,
        norm_eps=RESAMPLER_EPS,
        projection="none",
        block_activation="relu",
        bias=False,
    )


def config_to_hf(cfg: Experiment) -> Json:
    fusion, decoder, projector = cfg.fusion, cfg.decoder, cfg.projector
    text = llama.decoder_to_hf(decoder)
    text = {key: value for key, value in text.items() if key not in UNKNOWN}
    vision = clip.vision_to_hf(cfg.vision) | {"model_type": "idefics_vision"}
    vision["embed_dim"] = vision.pop("hidden_size")
    config = {
        "architectures": ["IdeficsForVisionText2Text"],
        "model_type": "idefics",
        **text,
        "additional_vocab_size": decoder.added_tokens,
        "cross_layer_interval": cross_layer_interval(cfg),
        "alpha_type": {gate: name for name, gate in GATES.items()}[fusion.gate],
        "qk_layer_norms": fusion.qk_norm,
        "use_resampler": projector.kind == "resampler",
        "vision_config": vision,
    }
    if projector.kind != "resampler":
        return config
    return config | {
        "perceiver_config": {
            "use_resampler": True,
            "resampler_n_latents": projector.queries,
            "resampler_depth": projector.depth,
            "resampler_n_heads": projector.heads,
            "resampler_head_dim": projector.head_dim,
            "qk_layer_norms_perceiver": projector.qk_norm,
        }
    }


def cross_layer_interval(cfg: Experiment) -> int:
    """Returns the distance of the cross-attention blocks, however the fusion places them."""
    crossings = sum("cross" in block for block in cfg.fusion.sublayers(cfg.decoder.depth))
    return max(1, cfg.decoder.depth // max(1, crossings))


def param_table(cfg: Experiment) -> list[Row]:
    decoder, projector = cfg.decoder, cfg.projector
    rows = llama.decoder_rows(decoder, cfg.fusion, TEXT, HEAD)
    if decoder.added_tokens:
        rows.append(
            row(f"{TEXT}embed_tokens.additional_embedding.weight", "decoder/added_embedding/table")
        )
        if not decoder.tie_word_embeddings:
            rows.append(row(ADDED_HEAD, "decoder/added_head/kernel", "V D -> D V"))
    crossings = layers_with(cfg.fusion.sublayers(decoder.depth), "cross")
    for n, (block, layer) in enumerate(crossings):
        rows += cross_rows(f"{TEXT}gated_cross_attn_layers.{n}", f"decoder/{block}", cfg, layer)
    if projector.kind == "resampler":
        rows += resampler_rows(projector)
    return rows + clip.vision_rows(cfg.vision, TOWER, "vision/")


def cross_rows(hf: str, param: str, cfg: Experiment, layer: int) -> list[Row]:
    """Rows of a gated cross-attention layer."""
    decoder, gate = cfg.decoder, GATE_PATTERNS[cfg.fusion.gate]
    rows = [
        *attention_rows(f"{hf}.cross_attn", f"{param}/cross", decoder, layer),
        *llama.mlp_rows(f"{hf}.mlp", f"{param}/cross_mlp", decoder, layer),
        norm_row(f"{hf}.input_layernorm", f"{param}/cross_norm", layer),
        norm_row(f"{hf}.post_attention_layernorm", f"{param}/cross_mlp_norm", layer),
        row(f"{hf}.alpha_cross_attn", f"{param}/cross_gate", gate, layer),
        row(f"{hf}.alpha_dense", f"{param}/cross_mlp_gate", gate, layer),
    ]
    if cfg.fusion.qk_norm:
        for name, norm in {"q": "query_norm", "k": "key_norm"}.items():
            rows.append(
                norm_row(f"{hf}.cross_attn.{name}_layer_norm", f"{param}/cross/{norm}", layer)
            )
    return rows


def resampler_rows(projector: Projector) -> list[Row]:
    """Rows of the resampler, whose blocks are not stacked."""
    biased = Decoder(qkv_bias=projector.bias, out_bias=projector.bias)
    rows = [
        row(f"{RESAMPLER}.latents", "projector/queries"),
        *norm_rows(f"{RESAMPLER}.layer_norm", "projector/final_norm"),
    ]
    for n in range(projector.depth):
        hf, param = f"{RESAMPLER}.blocks.{n}", f"projector/block_{n}"
        attention, mlp = f"{hf}.0", f"{hf}.1"
        rows += [
            *norm_rows(f"{attention}.context_layer_norm", f"{param}/latent_memory_norm"),
            *norm_rows(f"{attention}.latents_layer_norm", f"{param}/latent_norm"),
            *attention_rows(attention, f"{param}/latent", biased, None, out="output_proj"),
            *norm_rows(f"{mlp}.ln", f"{param}/mlp_norm"),
            *dense_rows(f"{mlp}.fc", f"{param}/mlp/up", "F D -> D F", projector.bias),
            *dense_rows(f"{mlp}.c_proj", f"{param}/mlp/down", "D F -> F D", projector.bias),
        ]
        if projector.qk_norm:
            rows += norm_rows(f"{attention}.q_layer_norm", f"{param}/latent/query_norm")
            rows += norm_rows(f"{attention}.k_layer_norm", f"{param}/latent/key_norm")
    return rows


IDEFICS = Family(
    "idefics",
    config_from_hf,
    config_to_hf,
    param_table,
    processor=HfProcessor(
        "IdeficsProcessor",
        adds_bos=True,
        needs_bos=True,
        needs_placeholder=True,
        resize="squash",
        has_prompt_format=True,
        image_processor="IdeficsImageProcessor",
    ),
    counts_positions=True,
)
