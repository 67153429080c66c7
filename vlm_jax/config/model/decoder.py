"""Settings of the decoder."""

from dataclasses import dataclass, field
from typing import Literal

from vlm_jax.config.model.transformer import Transformer


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021) and its scaling to longer contexts."""

    theta: float = 10_000.0  # base of the wavelengths
    #: base in sliding blocks, which are never scaled; None: theta, scaled like the others
    local_theta: float | None = None
    fraction: float = 1.0  # fraction of the head dimension that is rotated
    #: numbers of frequencies that rotate with the time, the row and the column of an image token
    #: (M-RoPE; Wang et al. 2024, Qwen2-VL, section 2.1); empty: all with the token's position
    sections: tuple[int, ...] = ()
    #: sections: the frequencies of time, row and column take turns (Qwen3-VL)
    interleaved: bool = False
    #: scaling to longer contexts. dynamic: none up to max_positions; longer texts are refused
    scaling: Literal["none", "linear", "dynamic", "llama3", "longrope"] = "none"
    #: linear, llama3: factor by which long wavelengths grow; longrope: extended / original context;
    #: dynamic: kept for export
    factor: float = 1.0
    #: llama3: wavelengths above original_positions / low_freq_factor are scaled
    low_freq_factor: float = 1.0
    #: llama3: wavelengths below original_positions / high_freq_factor are kept
    high_freq_factor: float = 4.0
    original_positions: int = 8192  # llama3, longrope: context length before scaling
    #: longrope: a factor per frequency, for texts up to original_positions
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()  # longrope: a factor per frequency, for longer texts


@dataclass(frozen=True)
class Decoder(Transformer):
    #: checkpoint folder: its decoder's settings, tokenizer and initial weights
    checkpoint: str = ""
    vocab_size: int = 512  # V: size of the output head; not less than the tokenizer's
    #: input-only ids: additional rows of the embedding (mllama)
    extra_tokens: int = 0
    #: ids after vocab_size with an embedding table and an output head of their own (Idefics)
    added_tokens: int = 0
    embed_scale: bool = False  # multiply embeddings by sqrt(D)
    embed_norm: bool = False  # normalize the sum of embeddings and positions
    #: rotary, or position embeddings that are added
    positions: Literal["rope", "learned", "sincos"] = "rope"
    max_positions: int = 256  # maximum sequence length
    position_offset: int = 0  # learned, sincos: row of position 0
    rope: Rope = field(default_factory=Rope)
    #: number of tokens, itself included, that a token of a sliding block attends to
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] = ()  # blocks with a sliding window
    #: blocks whose queries and keys are not rotated (NoPE, Kazemnejad et al. 2023)
    no_rope_layers: tuple[int, ...] = ()
    final_norm: bool = True  # normalize after the last block
    tie_word_embeddings: bool = True  # use the embedding as the output head
    logit_softcap: float | None = None  # c: logits become c tanh(logit / c); None: not capped

    @property
    def num_ids(self) -> int:
        """Number of ids that have an embedding."""
        return self.num_logits + self.extra_tokens

    @property
    def num_logits(self) -> int:
        """Number of ids that the output head has logits of."""
        return self.vocab_size + self.added_tokens

    @property
    def limits_positions(self) -> bool:
        """True if a token cannot have a position beyond `max_positions`."""
        return self.positions == "learned" or self.rope.scaling == "dynamic"

    @property
    def rotary_dim(self) -> int:
        """R: number of head dimensions that are rotated."""
        return int(self.head_width * self.rope.fraction)
