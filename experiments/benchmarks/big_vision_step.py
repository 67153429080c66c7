"""Training step of big_vision's PaliGemma in the sizes of the LLaVA-like model of `probe.py`.

ViT, decoder, loss and optimizer are big_vision's own, imported from a checkout given by path. The
model differs from LLaVA where PaliGemma does: a linear projector, no class token, GELU for SiLU,
and full attention among image tokens. Its trainer keeps the loss inside its `main`; the same loss
is `weighted_softmax_xent` of its `utils`.
"""

import functools
import importlib.util
import sys
from pathlib import Path

import probe
import turns

MODEL_FILE = "big_vision/models/proj/paligemma/paligemma.py"
# Modules that big_vision imports and this project does not install, and their packages.
NEEDED = {"einops": "einops", "ml_collections": "ml_collections", "tensorflow": "tensorflow-cpu"}
# big_vision's settings of both towers: layers unrolled with every activation stored, and layers
# scanned with the two policies that its `models/vit.py` names.
LAYERS = {
    "unrolled": {"scan": False, "remat_policy": "none"},
    "scanned": {"scan": True, "remat_policy": "nothing_saveable"},
    "scanned_dots": {"scan": True, "remat_policy": "dots_with_no_batch_dims_saveable"},
}


def check(checkout: Path) -> None:
    """Ends the program with one sentence if big_vision cannot be imported from `checkout`."""
    if not (checkout / MODEL_FILE).is_file():
        raise SystemExit(
            f"--big_vision {checkout} is not a checkout of "
            f"https://github.com/google-research/big_vision: it has no {MODEL_FILE}."
        )
    missing = [name for module, name in NEEDED.items() if not importlib.util.find_spec(module)]
    if missing:
        raise SystemExit(f"--big_vision needs packages: pip install {' '.join(missing)}")


def fastest_server(checkout: Path) -> turns.Server:
    """Starts big_vision's step with each of `LAYERS`, and keeps the process of the fastest."""
    kept = None
    for layers in LAYERS:
        server = turns.Server("--serve", "big_vision", "--big_vision", checkout, "--layers", layers)
        print(f"big_vision, {layers:<14}{server.first['best_seconds']:>6.2f} s a step", flush=True)
        slower = server
        if kept is None or server.first["best_seconds"] < kept.first["best_seconds"]:
            kept, slower = server, kept
        if slower is not None:
            slower.close()
    return kept


class Step:
    """The compiled step and its state; a call takes a step and returns its loss."""

    def __init__(self, checkout: Path, layers: str, optim: dict):
        """Initializes random parameters; `optim` has the settings of big_vision's `optax.make`."""
        sys.path.insert(0, str(checkout))
        import jax

        self._batch = jax.device_put(batch())
        model = make_model(layers)
        init = jax.jit(lambda key: model.init(key, *model_inputs(self._batch))["params"])
        params = init(jax.random.key(0))
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
        optimizer = make_optimizer(optim, params)
        self._state = params, jax.jit(optimizer.init)(params)
        update = functools.partial(update_state, model, optimizer)
        self._update = jax.jit(update, donate_argnums=0)

    def __call__(self) -> float:
        self._state, loss = self._update(self._state, self._batch)
        return float(loss)


def make_model(layers: str):
    from big_vision.models.ppp import gemma
    from big_vision.models.proj.paligemma import paligemma

    text, vision, settings = probe.TEXT, probe.VISION, LAYERS[layers]
    published_config = gemma.get_config

    # big_vision knows decoders by the names of public ones only.
    def config_in_our_sizes(variant: str):
        config = published_config(variant)
        config.width = text["hidden_size"]
        config.depth = probe.TEXT_LAYERS
        config.mlp_dim = text["intermediate_size"]
        config.num_heads = text["num_attention_heads"]
        config.num_kv_heads = text["num_key_value_heads"]
        config.head_dim = config.width // config.num_heads
        return config

    gemma.get_config = config_in_our_sizes
    img = {
        "width": vision["hidden_size"],
        "depth": probe.VISION_LAYERS,
        "mlp_dim": vision["intermediate_size"],
        "num_heads": probe.VISION_HEADS,
        "patch_size": (probe.PATCH_SIZE_PX, probe.PATCH_SIZE_PX),
        "pool_type": "none",
        # With a projector of zeros the first loss would not depend on the image.
        "head_zeroinit": False,
        **settings,
    }
    return paligemma.Model(img=img, llm={"vocab_size": probe.VOCAB, **settings})


def make_optimizer(optim: dict, params):
    import big_vision.optax
    import ml_collections

    config = ml_collections.ConfigDict(optim)
    optimizer, _ = big_vision.optax.make(
        config, params, sched_kw={"total_steps": optim["total_steps"]}
    )
    return optimizer


def batch() -> dict:
    """Returns the images and text tokens of `probe.inputs`.

    big_vision's inputs are all text tokens but the last, which here is one that is not scored, so
    that rows have as many inputs and as many scored tokens as on the other sides.
    """
    import numpy as np

    arrays = probe.inputs("llava")
    text = arrays["input_ids"][:, probe.IMAGE_TOKENS :].astype(np.int32)
    text = np.pad(text, ((0, 0), (0, 1)))
    mask_loss = np.ones(text.shape, np.float32)
    mask_loss[:, [0, -1]] = 0
    return {
        "image": arrays["pixel_values"].transpose(0, 2, 3, 1),
        "text": text,
        "mask_ar": np.ones_like(text),
        "mask_loss": mask_loss,
    }


def model_inputs(batch: dict) -> tuple:
    return batch["image"], batch["text"][:, :-1], batch["mask_ar"][:, :-1]


def update_state(model, optimizer, state: tuple, batch: dict) -> tuple:
    """Returns the state after a step, and the loss before it."""
    import big_vision.utils
    import jax
    import optax

    params, optimizer_state = state

    def compute_loss(params):
        logits, _ = model.apply({"params": params}, *model_inputs(batch), train=True)
        return big_vision.utils.weighted_softmax_xent(
            logits=logits, labels=batch["text"][:, 1:], weights=batch["mask_loss"][:, 1:]
        )

    loss, gradients = jax.value_and_grad(compute_loss)(params)
    updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
    return (optax.apply_updates(params, updates), optimizer_state), loss
