"""Llama 3.2 Vision: tiles pass an encoder of two stages and are read by gated cross-attention between Llama's blocks.

Both ways to take the encoder's taps (see `mllama_vision`) are families here; a config.json that names none is Meta's.
"""

import functools
from collections.abc import Collection
from dataclasses import replace

from vlm_jax.config import (
    CheckpointError,
    Decoder,
    Experiment,
    Fusion,
    Projector,
)
from vlm_jax.hub.families import llama
from vlm_jax.hub.families.family import (
    Family,
    HfProcessor,
    Json,
    get_or,
    lookup,
    reject_unless,
)
from vlm_jax.hub.families.llama import attention_rows, dense_rows, norm_row
from vlm_jax.hub.families.mllama_vision import (
    TAPS,
    vision_from_hf,
    vision_rows,
    vision_to_hf,
)
from vlm_jax.hub.families.table import Row, layers_with, row
from vlm_jax.nn.blocks import Sublayers

TEXT, HEAD = "language_model.model.", "language_model.lm_head.weight"
EXTRA_TOKENS = 8  # rows of the embedding beyond the vocabulary; the first is the image token
TEXT_DEFAULTS = {
    "vocab_size": 128256,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "rope_theta": 500_000.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
}
NOT_READ = {
    "attention_bias": False,
    "mlp_bias": False,
    "head_dim": None,
    "tie_word_embeddings": False,
}


def config_from_hf(config: Json, names: Collection[str], taps: str) -> Experiment:
    text, vision = get_or(config, "text_config", {}), get_or(config, "vision_config", {})
    reject_unless(text, "tie_word_embeddings", False, None)
    decoder = llama.decoder_from_hf(TEXT_DEFAULTS | llama.drop_nulls(text) | NOT_READ, tied=False)
    fusion = fusion_from_hf(text, decoder.depth)
    decoder = replace(
        decoder, depth=decoder.depth - len(fusion.cross_layers), extra_tokens=EXTRA_TOKENS
    )
    return Experiment(
        vision=vision_from_hf(vision, taps),
        projector=Projector("linear"),
        fusion=fusion,
        decoder=decoder,
    )


def fusion_from_hf(text: Json, layers: int) -> Fusion:
    """transformers counts all layers; we count those of self-attention, and name the one after a cross layer."""
    numbers = sorted(
        {n for n in get_or(text, "cross_attention_layers", range(3, 40, 5)) if n < layers}
    )
    if not numbers:
        raise CheckpointError(
            f"config.json: cross_attention_layers names none of the {layers} layers of text_config."
        )
    before = tuple(n - crossed for crossed, n in enumerate(numbers))
    return Fusion(
        "cross_attention",
        cross_layers=before,
        gated=True,
        qk_norm=True,
        placeholder=True,
        tokens_without_image="attend_all",
    )


def config_to_hf(cfg: Experiment, taps: str) -> Json:
    numbers = layer_numbers(cfg.fusion.sublayers(cfg.decoder.depth))
    text = {
        key: value for key, value in llama.decoder_to_hf(cfg.decoder).items() if key not in NOT_READ
    }
    text |= {
        "model_type": "mllama_text_model",
        "num_hidden_layers": len(numbers["self"]) + len(numbers["cross"]),
        "cross_attention_layers": numbers["cross"],
        "tie_word_embeddings": False,
        "rope_scaling": text["rope_scaling"]
        or {"rope_type": "default"},  # transformers 4 wants to read its type
        "pad_token_id": None,  # the default, 128004, is beyond a small vocabulary
    }
    return {
        "architectures": ["MllamaForConditionalGeneration"],
        "model_type": "mllama",
        "text_config": text,
        "vision_config": vision_to_hf(cfg.vision, taps),
    }


def layer_numbers(blocks: tuple[Sublayers, ...]) -> dict[str, list[int]]:
    """The numbers of the layers of each kind where all are counted together, as transformers does."""
    kinds = [kind for block in blocks for kind in ("cross", "self") if kind in block]
    return {
        kind: [n for n, found in enumerate(kinds) if found == kind] for kind in ("cross", "self")
    }


def param_table(cfg: Experiment) -> list[Row]:
    found = llama.outer_rows(cfg.decoder, TEXT, HEAD)
    blocks = cfg.fusion.sublayers(cfg.decoder.depth)
    for kind, of_layer in {"self": llama.block_rows, "cross": cross_rows}.items():
        for n, (block, layer) in zip(layer_numbers(blocks)[kind], layers_with(blocks, kind)):
            found += of_layer(f"{TEXT}layers.{n}", f"decoder/{block}", cfg.decoder, layer)
    found += dense_rows("multi_modal_projector", "projector/linear", "D E -> E D", True)
    return found + vision_rows(cfg.vision)


def cross_rows(hf: str, param: str, decoder: Decoder, layer: int) -> list[Row]:
    """A gated layer that reads the image."""
    return [
        *attention_rows(f"{hf}.cross_attn", f"{param}/cross", decoder, layer),
        norm_row(f"{hf}.cross_attn.q_norm", f"{param}/cross/query_norm", layer),
        norm_row(f"{hf}.cross_attn.k_norm", f"{param}/cross/key_norm", layer),
        *llama.mlp_rows(f"{hf}.mlp", f"{param}/cross_mlp", decoder, layer),
        norm_row(f"{hf}.input_layernorm", f"{param}/cross_norm", layer),
        norm_row(f"{hf}.post_attention_layernorm", f"{param}/cross_mlp_norm", layer),
        row(f"{hf}.cross_attn_attn_gate", f"{param}/cross_gate", layer=layer),
        row(f"{hf}.cross_attn_mlp_gate", f"{param}/cross_mlp_gate", layer=layer),
    ]


RENAMES = (  # the modules of transformers 5 in memory
    (r"^model\.language_model\.", TEXT),
    (r"^lm_head\.weight$", HEAD),
    (r"^model\.(vision_model|multi_modal_projector)\.", r"\1."),
)
PROCESSOR = HfProcessor(
    "MllamaProcessor", adds_bos=True, needs_bos=True, needs_placeholder=True, resize="pad"
)
BY_TAPS = {
    taps: Family(
        "mllama",
        functools.partial(config_from_hf, taps=taps),
        functools.partial(config_to_hf, taps=taps),
        param_table,
        RENAMES,
        processor=PROCESSOR,
    )
    for taps in ("input", "output")
}
MLLAMA = BY_TAPS["input"]


def family_of_taps(config: Json, taps: str | None) -> Family:
    """The family with the given taps; None: those that config.json names, or "input".

    Raises:
      CheckpointError: other taps than "input" and "output".
    """
    return lookup(
        {TAPS: taps or get_or(config, "vision_config", {}).get(TAPS)}, TAPS, BY_TAPS, "input"
    )
