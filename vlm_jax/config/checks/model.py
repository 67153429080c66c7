"""Settings of fusion and decoder that are refused together."""

from vlm_jax.config import (
    ConfigError,
    Experiment,
)
from vlm_jax.config.checks.common import check_layers, is_changed, list_styles


def _fusion(cfg: Experiment) -> None:
    fusion = cfg.fusion
    if cfg.vision.newline_token and not fusion.image_in_sequence:
        raise ConfigError(
            "vision.newline_token True needs image tokens in the sequence, which fusion.kind "
            f"{fusion.kind} does not have: set it to False, or choose fusion.kind "
            f"{list_styles(lambda style: style.image_in_sequence)}."
        )
    if cfg.vision.newline_token and cfg.decoder.rope.sections:
        raise ConfigError(
            "vision.newline_token True has no row and column for decoder.rope.sections: leave one "
            "of them out."
        )
    if fusion.image_in_memory and not cfg.vision.has_encoder and cfg.vision.positions == "none":
        raise ConfigError(
            "vision.kind none with vision.positions none gives patches no positions in the "
            f"cross-attention of fusion.kind {fusion.kind}: set vision.positions to learned or "
            "sincos, or choose fusion.kind unified."
        )
    if fusion.placeholder and (fusion.image_in_sequence or not fusion.image_in_memory):
        raise ConfigError(
            "fusion.placeholder True marks images that are only in cross-attention, which "
            f"fusion.kind {fusion.kind} does not have: leave it out, or choose fusion.kind "
            f"{list_styles(lambda style: style.image_in_memory and not style.image_in_sequence)}."
        )
    if cfg.vision.keeps_aspect_in_tiles and fusion.image_in_sequence:
        raise ConfigError(
            "vision.resize pad with vision.tile_layouts works only with cross-attention, not with "
            f"fusion.kind {fusion.kind}: set it to squash."
        )
    if fusion.has_image_blocks and not fusion.image_in_sequence:
        raise ConfigError(
            "fusion.prefix bidirectional_images needs image tokens in the sequence, which "
            f"fusion.kind {fusion.kind} does not have: set it to causal, or choose fusion.kind "
            f"{list_styles(lambda style: style.image_in_sequence)}."
        )
    unused = [name for name in fusion.unused if is_changed(fusion, name)]
    if unused:
        name = unused[0]
        raise ConfigError(
            f"fusion.{name} {getattr(fusion, name)} has no effect with fusion.kind {fusion.kind}: "
            "leave it out, or choose fusion.kind "
            f"{list_styles(lambda style: name not in style.unused)}."
        )
    if fusion.gate != "scalar" and not fusion.gated:
        raise ConfigError(
            f"fusion.gate {fusion.gate} has no effect without gates: set fusion.gated to True, or "
            "leave fusion.gate out."
        )
    if fusion.cross_layers and is_changed(fusion, "cross_every"):
        raise ConfigError(
            f"fusion.cross_every {fusion.cross_every} and fusion.cross_layers "
            f"{list(fusion.cross_layers)} both place the cross-attention blocks: leave one out."
        )
    outside = [i for i in fusion.cross_layers if not 0 <= i <= cfg.decoder.depth]
    if outside:
        raise ConfigError(
            f"fusion.cross_layers {outside} are not blocks of a decoder of decoder.depth "
            f"{cfg.decoder.depth}: choose 0 to {cfg.decoder.depth} (after the last)."
        )
    shared = cfg.data.questions_per_row > 1 and not cfg.data.is_conversations
    if fusion.is_prefix_lm and shared:
        raise ConfigError(
            "fusion.prefix bidirectional lets an image attend to its question, so "
            f"data.questions_per_row {cfg.data.questions_per_row} questions cannot share an image: "
            "set it to 1, or fusion.prefix to causal."
        )


def _room(cfg: Experiment) -> None:
    image_tokens = cfg.row_length - cfg.data.text_length
    tiles = f" (vision.tiles {cfg.vision.tiles})" if cfg.vision.cut_tiles > 1 else ""
    if cfg.row_length > cfg.decoder.max_positions:
        raise ConfigError(
            f"decoder.max_positions {cfg.decoder.max_positions} has no room for the {image_tokens} "
            f"image tokens of a row{tiles} and data.text_length {cfg.data.text_length}: it must be "
            f"at least {cfg.row_length}."
        )


def _sliding(cfg: Experiment) -> None:
    window, layers, depth = (
        cfg.decoder.sliding_window,
        cfg.decoder.sliding_layers,
        cfg.decoder.depth,
    )
    if layers and window is None:
        raise ConfigError(
            "decoder.sliding_layers needs decoder.sliding_window, the number of tokens that a "
            "token attends to."
        )
    if window is not None and not layers:
        raise ConfigError(
            f"decoder.sliding_window {window} applies to decoder.sliding_layers alone: list "
            "layers, or leave it out."
        )
    check_layers("decoder.sliding_layers", layers, depth)


def _rope_sections(cfg: Experiment) -> None:
    decoder, sections = cfg.decoder, cfg.decoder.rope.sections
    if not sections:
        if decoder.rope.interleaved:
            raise ConfigError(
                "decoder.rope.interleaved True has no effect without decoder.rope.sections: leave "
                "it out."
            )
        return
    if decoder.positions != "rope" or decoder.rope.scaling != "none":
        setting = "positions" if decoder.positions != "rope" else "rope.scaling"
        raise ConfigError(
            f"decoder.rope.sections has no effect with decoder.{setting} other than "
            f"{'rope' if setting == 'positions' else 'none'}: leave one out."
        )
    if len(sections) != 3 or sum(sections) != decoder.rotary_dim // 2:
        raise ConfigError(
            f"decoder.rope.sections {sections} must be three numbers of frequencies, for time, row "
            f"and column, with the sum {decoder.rotary_dim // 2}, half of the rotated dimensions."
        )
    if cfg.vision.tile_grids:
        raise ConfigError(
            "decoder.rope.sections need images on one grid of tokens: leave out vision.tile_grids."
        )


def _no_rope(cfg: Experiment) -> None:
    layers, positions = cfg.decoder.no_rope_layers, cfg.decoder.positions
    if layers and positions != "rope":
        raise ConfigError(
            f"decoder.no_rope_layers has no effect with decoder.positions {positions}: set it to "
            "rope, or leave decoder.no_rope_layers out."
        )
    check_layers("decoder.no_rope_layers", layers, cfg.decoder.depth)


CHECKS = (_fusion, _room, _sliding, _no_rope, _rope_sections)
