"""`python run.py plan`: its table, its JSON and its error messages."""

import functools
import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from vlm_jax import axes
from vlm_jax.cli.main import main
from vlm_jax.cli.plan import PLAN_OPTIONS
from vlm_jax.config import Mesh, files
from vlm_jax.config.validate import validate
from vlm_jax.cost import chips, flops
from vlm_jax.nn.parts import trained_parts
from vlm_jax.plan import compiled, memory, table

ROOT = Path(__file__).parents[2]
CONFIGS, PLANS = ROOT / "configs", ROOT / "experiments/plans"
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs requirements-tpu.txt"
)

CONFIG = """
from vlm_jax import testing

def get_config():
    return testing.tiny({kind!r})
"""


@pytest.fixture(scope="module", autouse=True)
def predict_once():
    """Predicts the memory of each experiment once: tracing its step is most of a plan's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "predict_memory", functools.cache(memory.predict_memory))
        yield


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG.format(kind="unified"))
    return str(path)


def planned(capsys, *arguments) -> dict:
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_is_the_only_thing_on_stdout_and_adds_up(capsys, config):
    plan = planned(capsys, "--config", config, "--optim.lr_mult.vision", "0")
    sizes = plan["bytes_per_device"]
    assert sizes.pop("total") == sum(sizes.values())
    work = [part["forward_flops"] + part["backward_flops"] for part in plan["parts"].values()]
    assert sum(work) == plan["train_flops"]
    vision, decoder = plan["parts"]["vision"], plan["parts"]["decoder"]
    assert vision["trained_parameters"] == vision["backward_flops"] == 0
    assert decoder["trained_parameters"] == decoder["parameters"]
    assert plan["tokens"] == {
        "images": 1, "tiles": 1, "patches": 4, "encoder": 4, "features": 4,
        "projected": 4, "sequence": 28, "memory": 0,
    }  # fmt: skip


def test_lora_trains_a_share_of_its_part(capsys, config):
    options = ["--lora.rank", "2", "--lora.targets", "decoder.query"]
    decoder = planned(capsys, "--config", config, *options)["parts"]["decoder"]
    # Of two layers with 32 inputs and 4 heads of 8 dimensions.
    assert decoder["trained_parameters"] == 2 * (32 * 2 + 2 * 32)
    assert main(["plan", "--config", config, *options]) == 0
    share = decoder["trained_parameters"] / decoder["parameters"]
    assert f"{share:.1%} trained" in capsys.readouterr().out


def test_the_table_names_every_part_and_size(capsys, config):
    assert main(["plan", "--config", config, "--fusion.kind", "cross_attention"]) == 0
    text = capsys.readouterr().out
    for word in (
        "vision",
        "projector",
        "decoder",
        "cross_attention",
        "trained",
        "activations",
        "optimizer",
        "GiB",
    ):
        assert word in text
    assert (
        "16 x 16 px -> 4 patches of 8 px -> encoder: 4 tokens -> projector: 4 -> 4 tokens" in text
    )
    assert "24 tokens per row, which attend to 4 image tokens" in text


def test_more_devices_hold_less_each(capsys, config):
    one = planned(capsys, "--config", config)
    eight = planned(
        capsys, "--config", config, "--devices", "8", "--mesh.data", "1", "--mesh.fsdp", "-1"
    )
    assert eight["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1}
    assert eight["bytes_per_device"]["parameters"] < one["bytes_per_device"]["parameters"] / 4


@pytest.mark.parametrize(
    "seconds, said",
    [
        (0, "0 s"),
        (2.3e-7, "2.3e-07 s"),
        (3.127e-5, "31.3 us"),
        (0.024, "24 ms"),
        (0.9996, "1 s"),
        (1.4902, "1.49 s"),
    ],
)
def test_any_time_has_three_digits(seconds, said):
    assert table.short(seconds, "s") == said


TIMES = """
one step                per chip  at peak rate
FLOPs of XLA's program  12 GFLOP       60.9 us
HBM reads and writes      115 MB        140 us
sent between chips           0 B           0 s
XLA's program has 3.000 times the FLOPs of the model

collectives  step time   MFU    tokens/s  images/s
overlapped      140 us  0.25  40,000,000   500,000
serial         1.23 ms  0.03   4,535,000    56,700
"""


def speed(step_seconds, mfu, tokens, images) -> dict:
    return {
        "step_seconds": step_seconds,
        "mfu": mfu,
        "tokens_per_second": tokens,
        "images_per_second": images,
    }


def test_times_of_a_small_step_have_columns(capsys, config):
    plan = planned(capsys, "--config", config) | {"train_flops": 8e9}
    plan["topology"] = {
        "name": "v5e:1x2",
        "devices": 2,
        "hbm_bytes": 2e10,
        "fits": True,
        "compile_seconds": 9,
        "compiled_bytes": 1e9,
        "xla_flops": 2.4e10,
        "moved_bytes": 115e6,
        "collectives": [],
        "roofline_seconds": {"compute": 6.09e-5, "hbm": 1.4e-4, "interconnect": 0},
        "overlapped": speed(step_seconds=1.4e-4, mfu=0.25, tokens=4e7, images=5e5),
        "serial": speed(step_seconds=1.234e-3, mfu=0.028, tokens=4.535e6, images=5.67e4),
    }
    assert TIMES in table.format_plan(files.load(config), plan)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--topology", "v5e:7x7"], "v5e:1x1 2x2 2x4"),
        (["--devices", "3", "--mesh.data", "2"], "the three must multiply to 3"),
        (["--devices", "3"], "choose a multiple of 3"),
        (["--devices", "0"], "at least 1"),
        (["--topology", ""], "--topology '' is not a TPU slice: choose CHIP:LAYOUT"),
        (
            ["--topology", "v5e:2x2", "--devices", "1"],
            "--topology and --devices both set the device count: choose one.",
        ),
        (["--no-compile"], "--no-compile needs --topology, such as v5e:8x8."),
        (["--no-compile", "--devices", "2"], "--no-compile needs --topology, such as v5e:8x8."),
        (
            ["--toplogy", "v5e:8x8"],
            "--toplogy is not a field (perhaps you meant topology); --help lists all of them.",
        ),
        (["--no_compile"], "perhaps you meant no-compile"),
    ],
)
def test_mistakes_are_one_sentence(capsys, config, arguments, said):
    assert main(["plan", "--config", config, *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_help_lists_the_options_of_plan_beside_the_fields(capsys, config):
    with pytest.raises(SystemExit):
        main(["plan", "--config", config, "--help"])
    out = capsys.readouterr().out
    for option in (*PLAN_OPTIONS, "fusion.kind"):
        assert f"--{option} " in out


def test_without_the_compiler_it_says_how_to_get_it(capsys, config, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["plan", "--config", config, "--topology", "v5e:2x2"]) == 2
    assert "pip install -r requirements-tpu.txt" in capsys.readouterr().err


SMALL_STEP = """
from dataclasses import replace
from vlm_jax import testing

def get_config():
    cfg = testing.tiny()
    decoder = replace(cfg.decoder, mlp_width=512)
    return replace(cfg, vision=replace(cfg.vision, kind="none"), decoder=decoder)
"""


@pytest.fixture
def small_step(tmp_path):
    """Without an encoder, which takes half of the time to compile; nearly all work is matmuls."""
    path = tmp_path / "small_step.py"
    path.write_text(SMALL_STEP)
    return str(path)


@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:2x2", pytest.param("v4:2x2x1", marks=pytest.mark.slow)])
def test_a_step_is_compiled_for_a_slice_of_tpus(capsys, small_step, topology):
    plan = planned(
        capsys,
        "--config",
        small_step,
        "--topology",
        topology,
        "--mesh.data",
        "1",
        "--mesh.fsdp",
        "-1",
    )
    found, chip = plan["topology"], chips.parse_slice(topology)[0]
    assert found["fits"] and found["devices"] == 4 and found["hbm_bytes"] == chip.hbm_bytes
    work, rate = found["xla_flops"], chip.flops_per_second("float32")
    assert found["roofline_seconds"]["compute"] == pytest.approx(work / (4 * rate))
    assert found["xla_flops"] == pytest.approx(flops.train_flops(files.load(small_step)), rel=0.03)
    assert {"all-reduce", "all-gather"} <= {
        collective["kind"] for collective in found["collectives"]
    }
    assert found["overlapped"]["step_seconds"] <= found["serial"]["step_seconds"]


SLICES = [f"{chip.name}:{layout}" for chip in chips.CHIPS for layout in chip.slices]


@needs_libtpu
def test_the_compiler_knows_every_slice_that_is_offered():
    for topology in SLICES:
        _, count = chips.parse_slice(topology)
        assert axes.make_mesh(Mesh(), compiled.tpu_devices(topology)).size == count, topology


@needs_libtpu
def test_what_does_not_fit_is_said_with_what_to_change(capsys, config):
    arguments = [
        "--config",
        config,
        "--topology",
        "v5e:1x1",
        "--train.batch_size",
        "65536",
        "--no-compile",
    ]
    plan = planned(capsys, *arguments)
    assert plan["topology"] == {
        "name": "v5e:1x1",
        "devices": 1,
        "hbm_bytes": 16 * 2**30,
        "fits": False,
    }
    assert main(["plan", *arguments]) == 0
    text = capsys.readouterr().out
    assert (
        "v5e:1x1, predicted without compiling\ndoes not fit: " in text
        and " of 16.00 GiB per chip" in text
    )
    advice = text[text.index("to reduce memory") :].splitlines()[1:]
    assert advice[0].startswith("activations") and "more train.microbatches" in advice[0]


@needs_libtpu
@pytest.mark.parametrize(
    "said", ["Used 20.50G of 15.75G hbm.", "for HLO temporaries (20.50G) exceeds HBM (15.75G)."]
)
def test_what_the_compiler_says_does_not_fit_is_said(capsys, config, monkeypatch, said):
    def refuse(cfg, mesh):
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: Ran out of memory. {said}")

    monkeypatch.setattr(compiled, "lower_train_step", refuse)
    assert main(["plan", "--config", config, "--topology", "v5e:1x1"]) == 0
    assert (
        "does not fit: 20.50 GiB of 16.00 GiB per chip\nto reduce memory" in capsys.readouterr().out
    )


@needs_libtpu
@pytest.mark.parametrize("file", sorted(PLANS.glob("*.txt")), ids=lambda file: file.stem)
def test_what_is_kept_of_a_training_config_is_what_is_planned_today(capsys, file):
    """All but what takes minutes to compile."""
    command, _, kept = file.read_text().partition("\n")
    assert main([*command.replace("configs/", f"{CONFIGS}/").split()[3:], "--no-compile"]) == 0
    said, compiled_part = capsys.readouterr().out.split("\n\n" + command.split()[-1])
    assert kept.startswith(said + "\n\nCompiled for "), f"plan it again: {command}"
    assert "\nfits: " in compiled_part


# The devices that the docstring of a LoRA config names: a slice, or one GPU.
V5E, ONE_V5E, H100 = "v5e:2x4", "v5e:1x1", chips.find_chip("NVIDIA H100 80GB HBM3")
LORA_DEVICES = {
    "llava_1_5_7b_stage_1": V5E,
    "llava_1_5_7b": V5E,
    "llava_1_5_7b_qlora": ONE_V5E,
    "paligemma_3b_224": V5E,
    "llama_3_2_11b_vision": V5E,
    "llava_1_5_7b_h100": H100,
}


def test_every_config_of_a_large_model_names_its_devices():
    assert {path.stem for path in (CONFIGS / "lora").glob("*.py")} == LORA_DEVICES.keys()
    assert {path.stem for path in (CONFIGS / "tpu").glob("*.py")} <= {
        path.stem for path in PLANS.glob("*.txt")
    }


@needs_libtpu
@pytest.mark.parametrize(
    "name",
    # Traced for seconds.
    [pytest.param(n, marks=pytest.mark.slow) if "llama" in n else n for n in LORA_DEVICES],
)
def test_a_lora_config_fits_its_devices(capsys, name):
    config, devices = ["--config", str(CONFIGS / "lora" / f"{name}.py")], LORA_DEVICES[name]
    if devices != H100:
        plan = planned(capsys, *config, "--topology", devices, "--no-compile")
        assert plan["topology"]["fits"]
    else:
        plan = planned(capsys, *config)
        assert plan["bytes_per_device"]["total"] < devices.hbm_bytes
    assert plan["parts"]["vision"]["trained_parameters"] == 0
    decoder = plan["parts"]["decoder"]
    assert decoder["trained_parameters"] < decoder["parameters"] / 20


@pytest.mark.parametrize(
    "name, trained",
    [
        ("llava_1_5_7b_stage_1", {"projector"}),
        ("llava_1_5_7b_stage_2", {"projector", "decoder"}),
        ("paligemma_3b_224_transfer", {"vision", "projector", "decoder"}),
        ("llama_3_2_11b_vision_train", {"vision", "projector", "cross_attention"}),
    ],
)
def test_training_configs_train_their_parts_of_the_published_model(name, trained):
    cfg = validate(files.load(str(CONFIGS / "tpu" / f"{name}.py")))
    base = files.load(
        str(CONFIGS / "published" / f"{name[: name.rindex('_')].removesuffix('_stage')}.py")
    )
    parts = {"vision", "projector", "decoder"} | (
        {"cross_attention"} if cfg.fusion.kind == "cross_attention" else set()
    )
    assert trained_parts(cfg.optim) & parts == trained
    assert replace(cfg.decoder, remat="none") == base.decoder
    assert replace(cfg.vision, remat="none") == base.vision
    assert cfg.projector == base.projector
