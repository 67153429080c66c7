"""Runs the shell commands of the documents, shortened, on tiny checkpoints and data.

    python .ci/commands.py [README.md docs/training.md ...]

A fenced block without a language, or of `bash`, is a command if its first word is one of COMMANDS.
A block is run as a whole, in a scratch folder that has the repository's files; each document has
its own. Placeholders such as LLAVA_DIR are replaced by tiny checkpoints that transformers makes,
and long commands get SHORT options.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.xla_flags import QUICK_COMPILATION  # noqa: E402

DOCUMENTS = [
    "README.md",
    # The others at the same time, the longest first.
    "docs/training.md",
    "docs/attention_maps.md",
    "docs/fine_tuning.md",
    "docs/conversations.md",
    "docs/quickstart.ipynb",
    "docs/checkpoints.md",
    "docs/evaluation.md",
    "docs/chat_and_server.md",
    "docs/native_resolution.md",
]
WORKERS = 3  # documents at once: most commands wait for one core
COMMANDS = ("python", "image=", "XLA_FLAGS=", "run=")
SHORT = {  # subcommand: options that are added unless the command has them
    "train": {"--train.steps": "4", "--eval.max_examples": "20"},
    "train --checkpoint": {"--train.steps": "2", "--train.batch_size": "4"},
    "eval": {"--eval.max_examples": "20", "--eval.batch_size": "20"},
    "eval --checkpoint": {"--eval.batch_size": "20"},
    "generate": {"--max-new-tokens": "8"},
    "look": {"--max-new-tokens": "8"},
    "chat": {"--max-new-tokens": "8"},
}
NOT_RUN = (
    "pip install",
    "hf download",
    "python -m pytest",
    "python -m lmms_eval",  # downloads its tasks' data
    "python run.py serve",  # runs until it is stopped
    "python run.py demo",  # so does this
    "python experiments/benchmarks",
)


def main() -> int:
    documents = sys.argv[1:] or list(DOCUMENTS)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "first")
        folder.mkdir()
        replacements = prepare(folder)
        # Later documents use the main job of README.
        if documents[0] == "README.md":
            print(run_document(documents.pop(0), replacements, folder), flush=True)
        with ThreadPoolExecutor(WORKERS) as pool:
            runs = []
            for document in documents:
                copy = Path(scratch, Path(document).stem)
                shutil.copytree(folder, copy, symlinks=True)
                remove_runs(copy)
                runs.append(pool.submit(run_document, document, replacements, copy))
            try:
                for run in as_completed(runs):
                    print(run.result(), flush=True)
            except SystemExit:
                pool.shutdown(cancel_futures=True)
                raise
    return 0


def run_document(document: str, replacements: dict[str, str], folder: Path) -> str:
    """Runs the commands of a document in a folder; returns them with their seconds."""
    if document.endswith(".ipynb"):
        return run_notebook(document, folder)
    blocks = [shortened(block, replacements) for block in commands(ROOT / document)]
    return "\n".join(run(document, block, folder) for block in blocks)


def commands(document: Path) -> list[str]:
    """The fenced blocks of a document that are shell commands."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", document.read_text(), re.M | re.S)
    blocks = [block for language, block in fenced if language in ("", "bash")]
    blocks = [re.sub(r"\\\n\s*", "", block) for block in blocks]
    return [block for block in blocks if run_lines(block)]


def run_lines(block: str) -> list[str]:
    """The lines of a block that are run."""
    lines = [line.split("  #")[0].strip() for line in block.splitlines()]
    lines = [line.removeprefix("pip install -r requirements.txt && ") for line in lines]
    lines = [line for line in lines if line and not line.startswith(NOT_RUN)]
    return lines if lines and all(line.startswith((*COMMANDS, "$run")) for line in lines) else []


def shortened(block: str, replacements: dict[str, str]) -> str:
    lines = []
    for line in run_lines(block):
        for name, value in replacements.items():
            line = re.sub(rf"(?<![\w/.]){re.escape(name)}(?![\w/])", value, line)
        options = short_options(line)
        missing = [f"{name} {value}" for name, value in options.items() if name not in line]
        lines.append(" ".join([line, *missing]))
    return "\n".join(lines)


def short_options(line: str) -> dict[str, str]:
    if "run.py" not in line or "--help" in line or "$run" in line or line.startswith("run="):
        return {}
    words = line.split("run.py", 1)[1].split()
    command = "train" if words[0].startswith("--") else words[0]
    if f"{command} --checkpoint" in SHORT and "--checkpoint" in words:
        command = f"{command} --checkpoint"
    return SHORT.get(command, {})


def run(document: str, script: str, folder: Path) -> str:
    start = time.perf_counter()
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}\n{document}: exit code {done.returncode} of\n{script}")
    return f"== {document}\n{script}\n   {time.perf_counter() - start:.0f} s"


def remove_runs(folder: Path) -> None:
    """Removes the runs of other documents; README's main job stays."""
    for run in (folder / "runs").glob("*"):
        if run.name != "easy_vqa_unified":
            shutil.rmtree(run)


def run_notebook(document: str, folder: Path) -> str:
    """Executes the cells of a notebook with few training steps; the first error ends it."""
    import nbformat
    from nbclient import NotebookClient

    start = time.perf_counter()
    os.environ |= {"STEPS": "2", "CHECKPOINT": str(folder / "checkpoints" / "llama")}
    notebook = nbformat.read(ROOT / document, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("max_examples 500", "max_examples 20")
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    return f"== {document}\n   {time.perf_counter() - start:.0f} s"


def prepare(folder: Path) -> dict[str, str]:
    """Links files, makes tiny checkpoints and data; returns the values of the placeholders."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("XLA_FLAGS", " ".join(QUICK_COMPILATION))
    for name in ("run.py", "requirements.txt", "configs", "experiments", "vlm_jax", "docs"):
        (folder / name).symlink_to(ROOT / name)
    images = folder / "images"
    images.mkdir()
    records = []
    for number in range(8):
        pixels = np.full((40 + number, 56, 3), 30 * number, np.uint8)
        Image.fromarray(pixels).save(images / f"{number}.png")
        turns = [("human", "<image>\nhow bright is it?"), ("gpt", f"{number} of 8")]
        turns = [{"from": speaker, "value": value} for speaker, value in turns]
        record = {"id": str(number), "image": f"{number}.png", "conversations": turns}
        records.append(record | {"answers": [f"{number} of 8"] * 10})
    for name in ("train.json", "captions.json", "test.json"):
        (folder / name).write_text(json.dumps(records))
    Image.fromarray(pixels).save(folder / "a.jpg")
    (folder / "questions.txt").write_text("/image a.jpg\nhow bright is it?\nis it red?\n/undo\n")
    return {"LLAVA_DIR": "checkpoints/llava", "DIR": "checkpoints/llava", **checkpoints(folder)}


def checkpoints(folder: Path) -> dict[str, str]:
    """Writes tiny checkpoints and a reference; only here are torch and transformers imported."""
    import torch
    import transformers

    from tests.hub import tiny_checkpoints

    transformers.logging.set_verbosity_error()
    for name in ("llava", "llama", "siglip"):
        (folder / "checkpoints" / name).mkdir(parents=True)
    llava = tiny_checkpoints.llava(folder / "checkpoints" / "llava")
    tiny_checkpoints.llama(folder / "checkpoints" / "llama")
    vision = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        image_size=32, patch_size=16,
    )  # fmt: skip
    siglip = folder / "checkpoints" / "siglip"
    transformers.SiglipVisionModel(vision).save_pretrained(siglip)
    size = {"height": 32, "width": 32}
    transformers.SiglipImageProcessor(size=size).save_pretrained(siglip)
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        logits = llava.model(input_ids=ids).logits
    reference = {"text/in/input_ids": ids.numpy(), "text/out/logits": logits.numpy()}
    np.savez(folder / "reference.npz", **reference)
    return {
        "SIGLIP_DIR": "checkpoints/siglip",
        "LLAMA_DIR": "checkpoints/llama",
        "DIR_OR_WORKDIR": "checkpoints/llava",
        "OUT": "out",
        "FILE.npz": "reference.npz",
    }


if __name__ == "__main__":
    raise SystemExit(main())
