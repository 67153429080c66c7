"""Memory and collectives of a compiled training step of a text model, beside MaxText's.

    python experiments/benchmarks/maxtext.py --maxtext DIR --python PYTHON [--topology v5e:4x4]

DIR is a checkout of https://github.com/AI-Hypercomputer/maxtext, PYTHON an interpreter of another
environment with its requirements and this environment's jax and libtpu. Both sides compile a step
ahead of time, without a TPU: a decoder in the size of Llama 3.2 1B (heads of 128), packed rows of
2,048 tokens, two a chip, parameters and AdamW's state in float32 and split over all chips (FSDP),
bfloat16 compute, every layer rematerialized, layers scanned, float32 logits of 512 tokens at a
time. MaxText compiles with its own `train_compile`. Memory is the compiler's report of one chip,
and collectives are counted in both programs' text by `vlm_jax/plan/hlo.py`.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from configs.published.llama_3_2_1b import DECODER as LLAMA_3_2_1B
from vlm_jax import axes
from vlm_jax.config import Data, Experiment, Fusion, Mesh, Optim, Rope, Train
from vlm_jax.cost.chips import parse_slice
from vlm_jax.plan import compiled, hlo

CODE_BYTES = re.compile(r"generated_code_size_in_bytes=(?P<bytes>\d+)")
DECODER = replace(
    LLAMA_3_2_1B,
    heads=16,
    kv_heads=4,
    max_positions=2048,
    rope=Rope(theta=500_000.0),
    remat="full",
)
TOKENS, ROWS_PER_CHIP, LOSS_CHUNK = 2048, 2, 512


def ours(topology: str, chips: int) -> tuple[int, hlo.Program]:
    """Returns HBM bytes of a chip, and the analyzed program."""
    cfg = Experiment(
        fusion=Fusion("text_only"),
        decoder=DECODER,
        data=Data(source="conversations", files=("train.json",), text_length=TOKENS),
        optim=Optim("adamw", 3e-5, beta1=0.9, beta2=0.95, weight_decay=0.1, clip_norm=1.0),
        train=Train(
            batch_size=ROWS_PER_CHIP * chips, compute_dtype="bfloat16", loss_chunk=LOSS_CHUNK
        ),
        mesh=Mesh(fsdp=chips),
    )
    step = compiled.compile_step(cfg, axes.make_mesh(cfg.mesh, compiled.tpu_devices(topology)))
    return step.hbm_bytes, step.program


def maxtext(options: argparse.Namespace, chips: int) -> tuple[int, hlo.Program]:
    """Returns the same of MaxText's step, from files that the compiler writes."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "run_name": "compare",
            "base_output_directory": folder,
            "compile_topology": f"{options.topology.partition(':')[0]}-{chips}",
            "compile_topology_num_slices": 1,
            "compile_xla_flags": f"--xla_dump_to={folder}",
            "per_device_batch_size": ROWS_PER_CHIP,
            "max_target_length": TOKENS,
            "num_vocab_tiling": ROWS_PER_CHIP * TOKENS // LOSS_CHUNK,
            "decoder_block": "llama2",
            "base_emb_dim": DECODER.width,
            "base_num_decoder_layers": DECODER.depth,
            "base_num_query_heads": DECODER.heads,
            "base_num_kv_heads": DECODER.kv_heads,
            "head_dim": DECODER.head_width,
            "base_mlp_dim": DECODER.mlp_width,
            "vocab_size": DECODER.vocab_size,
            "normalization_layer_epsilon": DECODER.norm_eps,
            "rope_max_timescale": int(DECODER.rope.theta),
            "logits_via_embedding": True,
            "normalize_embedding_logits": False,
            "logits_dot_in_fp32": True,
            "dtype": "bfloat16",
            "weight_dtype": "float32",
            "remat_policy": "full",
            "opt_type": "adamw",
            "gradient_clipping_threshold": 1.0,
            "enable_dropout": False,
            "enable_checkpointing": False,
            "dataset_type": "synthetic",
            "log_config": False,
        }
        source = options.maxtext / "src"
        command = [
            options.python,
            "-m",
            "maxtext.trainers.pre_train.train_compile",
            source / "maxtext/configs/base.yml",
            *(f"{name}={value}" for name, value in settings.items()),
        ]
        # Without a TPU and without Google Cloud.
        environment = {
            "JAX_PLATFORMS": "cpu",
            "DECOUPLE_GCLOUD": "TRUE",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        }
        done = subprocess.run(
            command, cwd=source, env=os.environ | environment, stdout=subprocess.PIPE, text=True
        )
        if done.returncode:
            raise SystemExit(f"{done.stdout}\nMaxText's train_compile failed; its output is above.")
        reserved = compiled.reported_hbm_bytes(Path(folder))
        code = int(CODE_BYTES.search(done.stdout)["bytes"])
        (text,) = Path(folder).glob("*jit_train_step*after_optimizations.txt")
        return reserved + code, hlo.analyze(text.read_text(), chips)


def sent_bytes(program: hlo.Program) -> Counter:
    """Returns the bytes that a chip sends in a step, by kind of collective."""
    sent = Counter()
    for collective in program.collectives:
        sent[collective.kind] += collective.sent_bytes * collective.times
    return sent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--maxtext", type=Path, required=True, metavar="DIR")
    parser.add_argument("--python", required=True, help="of MaxText's environment")
    parser.add_argument("--topology", default="v5e:4x4")
    options = parser.parse_args()
    if not (options.maxtext / "src/maxtext/trainers/pre_train/train_compile.py").is_file():
        raise SystemExit(f"--maxtext {options.maxtext} is not a checkout of MaxText.")
    _, chips = parse_slice(options.topology)
    sides = [ours(options.topology, chips), maxtext(options, chips)]
    rows = {"memory of a chip, GiB": [memory / 2**30 for memory, _ in sides]}
    programs = [program for _, program in sides]
    rows["matmul FLOPs of a chip, T"] = [program.flops / 1e12 for program in programs]
    rows["HBM traffic of a chip, GB"] = [program.hbm_bytes / 1e9 for program in programs]
    sent = [sent_bytes(program) for program in programs]
    rows["sent by a chip, GB"] = [counter.total() / 1e9 for counter in sent]
    for kind in sorted(sent[0] | sent[1]):
        rows[f"  {kind}"] = [counter[kind] / 1e9 for counter in sent]
    print(f"{'':<28}{'vlm_jax':>10}{'MaxText':>10}{'ratio':>8}")
    for name, (mine, other) in rows.items():
        ratio = f"{mine / other:.2f}" if other else "-"
        print(f"{name:<28}{mine:>10.2f}{other:>10.2f}{ratio:>8}")


if __name__ == "__main__":
    main()
