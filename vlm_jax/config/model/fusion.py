"""Settings of the fusion, and the table of fusion styles."""

from dataclasses import dataclass
from typing import Literal

from vlm_jax.config.model.rows import get_row


@dataclass(frozen=True)
class FusionStyle:
    """A fusion style in `FUSION_STYLES`: how image tokens reach the decoder.

    Where both fields apply, an image in tiles has its thumbnail in the sequence and its tiles in
    cross-attention (NVLM-H; Dai et al. 2024, section 4).
    """

    in_sequence: bool  # image tokens are concatenated with the text tokens
    #: image tokens are keys and values of cross-attention, in blocks between the decoder's blocks
    #: (interleaved) or in each of them (every_block)
    cross_attention: Literal["none", "interleaved", "every_block"] = "none"


FUSION_STYLES = {
    "unified": FusionStyle(in_sequence=True),
    "cross_attention": FusionStyle(in_sequence=False, cross_attention="interleaved"),
    "encoder_decoder": FusionStyle(in_sequence=False, cross_attention="every_block"),
    "hybrid": FusionStyle(in_sequence=True, cross_attention="interleaved"),
    "text_only": FusionStyle(in_sequence=False),
}


@dataclass(frozen=True)
class Fusion:
    kind: "Literal[tuple(FUSION_STYLES)]" = "unified"  # how image tokens reach the decoder
    #: tokens that attend to each other in both directions: none; image and prompt, as the prefix of
    #: a prefix-LM (PaliGemma); or the tokens of an image, as far as sliding windows reach (Gemma 3)
    prefix: Literal["causal", "bidirectional", "bidirectional_images"] = "causal"
    #: cross_attention, hybrid: k: a cross-attention block before decoder blocks 0, k, 2k, ...
    cross_every: int = 1
    #: cross_attention, hybrid: cross-attention blocks before these decoder blocks instead;
    #: decoder.depth: after the last
    cross_layers: tuple[int, ...] = ()
    #: cross_attention, hybrid: tanh gates that start at 0 and so keep a trained decoder at first
    gated: bool = False
    #: gated: a gate for each sublayer, or for each of its channels (Idefics)
    gate: Literal["scalar", "vector"] = "scalar"
    #: cross_attention, encoder_decoder, hybrid: normalize query and key heads in cross-attention
    qk_norm: bool = True
    #: cross_attention, encoder_decoder: a placeholder token in the text for each image (Llama 3.2
    #: Vision, Flamingo)
    placeholder: bool = False
    #: tokens before any image: masked out of cross-attention, masked out of its attention but not
    #: of its MLP (Idefics), or attend to all images (Llama 3.2 Vision)
    tokens_without_image: Literal["mask_out", "mask_attention", "attend_all"] = "mask_out"

    @property
    def style(self) -> FusionStyle:
        return get_row(FUSION_STYLES, "fusion.kind", self.kind)

    @property
    def image_in_sequence(self) -> bool:
        return self.style.in_sequence

    @property
    def image_in_memory(self) -> bool:
        """True if image tokens are keys and values of cross-attention."""
        return self.style.cross_attention != "none"

    @property
    def has_images(self) -> bool:
        return self.image_in_sequence or self.image_in_memory

    @property
    def is_prefix_lm(self) -> bool:
        """True if image and prompt are a prefix with bidirectional attention."""
        return self.prefix == "bidirectional"

    @property
    def has_image_blocks(self) -> bool:
        """True if the tokens of each image attend to each other in both directions."""
        return self.prefix == "bidirectional_images"

    @property
    def has_blocks(self) -> bool:
        """True if some tokens attend to each other in both directions."""
        return self.is_prefix_lm or self.has_image_blocks

    @property
    def splits_views(self) -> bool:
        """True if the thumbnail is in the sequence and the tiles are in cross-attention."""
        return self.image_in_sequence and self.image_in_memory

    @property
    def has_cross_blocks(self) -> bool:
        """True if blocks of cross-attention are interleaved with the decoder's blocks."""
        return self.style.cross_attention == "interleaved"

    @property
    def is_encoder_decoder(self) -> bool:
        """True if every decoder block has cross-attention (Vaswani et al. 2017)."""
        return self.style.cross_attention == "every_block"

    @property
    def has_gates(self) -> bool:
        return self.has_cross_blocks and self.gated

    @property
    def unused(self) -> tuple[str, ...]:
        """Names of the fields that have no effect with this kind."""
        placement = ("cross_every", "cross_layers", "gated", "gate")
        placement = () if self.has_cross_blocks else placement
        return placement if self.image_in_memory else (*placement, "qk_norm")

    def sublayers(self, depth: int) -> tuple[tuple[str, ...], ...]:
        """Returns the decoder's blocks, each a tuple of names in `nn.blocks.SUBLAYERS`."""
        plain, crossing = ("self", "mlp"), ("cross", "cross_mlp")
        if self.is_encoder_decoder:
            return (("self", "cross", "mlp"),) * depth
        if not self.has_cross_blocks:
            return (plain,) * depth
        layers = self.cross_layers or tuple(range(0, depth, self.cross_every))
        blocks = []
        for i in range(depth):
            # A layer that is listed several times has as many cross blocks; the last one joins it.
            count = layers.count(i)
            blocks += [crossing] * (count - 1) + [crossing + plain if count else plain]
        return (*blocks, *[crossing] * layers.count(depth))
