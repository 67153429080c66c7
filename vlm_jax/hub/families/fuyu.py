"""Fuyu: patches go through one product, and no encoder, into Persimmon's decoder."""

from collections.abc import Collection

from vlm_jax.config import (
    Decoder,
    Experiment,
    Fusion,
    Projector,
    Vision,
)
from vlm_jax.hub.families.family import (
    ACTIVATIONS,
    HUB_ACTIVATIONS,
    Family,
    Json,
    choose,
    get,
    refuse,
    size,
)
from vlm_jax.hub.families.gpt2 import norm_rows
from vlm_jax.hub.families.llama import dense_rows, is_tied
from vlm_jax.hub.families.llava import HEAD, RENAMES, TEXT
from vlm_jax.hub.families.rope import read_rope, write_rope
from vlm_jax.hub.families.table import (
    Part,
    Row,
    places,
    row,
)


def read(config: Json, names: Collection[str]) -> Experiment:
    refuse(config, "num_channels", 3)
    patch_size_px = get(config, "patch_size", 30)
    return Experiment(
        vision=Vision(
            kind="none",
            image_size_px=get(config, "image_size", 300),
            patch_size_px=patch_size_px,
            positions="none",
            newline_token=True,
        ),
        projector=Projector(kind="linear"),
        fusion=Fusion(kind="unified"),
        decoder=read_decoder(
            get(config, "text_config", config), is_tied(config, names, False, HEAD)
        ),
    )


def read_decoder(config: Json, tied: bool) -> Decoder:
    """Persimmon's settings; the defaults are those of Fuyu."""
    return Decoder(
        width=size(config, "hidden_size", 4096),
        depth=size(config, "num_hidden_layers", 36),
        heads=size(config, "num_attention_heads", 64),
        mlp_width=size(config, "intermediate_size", 16384),
        norm="layernorm",
        norm_eps=get(config, "layer_norm_eps", 1e-5),
        activation=choose(config, "hidden_act", ACTIVATIONS, "relu2"),
        qk_norm=get(config, "qk_layernorm", True),
        vocab_size=size(config, "vocab_size", 262144),
        max_positions=size(config, "max_position_embeddings", 16384),
        rope=read_rope(config, theta=25_000.0, fraction=0.5),
        tie_word_embeddings=tied,
    )


def write(cfg: Experiment) -> Json:
    """The decoder's keys stand twice, flat as the published file has them and in `text_config` as 5.x reads them."""
    text = write_decoder(cfg.decoder)
    return {
        "architectures": ["FuyuForCausalLM"],
        "model_type": "fuyu",
        "image_size": cfg.vision.image_size_px,
        "patch_size": cfg.vision.patch_size_px,
        "num_channels": 3,
        **text,
        "text_config": {"model_type": "persimmon", **text},
    }


def write_decoder(decoder: Decoder) -> Json:
    return {
        "hidden_size": decoder.width,
        "num_hidden_layers": decoder.depth,
        "num_attention_heads": decoder.heads,
        "intermediate_size": decoder.mlp_width,
        "layer_norm_eps": decoder.norm_eps,
        "hidden_act": HUB_ACTIVATIONS[decoder.activation],
        "qk_layernorm": decoder.qk_norm,
        "vocab_size": decoder.vocab_size,
        "max_position_embeddings": decoder.max_positions,
        "partial_rotary_factor": decoder.rope.fraction,
        "tie_word_embeddings": decoder.tie_word_embeddings,
        **write_rope(decoder.rope),
    }


def rows(cfg: Experiment) -> list[Row]:
    decoder = cfg.decoder
    found = dense_rows("vision_embed_tokens", "projector/linear", "D E -> E D", True)
    found.append(row(f"{TEXT}embed_tokens.weight", "decoder/embedding/table"))
    found += norm_rows(f"{TEXT}final_layernorm", "decoder/final_norm")
    if not decoder.tie_word_embeddings:
        found.append(row(HEAD, "decoder/free_head/kernel", "V D -> D V"))
    for n, (block, turn) in enumerate(places(cfg.fusion.sublayers(decoder.depth), "self")):
        hub, ours = f"{TEXT}layers.{n}", f"decoder/{block}"
        found += attention_rows(f"{hub}.self_attn", f"{ours}/self", decoder, turn)
        found += dense_rows(f"{hub}.mlp.dense_h_to_4h", f"{ours}/mlp/up", "F D -> D F", True, turn)
        found += dense_rows(
            f"{hub}.mlp.dense_4h_to_h", f"{ours}/mlp/down", "D F -> F D", True, turn
        )
        found += norm_rows(f"{hub}.input_layernorm", f"{ours}/self_norm", turn)
        found += norm_rows(f"{hub}.post_attention_layernorm", f"{ours}/mlp_norm", turn)
    return found


def attention_rows(hub: str, ours: str, decoder: Decoder, turn: int) -> list[Row]:
    """Query, key and value of a head lie next to each other."""

    def parts(leaf):
        return tuple(Part(f"{ours}/{name}/{leaf}", turn=turn) for name in ("query", "key", "value"))

    found = [
        Row(
            f"{hub}.query_key_value.weight",
            parts("kernel"),
            interleave="(N parts H) D -> parts D N H",
        ),
        Row(f"{hub}.query_key_value.bias", parts("bias"), interleave="(N parts H) -> parts N H"),
        *dense_rows(f"{hub}.dense", f"{ours}/out", "D (N H) -> N H D", True, turn),
    ]
    if decoder.qk_norm:
        found += norm_rows(f"{hub}.q_layernorm", f"{ours}/query_norm", turn)
        found += norm_rows(f"{hub}.k_layernorm", f"{ours}/key_norm", turn)
    return found


FUYU = Family("fuyu", read, write, rows, RENAMES, image_token=71011)
