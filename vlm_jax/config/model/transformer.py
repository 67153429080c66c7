"""Settings that the image encoder and the decoder share."""

from dataclasses import dataclass
from typing import Literal

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "relu2"]
NormKind = Literal["layernorm", "rmsnorm", "rmsnorm_zero_centered"]


@dataclass(frozen=True)
class Transformer:
    """Settings that the image encoder and the decoder share."""

    width: int = 128  # D: model dimension
    depth: int = 4  # number of blocks
    heads: int = 4  # N: number of attention heads
    #: K: number of key/value heads (grouped-query attention); None: heads
    kv_heads: int | None = None
    head_dim: int | None = None  # H: head dimension; None: width / heads
    mlp_width: int = 512  # F: hidden dimension of the MLP
    #: rmsnorm_zero_centered: stores scale - 1 (Gemma)
    norm: NormKind = "layernorm"
    norm_eps: float = 1e-6  # added to the variance
    #: x + f(norm(x)), norm(x + f(x)), x + norm(f(norm(x))), or x + norm(f(x))
    norm_position: Literal["pre", "post", "sandwich", "output"] = "pre"
    activation: Activation = "gelu_tanh"  # activation of the MLP
    gated_mlp: bool = False  # down(act(gate x) * up x) instead of down(act(up x))
    qkv_bias: bool = True  # biases of the query, key and value projections
    key_bias: bool = True  # False: the key projection has no bias, even with qkv_bias
    out_bias: bool = True  # bias of attention's output projection
    mlp_bias: bool = True  # biases of the MLP
    #: normalize queries and keys before RoPE: each head, or all heads of a token together
    qk_norm: Literal["none", "head", "all_heads"] = "none"
    query_scale: float | None = None  # factor of the attention scores; None: 1 / sqrt(H)
    #: c: attention scores become c tanh(score / c); None: not capped
    score_softcap: float | None = None
    #: per-channel LayerScale, or a scalar tanh gate, on each residual branch
    layer_scale: Literal["none", "vector", "tanh_gate"] = "none"
    #: unroll of the scan over layers: faster steps, slower compilation, less saved by remat
    unroll: int = 1
    #: rematerialize nothing; all but attention and matmuls with weights; all but those matmuls;
    #: everything
    remat: Literal["none", "attention", "dots", "full"] = "none"

    def has_bias(self, kernel: str) -> bool:
        """Returns whether a kernel of a block, such as "key" or "up", has a bias."""
        if kernel in ("query", "key", "value"):
            return self.qkv_bias and (self.key_bias or kernel != "key")
        return self.out_bias if kernel == "out" else self.mlp_bias

    @property
    def num_kv_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_width(self) -> int:
        return self.width // self.heads if self.head_dim is None else self.head_dim
