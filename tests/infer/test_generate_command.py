"""`generate --checkpoint` says what transformers says, and a user's mistake is one sentence."""

import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.hub import tiny_tokenizers
from tests.hub.parity import SMALL, saved
from vlm_jax import from_pretrained
from vlm_jax.cli.main import main

TEMPLATE = "{{ bos_token }}{% for m in messages %}User: {{ m['content'] }}\nAssistant: {% endfor %}"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny_tokenizers.llama3(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = LlamaConfig(
        **SMALL | {"vocab_size": len(tokenizer)}, bos_token_id=None, eos_token_id=None
    )
    model = saved(LlamaForCausalLM(config), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return model, AutoTokenizer.from_pretrained(folder), folder


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main(["generate", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_the_answer_is_that_of_transformers(llama, capsys):
    model, tokenizer, folder = llama
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "what is it?"}], return_tensors="pt"
    )
    made = model.generate(**asked, max_new_tokens=12, do_sample=False)[
        0, asked["input_ids"].shape[1] :
    ]
    code, said, _ = run(
        capsys, "--checkpoint", folder, "--prompt", "what is it?", "--max-new-tokens", 12
    )
    assert code == 0
    assert said == tokenizer.decode(made, skip_special_tokens=True) + "\n"


def test_a_seed_repeats_a_draw_and_another_gives_another(llama, capsys):
    drawn = [
        run(
            capsys,
            "--checkpoint",
            llama[2],
            "--prompt",
            "hello",
            "--temperature",
            1.0,
            "--seed",
            seed,
            *TEN,
        )[1]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


TEN = ("--max-new-tokens", 10)


def test_prompts_of_mixed_lengths_are_padded_on_the_left(llama):
    model, params, processor = from_pretrained(llama[2])
    batch = processor(["what", "what is it ? and the cat"])
    assert (np.diff(batch.segment_ids.astype(int), axis=1) >= 0).all()
    assert (batch.segment_ids[:, -1] == 1).all()
    assert batch.positions[0, batch.segment_ids[0] == 1].tolist() == list(
        range(batch.segment_ids[0].sum())
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--checkpoint"),
        (("--prompt", "x", "--temperature", "-1"), "--temperature -1.0: it must be at least 0"),
        (
            ("--prompt", "x", "--temperature", "nan"),
            "--temperature nan: it must be a finite number",
        ),
        (("--prompt", "x", "--seed", str(2**70)), "it must be at most 4294967295"),
        (("--prompt", "a\udcffb"), "not valid Unicode"),
        (("--prompt", "x", "--checkpoint", ""), "--checkpoint is empty"),
        (("--prompt", "x", "--top-p", "0"), "--top-p 0.0: it must be above 0 and at most 1"),
        (("--prompt", "x", "--max-new-tokens", "many"), "max-new-tokens"),
        (("--prompt", "x", "--image", "a.png"), "is a text-only model"),
        (("--prompt", "x", "--beams", "3"), "--beams"),
        (
            (
                "--prompt",
                "word " * 100,
            ),
            "is too long: decoder.max_positions",
        ),
    ],
)
def test_a_mistake_is_one_sentence(llama, capsys, arguments, said):
    needs_checkpoint = arguments and "--checkpoint" not in arguments
    checkpoint = ("--checkpoint", llama[2]) if needs_checkpoint else ()
    code, out, error = run(capsys, *checkpoint, *arguments)
    assert code == 2
    assert said in error
    assert error.count("\n") == 1
    assert not out


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_logits_that_are_not_finite_are_one_sentence(llama, tmp_path, capsys, temperature):
    shutil.copytree(llama[2], tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"][0] = np.nan
    save_file(tensors, tmp_path / "model.safetensors")
    options = ("--prompt", "hello", "--temperature", temperature, *TEN)
    code, out, error = run(capsys, "--checkpoint", tmp_path, *options)
    assert (code, out) == (1, "")
    assert (
        error
        == "error: the logits of token 1 of 'hello' are NaN or infinite: the weights are damaged.\n"
    )


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path, capsys):
    code, _, error = run(capsys, "--checkpoint", tmp_path, "--prompt", "x")
    assert code == 2
    assert str(tmp_path) in error
