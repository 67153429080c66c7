"""LoRA from the command line: train, continue, export, and use the exported adapter."""

import contextlib
import io
import re
import shutil

import jax
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file

from tests.hub import tiny_checkpoints
from vlm_jax import axes, from_run
from vlm_jax.cli.experiment import parse_checkpoint_evaluation, parse_experiment
from vlm_jax.cli.main import main
from vlm_jax.hub.load import load_params
from vlm_jax.infer import run
from vlm_jax.nn import lora
from vlm_jax.nn.quantized import is_quantized, quantize
from vlm_jax.runtime.workdir import Workdir
from vlm_jax.testing import write_conversations
from vlm_jax.train import initial
from vlm_jax.train.step import abstract_state
from vlm_jax.train.summary import describe_beginning

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds `llava`, conversations, and `run`: its decoder with LoRA, its projector in full."""
    folder = tmp_path_factory.mktemp("lora")
    (folder / "llava").mkdir()
    tiny_checkpoints.llava(folder / "llava")
    write_conversations(folder / "talks", count=6)
    assert main(train(folder, "run", *LORA)) == 0
    return folder


LORA = ["--lora.rank", "3", "--lora.alpha", "6", "--lora.dropout", "0.1"]


def data(folder):
    talks = folder / "talks"
    options = {"files": talks / "talks.json", "image_dir": talks, "dir": folder / "datasets"}
    options |= {"images_per_row": 2, "text_length": 60, "template": "plain"}
    return [str(x) for name, value in options.items() for x in (f"--data.{name}", value)]


def train(folder, name, *options):
    return [
        *("train", "--checkpoint", str(folder / "llava"), "--workdir", str(folder / name)),
        *data(folder),
        *("--optim.lr_mult.vision", "0", "--optim.learning_rate", "0.01"),
        *("--train.steps", "2", "--train.batch_size", "8", "--train.checkpoint_every_steps", "1"),
        *("--optim.warmup_steps", "0", *options),
    ]


def flat(params):
    return traverse_util.flatten_dict(params, sep="/")


def assert_equal(actual, expected, atol=0.0):
    assert actual.keys() == expected.keys()
    for path, x in expected.items():
        np.testing.assert_allclose(actual[path], x, rtol=0, atol=atol, err_msg=path)


def test_only_adapters_and_the_projector_are_trained(folder):
    after = flat(initial.load_state(Workdir(str(folder / "run")).read_config()).params)
    for path, before in flat(load_params(folder / "llava")[1]).items():
        is_same = np.array_equal(before, after.pop(path))
        assert is_same != path.startswith("projector"), path
    assert after
    for path, x in after.items():
        assert "lora" in path
        assert np.any(x), path


def test_a_run_that_was_stopped_continues_bit_for_bit(folder, tmp_path):
    copy = shutil.copytree(folder / "run", tmp_path / "run")
    cfg = Workdir(str(copy)).read_config()
    expected = initial.load_state(cfg)
    shutil.rmtree(copy / "checkpoints" / "2")
    assert main(["train", "--workdir", str(copy)]) == 0
    continued = initial.load_state(cfg)
    assert jax.tree.all(jax.tree.map(np.array_equal, continued, expected))


def test_exports_are_the_run(folder, tmp_path):
    """Merged, and as an adapter of its base."""
    workdir, merged, adapter = str(folder / "run"), tmp_path / "merged", str(tmp_path / "adapter")
    base = str(folder / "llava")
    _, params, _ = from_run(workdir)
    params = flat(params)
    before = flat(load_params(base)[1])
    changed = {path for path in before if not np.array_equal(before[path], params[path])}
    assert any("decoder" in path for path in changed)
    assert {path.split("/")[0] for path in changed} == {"decoder", "projector"}

    assert main(["export", "--checkpoint", workdir, "--output", str(merged)]) == 0
    assert_equal(flat(load_params(merged)[1]), params)
    assert main(["export", "--checkpoint", workdir, "--adapter", "--output", adapter]) == 0
    assert_equal(flat(load_params(base, adapter=adapter)[1]), params, atol=1e-6)


def test_a_second_stage_begins_with_the_first_and_continues_bit_for_bit(folder, tmp_path):
    """The projector, then LoRA and the projector; the adapter is of the public checkpoint."""
    base, stage_1, stage_2 = (str(folder / name) for name in ("llava", "stage_1", "stage_2"))
    assert main(train(folder, "stage_1", "--optim.lr_mult.decoder", "0")) == 0
    command = train(folder, "stage_2", *LORA)
    command[command.index(base)] = stage_1
    assert main(command) == 0
    cfg = Workdir(stage_2).read_config()
    mesh = axes.make_mesh(cfg.mesh)
    first = initial.load_state(Workdir(stage_1).read_config()).params
    assert_equal(initial.load_parts(cfg, abstract_state(cfg, mesh), mesh), flat(first))

    expected = initial.load_state(cfg)
    shutil.rmtree(folder / "stage_2" / "checkpoints" / "2")
    assert main(["train", "--workdir", stage_2]) == 0
    assert jax.tree.all(jax.tree.map(np.array_equal, initial.load_state(cfg), expected))

    adapter = str(tmp_path / "adapter")
    assert main(["export", "--checkpoint", stage_2, "--adapter", "--output", adapter]) == 0
    merged = flat(load_params(base, adapter=adapter)[1])
    assert_equal(merged, flat(from_run(stage_2)[1]), atol=1e-6)


def test_an_exported_adapter_is_evaluated_and_trained_as_the_run(folder, tmp_path, monkeypatch):
    workdir, adapter = str(folder / "run"), str(tmp_path / "adapter")
    assert main(["export", "--checkpoint", workdir, "--adapter", "--output", adapter]) == 0
    expected = flat(from_run(folder / "run")[1])

    arguments = ["--checkpoint", str(folder / "llava"), "--adapter", adapter, *data(folder)]
    arguments += ["--workdir", str(tmp_path / "evaluation")]
    cfg = parse_checkpoint_evaluation([*arguments, "--eval.split", "train"])
    assert_equal(flat(run.load_untrained(cfg)[0]), expected, atol=1e-6)

    _, *arguments = train(folder, "again", "--adapter", adapter)
    with monkeypatch.context() as patch:
        # Processes that train together must be connected before a backend starts.
        patch.setattr(jax, "default_backend", None)
        cfg = parse_experiment("train", arguments, stored=False)
    assert (cfg.lora.rank, cfg.lora.alpha, cfg.lora.dropout) == (3, 6, 0.1)
    mesh = axes.make_mesh(cfg.mesh)
    loaded = traverse_util.unflatten_dict(
        initial.load_parts(cfg, abstract_state(cfg, mesh), mesh), sep="/"
    )
    assert_equal(flat(lora.merge(cfg.lora, loaded)), expected, atol=1e-6)
    assert "(adapter)" in describe_beginning(cfg)


@pytest.fixture(scope="module")
def nf4(folder):
    """Work folder of a run with frozen kernels in 4 bits, and what its training printed."""
    output = io.StringIO()
    options = ["--train.frozen_dtype", "nf4", "--train.compute_dtype", "bfloat16"]
    with contextlib.redirect_stdout(output):
        assert main(train(folder, "nf4", *LORA, *options)) == 0
    return folder / "nf4", output.getvalue()


def load_initial(cfg):
    mesh = axes.make_mesh(cfg.mesh)
    return initial.load_parts(cfg, abstract_state(cfg, mesh), mesh)


def assert_identical(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    assert jax.tree.all(jax.tree.map(np.array_equal, actual, expected))


def test_codes_of_frozen_kernels_never_change(folder, nf4):
    workdir, printed = nf4
    assert re.search(
        r"^frozen +vision .* MiB in nf4 .* decoder 0.\d MiB in nf4 instead of 0.\d MiB in "
        r"bfloat16, with an RMS error of \d\.\d\d% in its kernels",
        printed,
        re.MULTILINE,
    )
    cfg = Workdir(str(workdir)).read_config()
    after = flat(initial.load_state(cfg).params)
    before = {path: x for path, x in load_initial(cfg).items() if is_quantized(x)}
    assert {path.split("/")[0] for path in before} == {"vision", "decoder"}
    assert_identical({path: after[path] for path in before}, before)
    path = "decoder/blocks/layers/block_0/mlp/up/kernel"
    stored = flat(load_params(folder / "llava", np.dtype("bfloat16"))[1])[path]
    assert_identical(before[path], jax.jit(quantize, static_argnums=(1, 2))(stored, "nf4", (1,)))


def test_a_quantized_run_continues_bit_for_bit_and_is_exported(folder, nf4, tmp_path):
    workdir, _ = nf4
    copy, merged, adapter = tmp_path / "run", str(tmp_path / "merged"), tmp_path / "adapter"
    shutil.copytree(workdir, copy)
    cfg = Workdir(str(copy)).read_config()
    expected = initial.load_state(cfg)
    shutil.rmtree(copy / "checkpoints" / "2")
    assert main(["train", "--workdir", str(copy)]) == 0
    assert_identical(initial.load_state(cfg), expected)

    params = flat(from_run(workdir)[1])
    assert {str(x.dtype) for x in params.values()} == {"bfloat16"}
    assert main(["export", "--checkpoint", str(workdir), "--output", merged]) == 0
    assert_equal(flat(load_params(merged, params["decoder/embedding/table"].dtype)[1]), params)
    export = ["export", "--checkpoint", str(workdir), "--adapter", "--output", str(adapter)]
    assert main(export) == 0
    tensors = load_file(adapter / "adapter_model.safetensors")
    stored = flat(expected.params)["decoder/blocks/layers/block_0/mlp/up/lora_a"]
    (name,) = [name for name in tensors if "layers.1.mlp.up_proj.lora_A" in name]
    np.testing.assert_array_equal(tensors[name], stored[1].T)


def test_a_quantized_run_is_the_start_of_another(folder, nf4, monkeypatch):
    """Its adapters are merged into dequantized kernels, which are quantized again."""
    workdir, _ = nf4
    options = ["--lora.rank", "2", "--train.frozen_dtype", "int8"]
    _, *arguments = train(folder, "next", *options, "--init_from", str(workdir))
    arguments = [x for x in arguments if x not in ("--checkpoint", str(folder / "llava"))]
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", None)
        cfg = parse_experiment("train", arguments, stored=False)
    loaded, expected = (
        load_initial(cfg),
        flat(run.load_stored(Workdir(str(workdir)).read_config())[0]),
    )
    path = "decoder/blocks/layers/block_0/mlp/up/kernel"
    largest = np.abs(expected[path]).max(1, keepdims=True)
    assert (np.abs(loaded[path].dequantize() - expected[path]) <= largest * 0.005).all()


def test_what_does_not_fit_is_refused(folder, capsys):
    def refused(*command):
        assert main(list(command)) == 2
        return capsys.readouterr().err

    base, workdir, output = str(folder / "llava"), str(folder / "run"), str(folder / "no")
    export = ("export", "--output", output, "--checkpoint")
    assert "needs the folder of a PEFT adapter to merge into" in refused(*export, base, "--adapter")
    command = (*export, workdir, "--adapter", base)
    assert "leave the folder out to write the adapters" in refused(*command)
    assert "is not a PEFT adapter" in refused(*export, base, "--adapter", base)
    command = train(folder, "no", "--lora.rank", "33")
    assert "lora.rank 33 of lora.targets decoder exceeds the smaller width" in refused(*command)
    command = train(folder, "no", "--lora.rank", "2", "--lora.targets", "decoder.fc1")
    assert "decoder.fc1 matches no kernel of the model" in refused(*command)
    assert not (folder / "no").exists()
