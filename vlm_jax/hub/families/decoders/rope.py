"""RoPE in config.json: `rope_theta`, `rope_scaling` (transformers 4.x), `rope_parameters` (5.x)."""

from collections.abc import Mapping

from vlm_jax.config import CheckpointError, Rope
from vlm_jax.hub.families.family import (
    Json,
    get_or,
    positive_int,
    reject_unless,
)

# mrope: as default; the family reads its sections.
KNOWN = ("default", "mrope", "linear", "dynamic", "llama3", "longrope")


def rope_from_hf(
    config: Mapping, theta: float = 10_000.0, fraction: float = 1.0, max_positions: int = 0
) -> Rope:
    """Reads the RoPE settings.

    Args:
      theta: default of the family.
      fraction: of the head dimension that is rotated, by default.
      max_positions: of the model.

    Raises:
      CheckpointError: the scaling is not supported.
    """
    parameters = config.get("rope_parameters") or {}
    # Gemma 3 has parameters for each type of layer.
    parameters = parameters.get("full_attention", parameters) or {}
    scaling = {**(config.get("rope_scaling") or {}), **parameters}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in KNOWN:
        raise CheckpointError(
            f"config.json: rope_type {kind!r} is not supported (choose from {', '.join(KNOWN)})."
        )
    rope = Rope(
        theta=float(get_or(scaling, "rope_theta", get_or(config, "rope_theta", theta))),
        fraction=float(
            get_or(
                scaling, "partial_rotary_factor", get_or(config, "partial_rotary_factor", fraction)
            )
        ),
    )
    return _scaled(rope, kind, scaling, config, max_positions)


def _scaled(rope: Rope, kind: str, scaling: Mapping, config: Mapping, max_positions: int) -> Rope:
    shared = {"theta": rope.theta, "fraction": rope.fraction}
    if kind in ("linear", "dynamic"):
        return Rope(**shared, scaling=kind, factor=float(scaling["factor"]))
    if kind == "llama3":
        return Rope(
            **shared,
            scaling="llama3",
            factor=float(scaling["factor"]),
            low_freq_factor=float(scaling["low_freq_factor"]),
            high_freq_factor=float(scaling["high_freq_factor"]),
            original_positions=int(scaling["original_max_position_embeddings"]),
        )
    if kind == "longrope":
        reject_unless(scaling, "attention_factor", None)
        nested = get_or(scaling, "original_max_position_embeddings", max_positions)
        original = positive_int(config, "original_max_position_embeddings", nested)
        return Rope(
            **shared,
            scaling="longrope",
            factor=float(get_or(scaling, "factor", max_positions / original)),
            original_positions=original,
            short_factors=tuple(map(float, scaling["short_factor"])),
            long_factors=tuple(map(float, scaling["long_factor"])),
        )
    return rope


def rope_to_hf(rope: Rope, max_positions: int = 0) -> Json:
    """Writes the keys of transformers 4.x."""
    config = {"rope_theta": rope.theta, "rope_scaling": _scaling(rope, max_positions)}
    if rope.scaling == "longrope":
        config["original_max_position_embeddings"] = rope.original_positions
    return config


def _scaling(rope: Rope, max_positions: int) -> Json | None:
    if rope.sections and rope.interleaved:
        sections = {"mrope_section": list(rope.sections), "mrope_interleaved": True}
        return {"rope_type": "default"} | sections
    if rope.sections:
        return {"type": "mrope", "mrope_section": list(rope.sections)}
    if rope.scaling in ("linear", "dynamic"):
        return {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling == "llama3":
        return {
            "rope_type": "llama3",
            "factor": rope.factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_positions,
        }
    if rope.scaling == "longrope":
        scaling = {
            "type": "longrope",
            "short_factor": list(rope.short_factors),
            "long_factor": list(rope.long_factors),
        }
        # transformers 4.x accepts only these three keys and computes the factor from the lengths.
        if rope.factor != max_positions / rope.original_positions:
            scaling["factor"] = rope.factor
        return scaling
    return None
