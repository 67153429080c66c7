"""The commands `verify` and `export`, about folders of public checkpoints."""

from vlm_jax.cli.options import ADAPTER, FILE, FOLDER, INTERMEDIATE_LAYERS, STEP, parse_options
from vlm_jax.config import ConfigError
from vlm_jax.runtime.workdir import Workdir, is_run

VERIFY = """examples:
  python run.py verify --checkpoint checkpoints/gpt2 --reference gpt2.npz
  python run.py verify --checkpoint checkpoints/gpt2 --reference gpt2.npz --outputs logits

Compares the outputs of a public checkpoint with those of a reference implementation. The exit
code is 0 if all compared outputs agree, else 1."""
VERIFY_OPTIONS = {
    "checkpoint": {"required": True, "metavar": FOLDER, "help": "folder of a public checkpoint"},
    "adapter": ADAPTER,
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
  python run.py export --checkpoint runs/mine --adapter --output adapter
  python run.py export --checkpoint checkpoints/gpt2 --adapter adapter --output merged

Writes a folder that transformers loads; with --adapter, of the adapters of a run alone, one that
PEFT loads, or of a checkpoint with an adapter merged."""
EXPORT_OPTIONS = {
    "checkpoint": {
        "required": True,
        "metavar": FOLDER,
        "help": "folder of a public checkpoint, or of a run",
    },
    "output": {"required": True, "metavar": FOLDER, "help": "folder to write"},
    "step": STEP,
    "adapter": {
        "nargs": "?",
        "const": True,
        "metavar": "DIR",
        "help": "without DIR: write the LoRA adapters of a run in PEFT's format; with DIR: merge "
        "the adapter of that folder into a public checkpoint",
    },
    "intermediate_layers": INTERMEDIATE_LAYERS,
}


def verify(arguments: list[str]) -> int:
    """Compares a checkpoint with a reference; returns 0 if they agree."""
    args, _ = parse_options("verify", arguments, VERIFY_OPTIONS, VERIFY)
    from vlm_jax.infer import verify

    outputs = [name for name in args.outputs.split(",") if name]
    verification = verify.verify(
        args.checkpoint,
        args.reference,
        outputs,
        args.atol,
        args.intermediate_layers,
        args.adapter,
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

    _check_adapter(args)
    if args.step is not None and not is_run(args.checkpoint):
        raise ConfigError(f"--step is for a run, and --checkpoint {args.checkpoint} is not one.")
    if args.adapter is True:
        kind = _export_adapters(args)
        print(f"wrote {args.output} (of {kind}), loadable with peft")
        return 0
    if is_run(args.checkpoint):
        kind = _export_run(args)
    else:
        kind = export.export_checkpoint(
            args.checkpoint, args.output, args.intermediate_layers, args.adapter
        )
    print(f"wrote {args.output} ({kind}), loadable with transformers")
    return 0


def _check_adapter(args) -> None:
    """Raises ConfigError if --adapter names a folder for a run, or none for a checkpoint."""
    if args.adapter is True and not is_run(args.checkpoint):
        raise ConfigError(
            f"--adapter needs the folder of a PEFT adapter to merge into --checkpoint "
            f"{args.checkpoint}, which is not a run."
        )
    if isinstance(args.adapter, str) and is_run(args.checkpoint):
        raise ConfigError(
            f"--adapter {args.adapter} cannot be merged into the run --checkpoint "
            f"{args.checkpoint}: leave the folder out to write the adapters of the run."
        )


def _export_adapters(args) -> str:
    """Writes the adapters of a run; returns the family of their base model."""
    from vlm_jax.hub.peft.write import write_adapter
    from vlm_jax.train.initial import load_state

    workdir = Workdir(args.checkpoint)
    cfg = workdir.read_config()
    if cfg.lora.rank is None:
        raise ConfigError(
            f"--checkpoint {args.checkpoint} has no adapters (lora.rank is None): leave out "
            "--adapter to write the whole model."
        )
    return write_adapter(cfg, load_state(cfg, args.step).params, args.output, workdir.processor)


def _export_run(args) -> str:
    """Exports a run; returns the family that it is written as."""
    from vlm_jax.hub import export
    from vlm_jax.hub.families.registry import FAMILIES
    from vlm_jax.infer import run

    workdir = Workdir(args.checkpoint)
    cfg = workdir.read_config()
    export.refuse_used(args.output)
    params, _ = run.load_stored(cfg, args.step)
    kind = export.export_run(
        cfg, params, workdir.tokenizer, args.output, args.intermediate_layers, workdir.processor
    )
    prompts = export.prompt_differences(cfg, FAMILIES[kind])
    if prompts:
        print(f"the processor of transformers writes other prompts than {' and '.join(prompts)}")
    return kind
