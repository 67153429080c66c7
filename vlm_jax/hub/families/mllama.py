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
    Json,
    choose,
    get,
    refuse,
)
from vlm_jax.hub.families.llama import attention_rows, dense_rows, norm_row
from vlm_jax.hub.families.mllama_vision import (
    TAPS,
    read_vision,
    vision_rows,
    write_vision,
)
from vlm_jax.hub.families.table import Row, places, row
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


def read(config: Json, names: Collection[str], taps: str) -> Experiment:
    text, vision = get(config, "text_config", {}), get(config, "vision_config", {})
    refuse(text, "tie_word_embeddings", False, None)
    decoder = llama.read_decoder(TEXT_DEFAULTS | llama.given(text) | NOT_READ, tied=False)
    fusion = read_fusion(text, decoder.depth)
    decoder = replace(
        decoder, depth=decoder.depth - len(fusion.cross_layers), extra_tokens=EXTRA_TOKENS
    )
    return Experiment(
        vision=read_vision(vision, taps),
        projector=Projector("linear"),
        fusion=fusion,
        decoder=decoder,
    )


def read_fusion(text: Json, layers: int) -> Fusion:
    """transformers counts all layers; we count those of self-attention, and name the one after a cross layer."""
    numbers = sorted(
        {n for n in get(text, "cross_attention_layers", range(3, 40, 5)) if n < layers}
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


def write(cfg: Experiment, taps: str) -> Json:
    numbers = layer_numbers(cfg.fusion.sublayers(cfg.decoder.depth))
    text = {
        key: value for key, value in llama.write_decoder(cfg.decoder).items() if key not in NOT_READ
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
        "vision_config": write_vision(cfg.vision, taps),
    }


def layer_numbers(blocks: tuple[Sublayers, ...]) -> dict[str, list[int]]:
    """The numbers of the layers of each kind where all are counted together, as transformers does."""
    kinds = [kind for block in blocks for kind in ("cross", "self") if kind in block]
    return {
        kind: [n for n, found in enumerate(kinds) if found == kind] for kind in ("cross", "self")
    }


def rows(cfg: Experiment) -> list[Row]:
    found = llama.outer_rows(cfg.decoder, TEXT, HEAD)
    blocks = cfg.fusion.sublayers(cfg.decoder.depth)
    for kind, of_layer in {"self": llama.block_rows, "cross": cross_rows}.items():
        for n, (block, turn) in zip(layer_numbers(blocks)[kind], places(blocks, kind)):
            found += of_layer(f"{TEXT}layers.{n}", f"decoder/{block}", cfg.decoder, turn)
    found += dense_rows("multi_modal_projector", "projector/linear", "D E -> E D", True)
    return found + vision_rows(cfg.vision)


def cross_rows(hub: str, ours: str, decoder: Decoder, turn: int) -> list[Row]:
    """A gated layer that reads the image."""
    return [
        *attention_rows(f"{hub}.cross_attn", f"{ours}/cross", decoder, turn),
        norm_row(f"{hub}.cross_attn.q_norm", f"{ours}/cross/query_norm", turn),
        norm_row(f"{hub}.cross_attn.k_norm", f"{ours}/cross/key_norm", turn),
        *llama.mlp_rows(f"{hub}.mlp", f"{ours}/cross_mlp", decoder, turn),
        norm_row(f"{hub}.input_layernorm", f"{ours}/cross_norm", turn),
        norm_row(f"{hub}.post_attention_layernorm", f"{ours}/cross_mlp_norm", turn),
        row(f"{hub}.cross_attn_attn_gate", f"{ours}/cross_gate", turn=turn),
        row(f"{hub}.cross_attn_mlp_gate", f"{ours}/cross_mlp_gate", turn=turn),
    ]


RENAMES = (  # the modules of transformers 5 in memory
    (r"^model\.language_model\.", TEXT),
    (r"^lm_head\.weight$", HEAD),
    (r"^model\.(vision_model|multi_modal_projector)\.", r"\1."),
)
BY_TAPS = {
    taps: Family(
        "mllama",
        functools.partial(read, taps=taps),
        functools.partial(write, taps=taps),
        rows,
        RENAMES,
    )
    for taps in ("input", "output")
}
MLLAMA = BY_TAPS["input"]


def family_of_taps(config: Json, taps: str | None) -> Family:
    """The family with the given taps; None: those that config.json names, or "input".

    Raises:
      CheckpointError: other taps than "input" and "output".
    """
    return choose(
        {TAPS: taps or get(config, "vision_config", {}).get(TAPS)}, TAPS, BY_TAPS, "input"
    )
