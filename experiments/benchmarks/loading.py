"""Loading a checkpoint of 1 GB: seconds and peak memory, ours against transformers.

    python experiments/benchmarks/loading.py [--stored float32|bfloat16] [--loaded float32|bfloat16]

A Llama of 267 M random parameters is written once. The sides take turns to load it, each in a new
process; the file is in the page cache. "load" excludes imports; transformers maps the file and
reads a tensor at its first use, so both sides touch every parameter before the clock stops.
"process" is all that a user waits for: start of Python, imports, loading, and the logits of the
first prompt, compilation included.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import report
from report import Result

sys.path.insert(0, str(Path(__file__).parents[2]))

TURNS = 5
PROMPT_TOKENS = 16
MEASURED = ("seconds", "process_seconds", "peak_bytes")
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def write_checkpoint(folder: Path, dtype: str) -> int:
    """Writes random tensors; returns the bytes of the file."""
    import ml_dtypes
    import numpy as np

    from vlm_jax.hub.families.registry import FAMILIES
    from vlm_jax.hub.load import param_shapes
    from vlm_jax.hub.save import Spec
    from vlm_jax.hub.tensors.folder import write_tensors

    family, rng = FAMILIES["llama"], np.random.default_rng(0)
    cfg = family.config_from_hf(CONFIG, ["lm_head.weight"])
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    shapes = param_shapes(cfg)
    specs = {row.tensor: Spec(row.stored_shape(shapes), kind) for row in family.param_table(cfg)}
    write_tensors(
        folder, specs, lambda name: rng.standard_normal(specs[name].shape, np.float32).astype(kind)
    )
    (folder / "config.json").write_text(json.dumps(CONFIG | {"torch_dtype": dtype}))
    return (folder / "model.safetensors").stat().st_size


def load_ours(folder: str, dtype: str) -> tuple[float, Callable]:
    """Returns seconds, and a function that computes the logits of a prompt."""
    import jax

    from vlm_jax.hub.load import load_params
    from vlm_jax.nn.vlm import example_batch

    jax.devices()
    start = time.perf_counter()
    model, params = jax.block_until_ready(load_params(folder, dtype))
    seconds = time.perf_counter() - start
    logits = jax.jit(lambda params, batch: model.apply({"params": params}, batch).logits)
    return seconds, lambda: logits(
        params, example_batch(model.cfg, length=PROMPT_TOKENS)
    ).block_until_ready()


def load_theirs(folder: str, dtype: str) -> tuple[float, Callable]:
    """See `load_ours`."""
    import torch
    from transformers import LlamaForCausalLM

    start = time.perf_counter()
    model = LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            # Touch every page.
            parameter.view(-1).view(torch.uint8)[::4096].sum()
    seconds = time.perf_counter() - start
    return seconds, torch.no_grad()(lambda: model(torch.zeros(1, PROMPT_TOKENS, dtype=torch.long)))


SIDES = {"vlm_jax": load_ours, "transformers": load_theirs}


def measure(side: str, folder: str, dtype: str) -> dict[str, float]:
    """Returns seconds and bytes of a new process that loads the folder and computes logits."""
    command = [sys.executable, __file__, "--side", side, "--folder", folder, "--loaded", dtype]
    start = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return {"process_seconds": time.perf_counter() - start} | json.loads(
        done.stdout.splitlines()[-1]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stored", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--loaded", default="float32", choices=("float32", "bfloat16"))
    report.add_option(parser)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        seconds, compute_logits = SIDES[options.side](options.folder, options.loaded)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        compute_logits()
        print(json.dumps({"seconds": seconds, "peak_bytes": peak * 1024}))
        return
    with tempfile.TemporaryDirectory() as folder:
        size = write_checkpoint(Path(folder), options.stored)
        turns = [
            {side: measure(side, folder, options.loaded) for side in SIDES} for _ in range(TURNS)
        ]
    size_gb = size / 1e9
    print(f"{size_gb:.2f} GB in {options.stored}, loaded as {options.loaded}; {TURNS} turns")
    print(f"{'':<24}{'load s':>8}{'process s':>11}{'peak GB':>9}{'peak / size':>13}")
    for side in SIDES:
        load, process, peak = (
            statistics.median(turn[side][key] for turn in turns) for key in MEASURED
        )
        print(f"{side:<24}{load:>8.2f}{process:>11.2f}{peak / 1e9:>9.2f}{peak / size:>13.2f}")
    ratios = {
        key: [turn["vlm_jax"][key] / turn["transformers"][key] for turn in turns]
        for key in MEASURED
    }
    results = [
        Result.of("loading a checkpoint", "times transformers' seconds", ratios["seconds"]),
        Result.of(
            "start of Python to first logits",
            "times transformers' seconds",
            ratios["process_seconds"],
        ),
        Result.of("loading a checkpoint", "times transformers' peak memory", ratios["peak_bytes"]),
    ]
    report.write(results, options.json)


if __name__ == "__main__":
    main()
