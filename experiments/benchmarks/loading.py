"""Loading a checkpoint of 1 GB: seconds and peak memory, ours against transformers.

    python experiments/benchmarks/loading.py [--stored float32|bfloat16] [--loaded float32|bfloat16]

A Llama of 267 M random parameters is written once. Then each side loads it in a process of its own, the two in turn;
imports are not counted, and the file is in the page cache for both. transformers maps the file and reads a tensor when
it is first used, so that both sides touch every parameter before the clock stops.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

TURNS = 5
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
    """Random numbers in every tensor; returns the bytes of the file."""
    import ml_dtypes
    import numpy as np

    from vlm_jax.hub.families import FAMILIES
    from vlm_jax.hub.files import write_tensors
    from vlm_jax.hub.load import shapes_of
    from vlm_jax.hub.save import Spec

    family, rng = FAMILIES["llama"], np.random.default_rng(0)
    cfg = family.read(CONFIG, ["lm_head.weight"])
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    specs = {row.hub: Spec(row.stored_shape(shapes_of(cfg)), kind) for row in family.rows(cfg)}
    write_tensors(folder, specs, lambda name: rng.standard_normal(specs[name].shape, np.float32).astype(kind))
    (folder / "config.json").write_text(json.dumps(CONFIG | {"torch_dtype": dtype}))
    return (folder / "model.safetensors").stat().st_size


def load_ours(folder: str, dtype: str) -> float:
    import jax

    from vlm_jax.hub.load import load_params

    jax.devices()
    begun = time.perf_counter()
    jax.block_until_ready(load_params(folder, dtype)[1])
    return time.perf_counter() - begun


def load_theirs(folder: str, dtype: str) -> float:
    import torch
    from transformers import LlamaForCausalLM

    begun = time.perf_counter()
    model = LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1).view(torch.uint8)[::4096].sum()  # every page
    return time.perf_counter() - begun


SIDES = {"vlm_jax": load_ours, "transformers": load_theirs}


def measure(side: str, folder: str, dtype: str) -> dict[str, float]:
    """Seconds and bytes of a fresh process that loads the folder once."""
    command = [sys.executable, __file__, "--side", side, "--folder", folder, "--loaded", dtype]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stored", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--loaded", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seconds = SIDES[given.side](given.folder, given.loaded)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({"seconds": seconds, "peak_bytes": peak * 1024, "before_bytes": begun * 1024}))
        return
    with tempfile.TemporaryDirectory() as folder:
        size = write_checkpoint(Path(folder), given.stored)
        turns = [{side: measure(side, folder, given.loaded) for side in SIDES} for _ in range(TURNS)]
    print(f"a checkpoint of {size / 1e9:.2f} GB in {given.stored}, loaded as {given.loaded}; median of {TURNS} turns")
    print(f"{'':<14}{'seconds':>9}{'peak GB':>9}{'peak / size':>13}")
    for side in SIDES:
        seconds, peak = (statistics.median(turn[side][key] for turn in turns) for key in ("seconds", "peak_bytes"))
        print(f"{side:<14}{seconds:>9.2f}{peak / 1e9:>9.2f}{peak / size:>13.2f}")
    ratio = statistics.median(turn["vlm_jax"]["seconds"] / turn["transformers"]["seconds"] for turn in turns)
    print(f"seconds, vlm_jax / transformers: {ratio:.2f}")


if __name__ == "__main__":
    main()
