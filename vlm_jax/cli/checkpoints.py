"""The commands `verify` and `export`, about folders of public checkpoints."""

from vlm_jax.cli.options import FILE, FOLDER, INTERMEDIATE_LAYERS, parse_options
from vlm_jax.runtime.workdir import Workdir, is_run

VERIFY = """examples:
  python run.py verify --checkpoint checkpoints/gpt2 --reference gpt2.npz
  python run.py verify --checkpoint checkpoints/gpt2 --reference gpt2.npz --outputs logits

Compares the outputs of a public checkpoint with those of a reference implementation. The exit
code is 0 if all compared outputs agree, else 1."""
VERIFY_OPTIONS = {
    "checkpoint": {"required": True, "metavar": FOLDER, "help": "folder of a public checkpoint"},
    "reference": {
        "required": True,
        "metavar": FILE,
        "help": ".npz file with arrays <case>/in/<argument> and <case>/out/<output>",
    },
    "outputs": {
        "default": "",
        "metavar": "A,B",
        "help": "outputs to compare, separated by commas (default: all)",
    },
    "atol": {
        "type": float,
        "metavar": "X",
        "help": "largest absolute difference (default: 1e-4; 3e-4 for Gemma and PaliGemma)",
    },
    "intermediate_layers": INTERMEDIATE_LAYERS,
}
EXPORT = """examples:
  python run.py export --checkpoint runs/mine --output exported
  python run.py export --checkpoint checkpoints/gpt2 --output copy

Writes a folder that transformers loads."""
EXPORT_OPTIONS = {
    "checkpoint": {
        "required": True,
        "metavar": FOLDER,
        "help": "folder of a public checkpoint, or of a run",
    },
    "output": {"required": True, "metavar": FOLDER, "help": "folder to write"},
    "intermediate_layers": INTERMEDIATE_LAYERS,
}


def verify(arguments: list[str]) -> int:
    """Compares a checkpoint with a reference; returns 0 if they agree."""
    args, _ = parse_options("verify", arguments, VERIFY_OPTIONS, VERIFY)
    from vlm_jax.infer import verify

    outputs = [name for name in args.outputs.split(",") if name]
    verification = verify.verify(
        args.checkpoint, args.reference, outputs, args.atol, args.intermediate_layers
    )
    print(verify.table(verification.comparisons))
    count = f"{len(verification.agreeing)} of {len(verification.compared)} compared outputs agree"
    if verification.intermediate_layers:
        count += f", with --intermediate-layers {verification.intermediate_layers}"
    print(count)
    return 0 if verification.agrees else 1


def export(arguments: list[str]) -> int:
    """Writes a public checkpoint or a run as a folder for transformers."""
    args, _ = parse_options("export", arguments, EXPORT_OPTIONS, EXPORT)
    from vlm_jax.hub import export

    if is_run(args.checkpoint):
        kind = _export_run(args)
    else:
        kind = export.export_checkpoint(args.checkpoint, args.output, args.intermediate_layers)
    print(f"wrote {args.output} ({kind}), loadable with transformers")
    return 0


def _export_run(args) -> str:
    """Exports a run; returns the family that it is written as."""
    from vlm_jax.hub import export
    from vlm_jax.hub.families.registry import FAMILIES
    from vlm_jax.infer import run

    workdir = Workdir(args.checkpoint)
    cfg = workdir.read_config()
    export.refuse_used(args.output)
    params, _ = run.load_stored(cfg)
    kind = export.export_run(
        cfg, params, workdir.tokenizer, args.output, args.intermediate_layers, workdir.processor
    )
    prompts = export.prompt_differences(cfg, FAMILIES[kind])
    if prompts:
        print(f"the processor of transformers writes other prompts than {' and '.join(prompts)}")
    return kind
