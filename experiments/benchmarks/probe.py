"""Models of the benchmarks: 39 M random parameters, written once by transformers for both sides.

LLaVA-like: a CLIP of 6 layers of width 384, 196 tokens an image, in the sequence of a Llama of 8
layers of width 512 with 8 query and 4 key/value heads. Llama-3.2-Vision-like: the same sizes, with
3 cross-attention layers.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

ROWS, TEXT_TOKENS, IMAGE_TOKENS, IMAGE_SIZE_PX, PATCH_SIZE_PX = 8, 64, 196, 224, 16
VOCAB, IMAGE_ID = 8192, 8191
TEXT = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 1,
}
VISION = {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "image_size": IMAGE_SIZE_PX,
    "patch_size": PATCH_SIZE_PX,
}
# Of the LLaVA-like model.
TEXT_LAYERS, VISION_LAYERS, VISION_HEADS = 8, 6, 6
KINDS = ("llava", "mllama")


def torch_model(kind: str):
    import torch
    from transformers import (
        LlavaConfig,
        LlavaForConditionalGeneration,
        MllamaConfig,
        MllamaForConditionalGeneration,
    )

    torch.manual_seed(0)
    if kind == "llava":
        config = LlavaConfig(
            text_config={"model_type": "llama", "num_hidden_layers": TEXT_LAYERS, **TEXT},
            vision_config={
                **{
                    "model_type": "clip_vision_model",
                    "num_hidden_layers": VISION_LAYERS,
                    "num_attention_heads": VISION_HEADS,
                },
                **VISION,
            },
            vision_feature_layer=-1,
            image_token_index=IMAGE_ID,
            tie_word_embeddings=True,
        )
        return LlavaForConditionalGeneration(config)
    text = {
        **TEXT,
        "num_hidden_layers": 9,
        "cross_attention_layers": [1, 4, 7],
        "rope_scaling": {"rope_type": "default"},
    }
    vision = {
        **{
            "num_hidden_layers": 4,
            "num_global_layers": 2,
            "attention_heads": 6,
            "max_num_tiles": 1,
            **VISION,
        },
        **{
            "supported_aspect_ratios": [[1, 1]],
            "intermediate_layers_indices": [1, 3],
            "vision_output_dim": 384 * 3,
        },
    }
    model = MllamaForConditionalGeneration(
        MllamaConfig(text_config=text, vision_config=vision, image_token_index=VOCAB)
    )
    # Open the gates, the only scalar parameters, so that the image has an effect.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() == 1:
                parameter.fill_(0.5)
    return model


def inputs(
    kind: str, rows: int = ROWS, text_tokens: int = TEXT_TOKENS, seed: int = 0
) -> dict[str, np.ndarray]:
    """Returns transformers' arguments: one image a row, `text_tokens` random tokens, no padding."""
    rng = np.random.default_rng(seed)
    text = rng.integers(2, IMAGE_ID, (rows, text_tokens))
    pixels = rng.standard_normal((rows, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX), np.float32)
    if kind == "llava":
        ids = np.concatenate([np.full((rows, IMAGE_TOKENS), IMAGE_ID), text], axis=1)
        return {"input_ids": ids, "attention_mask": np.ones_like(ids), "pixel_values": pixels}
    ids = np.concatenate([np.full((rows, 1), VOCAB), text[:, 1:]], axis=1)
    return {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "pixel_values": pixels[:, None, None],
        "aspect_ratio_ids": np.ones((rows, 1), np.int64),
        "aspect_ratio_mask": np.ones((rows, 1, 1), np.int64),
        "cross_attention_mask": np.ones((*ids.shape, 1, 1), np.int64),
    }


def labels(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Returns labels of the text tokens, without the first of a row; -100 is not scored."""
    ids = arrays["input_ids"]
    scored = ids < IMAGE_ID
    scored[:, 0] = False
    return np.where(scored, ids, -100)


@dataclass(frozen=True)
class Ours:
    """The same weights in our model."""

    cfg: object
    params: object
    image_id: int

    @classmethod
    def load(cls, folder: str, unroll: int = 64, remat: str = "none", **sections) -> "Ours":
        """Loads a checkpoint; `sections` replace sections of its experiment.

        Layers are unrolled unless `unroll` is smaller than their number.
        """
        from vlm_jax.hub.load import load_checkpoint

        checkpoint, params = load_checkpoint(folder, intermediate_layers="output")
        cfg = checkpoint.cfg
        loops = {
            name: replace(getattr(cfg, name), unroll=unroll, remat=remat)
            for name in ("vision", "decoder")
        }
        return cls(replace(cfg, **loops, **sections), params, checkpoint.image_token)

    def batch(self, arrays: dict[str, np.ndarray]):
        """Returns our batch, with the shifted targets of `labels`."""
        from vlm_jax.hub.inputs import to_batch

        targets = np.pad(labels(arrays)[:, 1:], ((0, 0), (0, 1)), constant_values=-100)
        batch = to_batch(self.cfg, arrays, self.image_id)
        return batch.replace(
            targets=np.maximum(targets, 0).astype(np.int32),
            loss_weights=(targets >= 0).astype(np.float32),
        )
