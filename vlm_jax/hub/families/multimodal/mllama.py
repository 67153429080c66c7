"""Llama 3.2 Vision: a two-stage tile encoder and gated cross-attention between Llama's blocks.

Both conventions of the encoder's intermediate layers (see `mllama_vision`) are families here; the
default of a config.json that names none is Meta's.
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
from vlm_jax.hub.families.decoders import llama
from vlm_jax.hub.families.decoders.llama import attention_rows, dense_rows, norm_row
from vlm_jax.hub.families.encoders.mllama_vision import (
    INTERMEDIATE_LAYERS,
    vision_from_hf,
    vision_rows,
    vision_to_hf,
)
from vlm_jax.hub.families.family import (
    Family,
    HfProcessor,
    Json,
    get_or,
    lookup,
    reject_unless,
)
from vlm_jax.hub.families.table import Row, layers_with, row
from vlm_jax.nn.blocks import Sublayers

TEXT, HEAD = "language_model.model.", "language_model.lm_head.weight"
EXTRA_TOKENS = 8  # embedding rows beyond the vocabulary; the first is the image token
TEXT_DEFAULTS = {
    "vocab_size": 128256,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "rope_theta": 500_000.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
}
UNUSED = {
    "attention_bias": False,
    "mlp_bias": False,
    "head_dim": None,
    "tie_word_embeddings": False,
}


def config_from_hf(config: Json, names: Collection[str], intermediate_layers: str) -> Experiment:
    text, vision = get_or(config, "text_config", {}), get_or(config, "vision_config", {})
    reject_unless(text, "tie_word_embeddings", False, None)
    decoder = llama.decoder_from_hf(TEXT_DEFAULTS | llama.drop_nulls(text) | UNUSED, tied=False)
    fusion = fusion_from_hf(text, decoder.depth)
    decoder = replace(
        decoder, depth=decoder.depth - len(fusion.cross_layers), extra_tokens=EXTRA_TOKENS
    )
    return Experiment(
        vision=vision_from_hf(vision, intermediate_layers),
        projector=Projector("linear"),
        fusion=fusion,
        decoder=decoder,
    )


def fusion_from_hf(text: Json, layers: int) -> Fusion:
    """Reads the positions of the cross-attention layers.

    transformers counts all layers; `cross_layers` counts self-attention layers and names the next
    one.
    """
    numbers = sorted(
        {n for n in get_or(text, "cross_attention_layers", range(3, 40, 5)) if n < layers}
    )
    if not numbers:
        raise CheckpointError(
            f"config.json: cross_attention_layers has none of the {layers} layers of text_config."
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


def config_to_hf(cfg: Experiment, intermediate_layers: str) -> Json:
    numbers = layer_numbers(cfg.fusion.sublayers(cfg.decoder.depth))
    text = {
        key: value for key, value in llama.decoder_to_hf(cfg.decoder).items() if key not in UNUSED
    }
    text |= {
        "model_type": "mllama_text_model",
        "num_hidden_layers": len(numbers["self"]) + len(numbers["cross"]),
        "cross_attention_layers": numbers["cross"],
        "tie_word_embeddings": False,
        # transformers 4 requires a type.
        "rope_scaling": text["rope_scaling"] or {"rope_type": "default"},
        # The default, 128004, may be beyond the vocabulary.
        "pad_token_id": None,
    }
    return {
        "architectures": ["MllamaForConditionalGeneration"],
        "model_type": "mllama",
        "text_config": text,
        "vision_config": vision_to_hf(cfg.vision, intermediate_layers),
    }


def layer_numbers(blocks: tuple[Sublayers, ...]) -> dict[str, list[int]]:
    """Numbers of the layers of each kind, counted together as transformers does."""
    numbers = {"cross": [], "self": []}
    count = 0
    for block in blocks:
        for kind in numbers:
            if kind in block:
                numbers[kind].append(count)
                count += 1
    return numbers


def param_table(cfg: Experiment) -> list[Row]:
    rows = llama.outer_rows(cfg.decoder, TEXT, HEAD)
    blocks = cfg.fusion.sublayers(cfg.decoder.depth)
    for kind, layer_rows in {"self": llama.block_rows, "cross": cross_rows}.items():
        for n, (block, layer) in zip(layer_numbers(blocks)[kind], layers_with(blocks, kind)):
            rows += layer_rows(f"{TEXT}layers.{n}", f"decoder/{block}", cfg.decoder, layer)
    rows += dense_rows("multi_modal_projector", "projector/linear", "D E -> E D", True)
    return rows + vision_rows(cfg.vision)


def cross_rows(hf: str, param: str, decoder: Decoder, layer: int) -> list[Row]:
    """Rows of a gated cross-attention layer."""
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


RENAMES = (  # module names of transformers 5
    (r"^model\.language_model\.", TEXT),
    (r"^lm_head\.weight$", HEAD),
    (r"^model\.(vision_model|multi_modal_projector)\.", r"\1."),
)
MODULE_NAMES = (  # the inverse
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(vision_model|multi_modal_projector)\.", r"model.\1."),
)
PROCESSOR = HfProcessor(
    "MllamaProcessor", adds_bos=True, needs_bos=True, needs_placeholder=True, resize="pad"
)
BY_INTERMEDIATE_LAYERS = {
    intermediate_layers: Family(
        "mllama",
        functools.partial(config_from_hf, intermediate_layers=intermediate_layers),
        functools.partial(config_to_hf, intermediate_layers=intermediate_layers),
        param_table,
        RENAMES,
        processor=PROCESSOR,
        module_names=MODULE_NAMES,
    )
    for intermediate_layers in ("input", "output")
}
MLLAMA = BY_INTERMEDIATE_LAYERS["input"]


def select_family(config: Json, intermediate_layers: str | None) -> Family:
    """Returns the family with these intermediate_layers; None: from config.json, or "input".

    Raises:
      CheckpointError: the intermediate_layers are neither "input" nor "output".
    """
    return lookup(
        {
            INTERMEDIATE_LAYERS: intermediate_layers
            or get_or(config, "vision_config", {}).get(INTERMEDIATE_LAYERS)
        },
        INTERMEDIATE_LAYERS,
        BY_INTERMEDIATE_LAYERS,
        "input",
    )
