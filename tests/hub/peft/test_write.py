"""Adapters that are written here are loaded by PEFT, in every family, and change as much there."""

import warnings
from dataclasses import replace

import numpy as np
import peft
import pytest
from flax import traverse_util
from flax.linen import meta

from tests.hub import tiny_checkpoints
from tests.hub.peft.test_adapter import flat, hub, llava, phi3
from vlm_jax.config import CheckpointError, Lora, LrMult
from vlm_jax.hub.families.registry import FAMILIES
from vlm_jax.hub.load import load_checkpoint, load_params
from vlm_jax.hub.peft.adapter import read_adapter
from vlm_jax.hub.peft.write import module_name, write_adapter
from vlm_jax.nn import lora
from vlm_jax.nn.models import abstract_params
from vlm_jax.nn.parts import trained_paths

# Base model, settings of LoRA, and the frozen part.
CASES = {
    # The projector is trained in full.
    "llava": (llava, Lora(rank=3, alpha=5, targets=("vision.mlp", "decoder:2:7")), None),
    # Parts of fused projections, with ranks and scales of their own.
    "phi3": (phi3, Lora(rank=3, targets=("decoder", "decoder.key:2:9"), rslora=True), None),
    "phi3 in part": (phi3, Lora(rank=3, targets=("decoder.value", "decoder.up")), None),
    "vit_gpt2": (
        hub("vit_gpt2"),
        Lora(rank=3, targets=("decoder", "vision", "cross_attention")),
        None,
    ),
    # Cross-attention and its gates are trained in full.
    "mllama with whole layers": (hub("mllama"), Lora(rank=3), "vision"),
    "fuyu": (hub("fuyu"), Lora(rank=3, targets=("decoder", "projector")), None),
    # The projector, a parameter without a module of its own and a norm, is trained in full.
    "gemma3": (hub("gemma3"), Lora(rank=3), "vision"),
}


def run_of(folder, settings, frozen):
    """Config and parameters of a run that began with a checkpoint; adapters are random."""
    checkpoint, base = load_checkpoint(folder)
    cfg = replace(checkpoint.cfg, init_from=str(folder), lora=settings)
    if frozen:
        optim = replace(cfg.optim, lr_mult=replace(LrMult(), **{frozen: 0}))
        cfg = replace(cfg, optim=optim)
    params, rng = traverse_util.flatten_dict(base), np.random.default_rng(0)
    shapes = traverse_util.flatten_dict(meta.unbox(abstract_params(cfg)))
    for path in trained_paths(shapes, cfg.optim):
        random = rng.normal(0, 0.2, shapes[path].shape).astype(np.float32)
        params[path] = params.get(path, 0) + random
    return cfg, traverse_util.unflatten_dict(params)


@pytest.mark.parametrize("name", CASES)
def test_peft_merges_a_written_adapter_as_we_do(name, tmp_path):
    build, settings, frozen = CASES[name]
    (tmp_path / "base").mkdir()
    model = build(tmp_path / "base")
    cfg, params = run_of(tmp_path / "base", settings, frozen)
    write_adapter(cfg, params, tmp_path / "adapter", tmp_path / "base")
    expected = flat(lora.merge(settings, params))
    # Here.
    for path, x in flat(load_params(tmp_path / "base", adapter=tmp_path / "adapter")[1]).items():
        np.testing.assert_allclose(x, expected[path], atol=1e-5, err_msg=path)
    # In PEFT.
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing.*")
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
        tuned = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    for path, x in flat(load_params(tmp_path / "merged")[1]).items():
        np.testing.assert_allclose(x, expected[path], atol=1e-5, err_msg=path)


def test_the_projector_beside_adapters_is_saved_whole(tmp_path):
    (tmp_path / "base").mkdir()
    llava(tmp_path / "base")
    write_adapter(*run_of(tmp_path / "base", Lora(rank=2), None), tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter")
    modules = [f"model.multi_modal_projector.linear_{i}" for i in (1, 2)]
    assert [x for x in adapter.config["modules_to_save"] if "projector" in x] == modules
    assert {f"{modules[0]}.weight", f"{modules[0]}.bias"} < set(adapter.saved)
    assert adapter.config["base_model_name_or_path"] == str(tmp_path / "base")


@pytest.mark.parametrize(
    "name",
    [
        *("llava", "llava_next", "paligemma", "gemma3", "internvl", "fuyu", "mllama", "vit_gpt2"),
        "trocr",
    ],
)
def test_names_of_modules_are_the_inverse_of_those_of_the_table(name, tmp_path):
    getattr(tiny_checkpoints, name)(tmp_path)
    checkpoint, _ = load_checkpoint(tmp_path)
    family = FAMILIES[checkpoint.family.model_type]
    names = [module_name(family, row) for row in checkpoint.rows]
    assert list(family.normalize_names(names)) == [row.tensor for row in checkpoint.rows]
    assert names != [row.tensor for row in checkpoint.rows]


def test_an_adapter_of_a_parameter_without_a_module_is_refused(tmp_path):
    (tmp_path / "base").mkdir()
    tiny_checkpoints.gemma3(tmp_path / "base")
    run = run_of(tmp_path / "base", Lora(rank=2, targets=("projector",)), None)
    with pytest.raises(CheckpointError, match="mm_input_projection_weight is a parameter"):
        write_adapter(*run, tmp_path / "adapter")


def test_a_folder_that_holds_an_adapter_is_refused(tmp_path):
    (tmp_path / "base").mkdir()
    phi3(tmp_path / "base")
    cfg, params = run_of(tmp_path / "base", Lora(rank=2), None)
    write_adapter(cfg, params, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="holds an adapter already"):
        write_adapter(cfg, params, tmp_path / "adapter")
