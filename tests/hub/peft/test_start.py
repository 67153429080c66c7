"""A training that continues an adapter of PEFT begins with its function, ranks and scales."""

from dataclasses import replace

import numpy as np
import pytest
from flax import traverse_util
from flax.linen import meta
from transformers import LlamaConfig, LlamaForCausalLM

from tests.hub.parity import SMALL, saved
from tests.hub.peft.test_adapter import CASES, flat, wrap
from vlm_jax import axes
from vlm_jax.config import ConfigError, Mesh, UserError
from vlm_jax.config.validate import validate
from vlm_jax.hub.load import load_checkpoint, load_params
from vlm_jax.hub.peft.start import with_adapter_settings
from vlm_jax.nn import lora
from vlm_jax.nn.models import abstract_params
from vlm_jax.train.initial import load_parts
from vlm_jax.train.step import abstract_state


def begin(base, adapter, **sections):
    """The experiment of a run that continues an adapter."""
    cfg, folder = load_checkpoint(base)[0].cfg, str(base)
    for part in ("vision", "projector", "decoder"):
        cfg = replace(cfg, **{part: replace(getattr(cfg, part), checkpoint=folder)})
    cfg = replace(cfg, init_from=folder, adapter=str(adapter), **sections)
    return with_adapter_settings(cfg)


# Without mllama: its rows are of the same kinds.
@pytest.mark.parametrize("name", sorted(CASES.keys() - {"mllama"}))
def test_a_run_begins_with_the_function_of_the_adapter(name, tmp_path):
    build, settings = CASES[name]
    (tmp_path / "base").mkdir()
    wrap(build(tmp_path / "base"), tmp_path / "adapter", **settings)
    cfg = begin(tmp_path / "base", tmp_path / "adapter")
    mesh = axes.make_mesh(Mesh())
    loaded = load_parts(cfg, abstract_state(cfg, mesh), mesh)
    assert loaded.keys() == flat(meta.unbox(abstract_params(cfg))).keys()
    assert any(path.endswith("lora_b") and np.any(x) for path, x in loaded.items())
    merged = flat(lora.merge(cfg.lora, traverse_util.unflatten_dict(loaded, sep="/")))
    for path, x in flat(load_params(tmp_path / "base", adapter=tmp_path / "adapter")[1]).items():
        np.testing.assert_allclose(merged[path], x, atol=1e-5, err_msg=path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Llama, and a function that writes an adapter of it."""
    base = tmp_path_factory.mktemp("base")
    saved(LlamaForCausalLM(LlamaConfig(**SMALL)), base)

    def adapt(**settings):
        folder = tmp_path_factory.mktemp("adapter")
        wrap(LlamaForCausalLM.from_pretrained(base), folder, **settings)
        return base, folder

    return adapt


def test_settings_are_those_of_the_adapter(folders):
    patterns = {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"k_proj": 8}}
    settings = begin(*folders(target_modules=["q_proj", "k_proj"], **patterns)).lora
    assert (settings.rank, settings.alpha, settings.rslora) == (2, 8, False)
    assert settings.targets == ("decoder.key", "decoder.query:3:5.0")


def test_layers_without_an_adapter_keep_none(folders):
    cfg = begin(*folders(target_modules=["q_proj"], layers_to_transform=[1]))
    mesh = axes.make_mesh(Mesh())
    loaded = load_parts(cfg, abstract_state(cfg, mesh), mesh)
    lora_a = loaded["decoder/blocks/layers/block_0/self/query/lora_a"]
    assert [bool(np.any(x)) for x in lora_a] == [False, True, False]


@pytest.mark.parametrize(
    "adapter, sections, message",
    [
        ({"target_modules": ["lm_head"]}, {}, "adapts lm_head.weight, which has no adapter here"),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
            {},
            "holds lm_head.weight whole, but the part decoder is frozen here: merge it with",
        ),
        (
            {"target_modules": ["q_proj"]},
            {"lora": lora.Lora(rank=4)},
            "has its own rank, alpha and targets: leave out all fields of lora but lora.dropout",
        ),
    ],
)
def test_what_cannot_continue_is_refused(folders, adapter, sections, message):
    with pytest.raises(UserError, match=message):
        begin(*folders(**adapter), **sections)


def test_an_adapter_needs_its_whole_base(folders):
    cfg = begin(*folders(target_modules=["q_proj"]))
    cfg = replace(cfg, data=replace(cfg.data, text_length=40))
    with pytest.raises(ConfigError, match="needs its whole base model: set init_from"):
        validate(replace(cfg, init_from=""))
