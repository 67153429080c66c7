"""`verify` passes the reference's own numbers, fails any others, and names outputs not compared."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from tests.hub.parity import SMALL, reference, saved
from vlm_jax.cli.main import main
from vlm_jax.config import UserError
from vlm_jax.infer.verify import table, verify

IDS = np.random.default_rng(0).integers(1, 64, (2, 9))
MASK = np.ones_like(IDS)
MASK[0, :3] = 0


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return saved(LlamaForCausalLM(LlamaConfig(**SMALL, eos_token_id=None)), folder), folder


@pytest.fixture(scope="module")
def cases(llama):
    model, _ = llama
    inputs = {"input_ids": torch.tensor(IDS), "attention_mask": torch.tensor(MASK)}
    made = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, IDS.shape[1] :].numpy()
    padded = {
        "padded/in/input_ids": IDS,
        "padded/in/attention_mask": MASK,
        "padded/out/new_ids": made,
    }
    padded["padded/out/logits"] = reference(model, input_ids=IDS, attention_mask=MASK)
    return {"plain/in/input_ids": IDS, "plain/out/logits": reference(model, input_ids=IDS)} | padded


def run(folder, tmp_path, arrays, **settings):
    np.savez(tmp_path / "reference.npz", **arrays)
    verification = verify(folder, tmp_path / "reference.npz", **settings)
    return {(c.case, c.output): c for c in verification.comparisons}


def test_the_numbers_of_the_reference_are_ours(llama, cases, tmp_path):
    results = run(llama[1], tmp_path, cases)
    assert set(results) == {("plain", "logits"), ("padded", "logits"), ("padded", "new_ids")}
    assert all(result.agrees for result in results.values()), table(list(results.values()))
    assert 0 < results["plain", "logits"].difference < 1e-4


@pytest.mark.parametrize(
    "wrong", [lambda x: x + 1e-3, lambda x: x[:, 1:], lambda x: np.where(x == x.max(), np.nan, x)]
)
def test_other_numbers_are_not(llama, cases, tmp_path, wrong):
    results = run(
        llama[1], tmp_path, cases | {"plain/out/logits": wrong(cases["plain/out/logits"])}
    )
    assert not results["plain", "logits"].agrees
    assert results["padded", "logits"].agrees


def test_a_wrong_token_shows(llama, cases, tmp_path):
    made = cases["padded/out/new_ids"].copy()
    made[1, -1] += 1
    assert (
        run(llama[1], tmp_path, cases | {"padded/out/new_ids": made})[
            "padded", "new_ids"
        ].difference
        == 1
    )


@pytest.mark.parametrize("filled", [True, False])
def test_behind_the_end_of_a_text_filling_is_no_mistake_but_a_wrong_token_is(
    llama, cases, tmp_path, filled
):
    made = cases["padded/out/new_ids"].copy()
    made[1, 2:] = [0, 0, 0, 0] if filled else [*made[1, 2:5], made[1, 5] + 1]
    folder = shutil.copytree(llama[1], tmp_path / "with an end")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": int(made[1, 1])}))
    assert (
        run(folder, tmp_path, cases | {"padded/out/new_ids": made})["padded", "new_ids"].agrees
        == filled
    )


def test_atol_and_outputs_choose_what_is_compared_and_how(llama, cases, tmp_path):
    shifted = cases | {"plain/out/logits": cases["plain/out/logits"] + 1e-3}
    results = run(llama[1], tmp_path, shifted, outputs=["logits"], atol=2e-3)
    assert set(results) == {("plain", "logits"), ("padded", "logits")}
    assert all(result.agrees for result in results.values())


def test_only_what_is_valid_is_compared(llama, cases, tmp_path):
    logits, valid = cases["plain/out/logits"].copy(), np.ones(IDS.shape, bool)
    logits[0, 2], valid[0, 2] = 7, False
    arrays = {"plain/in/input_ids": IDS, "plain/out/logits": logits, "plain/valid": valid}
    assert run(llama[1], tmp_path, arrays)["plain", "logits"].agrees


def test_what_is_not_supported_is_named_and_not_compared(llama, cases, tmp_path):
    arrays = cases | {
        "plain/in/inputs_embeds": np.zeros(1),
        "plain/out/attentions": np.zeros((2, 3)),
    }
    results = run(llama[1], tmp_path, arrays)
    for name in ("inputs_embeds", "attentions"):
        assert results["plain", name].reason
        assert not results["plain", name].agrees
        assert name in table(list(results.values()))
    assert results["plain", "logits"].agrees


@pytest.mark.parametrize("content", [b"", b"no zip", None])
def test_a_reference_that_is_none_is_named(llama, tmp_path, content):
    path = tmp_path / "reference.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="reference.npz"):
        verify(llama[1], path)


def test_one_array_is_no_reference(llama, tmp_path):
    with open(tmp_path / "reference.npz", "wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(UserError, match="reference.npz is not an .npz file of arrays"):
        verify(llama[1], tmp_path / "reference.npz")


def test_what_does_not_fit_names_its_case(llama, tmp_path):
    np.savez(
        tmp_path / "reference.npz",
        **{"a/in/input_ids": np.ones(3, int), "a/out/logits": np.ones(3)},
    )
    with pytest.raises(UserError, match="case a: input_ids must be whole numbers"):
        verify(llama[1], tmp_path / "reference.npz")


def test_a_reference_of_pickled_objects_is_refused(llama, tmp_path):
    np.savez(tmp_path / "reference.npz", **{"a/in/input_ids": np.array([{}], object)})
    with pytest.raises(UserError, match="reference.npz is not an .npz file of arrays"):
        verify(llama[1], tmp_path / "reference.npz")


def test_a_case_that_lacks_an_argument_says_so(llama, cases, tmp_path):
    arrays = {"plain/in/attention_mask": MASK, "plain/out/logits": cases["plain/out/logits"]}
    assert "input_ids" in run(llama[1], tmp_path, arrays)["plain", "logits"].reason


def test_the_command_line_prints_a_table_and_its_exit_code_is_the_verdict(
    llama, cases, tmp_path, capsys
):
    reference = tmp_path / "reference.npz"
    np.savez(reference, **cases)
    command = ["verify", "--checkpoint", str(llama[1]), "--reference", str(reference)]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "padded  new_ids" in said
    assert "3 of 3 compared outputs agree" in said
    assert main([*command, "--outputs", "logits", "--atol", "1e-12"]) == 1
    assert "0 of 2 compared outputs agree" in capsys.readouterr().out
    assert main([*command, "--outputs", "attentions"]) == 1  # nothing compared is no success
    assert main([*command[:3], "--reference", str(tmp_path / "none.npz")]) == 2


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    vision |= {"image_size": 16, "patch_size": 8, "model_type": "clip_vision_model"}
    text = SMALL | {"model_type": "llama", "eos_token_id": None}
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=63)
    return saved(LlavaForConditionalGeneration(config), folder), folder


def test_a_model_with_images_is_compared_in_all_its_outputs(llava, tmp_path):
    model, folder = llava
    ids = np.array([[1, 63, 63, 63, 63, 5, 6, 7], [0, 0, 1, 63, 63, 63, 63, 9]])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).astype(int)}
    inputs["pixel_values"] = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)
    tensors = {name: torch.tensor(x) for name, x in inputs.items()}
    features = model.get_image_features(tensors["pixel_values"]).pooler_output
    arrays = {f"a/in/{name}": x for name, x in inputs.items()}
    arrays["a/out/logits"] = reference(model, **inputs)
    arrays["a/out/image_features"] = torch.stack(list(features)).detach().numpy()
    arrays["a/out/new_ids"] = model.generate(**tensors, max_new_tokens=5, do_sample=False)[
        :, ids.shape[1] :
    ].numpy()
    results = run(folder, tmp_path, arrays)
    assert len(results) == 3
    assert all(result.agrees for result in results.values()), table(list(results.values()))
