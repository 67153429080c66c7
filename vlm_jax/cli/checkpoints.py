"""The verbs about public checkpoints: `verify`, `export`, and `generate --checkpoint`."""

import argparse

from vlm_jax.config import ConfigError
from vlm_jax.config.bounds import check_sampling
from vlm_jax.config.hints import nearest_field
from vlm_jax.runtime.workdir import Workdir, is_run


class Parser(argparse.ArgumentParser):
    """A mistake is a ConfigError; what it does not know can be left to others."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str):
        raise ConfigError(f"{message}.")


SYNONYMS = {  # what other programs call an option -> the option
    **dict.fromkeys(
        ("model", "model_path", "model_name_or_path", "pretrained", "folder", "dir"), "checkpoint"
    ),
    **dict.fromkeys(("images", "image_file", "image_path", "img", "file"), "image"),
    **dict.fromkeys(("text", "question", "query", "input", "prompts"), "prompt"),
    **dict.fromkeys(
        ("max_tokens", "max_length", "max_new", "new_tokens", "length"), "max-new-tokens"
    ),
    **dict.fromkeys(("temp", "t"), "temperature"),
    **dict.fromkeys(("out", "out_dir", "output_dir", "save_dir"), "output"),
    **dict.fromkeys(("tol", "tolerance", "rtol"), "atol"),
}
EXAMPLES = {  # by verb, for its --help
    "generate": """examples:
  python run.py generate --checkpoint checkpoints/llava-1.5-7b-hf --image a.jpg --prompt "what is this?"
  python run.py generate --checkpoint checkpoints/gpt2 --prompt "Once upon a time" --temperature 0.7 --top-p 0.9
  python run.py generate --workdir runs/mine --image a.png b.png --prompt "is there a circle?" "is it red?"

With --workdir, the folder of a run, instead of --checkpoint, every prompt is asked about every image, and fields of
the experiment such as --eval.max_new_tokens are the other options.""",
    "verify": """example:
  python run.py verify --checkpoint checkpoints/gpt2 --reference gpt2.npz --outputs logits""",
    "export": """examples:
  python run.py export --checkpoint runs/mine --output exported
  python run.py export --checkpoint checkpoints/gpt2 --output copy""",
}


def parsed(verb: str, arguments: list[str], **options: dict) -> argparse.Namespace:
    """The options of a verb; each `name=settings` is `--name` with the settings of `add_argument`.

    Raises:
      ConfigError: an option that does not exist, lacks its value, or has one of a wrong type.
    """
    parser = Parser(
        prog=f"python run.py {verb}",
        epilog=EXAMPLES[verb],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    spelled = {name.replace("_", "-"): name for name in options}
    for option, name in spelled.items():
        parser.add_argument(f"--{option}", dest=name, **options[name])
    arguments = [_hyphenated(argument) for argument in arguments]
    names = [argument[2:].partition("=")[0] for argument in arguments if argument.startswith("--")]
    unknown = [name for name in names if name not in (*spelled, "help")]
    if unknown:
        hint = nearest_field(unknown[0], spelled, SYNONYMS)
        choices = ", ".join(f"--{option}" for option in spelled)
        raise ConfigError(f"{verb} has no option --{unknown[0]}{hint}: choose {choices}.")
    given = parser.parse_args(arguments)
    empty = [
        name
        for name, settings in options.items()
        if settings.get("required") and getattr(given, name) == ""
    ]
    if empty:
        raise ConfigError(f"--{empty[0]} is empty.")
    return given


def _hyphenated(argument: str) -> str:
    """--max_new_tokens=3 -> --max-new-tokens=3; fields of an experiment have either spelling, too."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


TAPS = {
    "choices": ("input", "output"),
    "help": "Llama 3.2 Vision: intermediate features enter or leave their layers",
}


def verify(arguments: list[str]) -> int:
    given = parsed(
        "verify",
        arguments,
        checkpoint={"required": True, "help": "folder of a public checkpoint"},
        reference={
            "required": True,
            "help": ".npz file of <case>/in/<argument> and <case>/out/<output>",
        },
        outputs={"default": "", "help": "what to compare, separated by commas; default: all"},
        atol={
            "type": float,
            "help": "largest absolute difference; default: 1e-4, 3e-4 for Gemma and PaliGemma",
        },
        taps=TAPS,
    )
    from vlm_jax.hub.families.registry import possible_taps
    from vlm_jax.infer import verify

    outputs = [name for name in given.outputs.split(",") if name]
    choices = possible_taps(given.checkpoint, given.taps)
    for taps in choices:  # which of them a reference has, it alone can tell
        results = verify.verify(given.checkpoint, given.reference, outputs, given.atol, taps)
        compared = [result for result in results if not result.reason]
        wrong = [result for result in compared if not result.ok]
        if not wrong:
            break
    print(verify.table(results))
    said = f", with --taps {taps}" if len(choices) > 1 else ""
    print(f"{len(compared) - len(wrong)} of {len(compared)} compared outputs agree{said}")
    return 0 if compared and not wrong else 1


def export(arguments: list[str]) -> int:
    given = parsed(
        "export",
        arguments,
        checkpoint={"required": True, "help": "folder of a public checkpoint, or of a run"},
        output={"required": True, "help": "folder to write"},
        taps=TAPS,
    )
    from vlm_jax.hub import export
    from vlm_jax.hub.families.registry import FAMILIES

    if is_run(given.checkpoint):
        from vlm_jax.infer import demo

        workdir = Workdir(given.checkpoint)
        cfg = workdir.read_config()
        export.refuse_used(given.output)
        params, _ = demo.load_stored(cfg)
        kind = export.export_run(
            cfg, params, workdir.tokenizer, given.output, given.taps, workdir.processor
        )
        if prompts := export.prompt_differences(cfg, FAMILIES[kind]):
            print(
                f"the processor of transformers writes other prompts than {' and '.join(prompts)}"
            )
    else:
        kind = export.export_checkpoint(given.checkpoint, given.output, given.taps)
    print(f"{given.output} holds a {kind} for transformers")
    return 0


def generate(arguments: list[str]) -> int:
    given = parsed(
        "generate",
        arguments,
        checkpoint={"required": True, "help": "folder of a public checkpoint"},
        image={
            "nargs": "+",
            "action": "extend",
            "default": [],
            "help": "image files that the prompt is about",
        },
        prompt={"help": "what to say to the model; one that writes captions needs none"},
        temperature={"type": float, "default": 0.0, "help": "0: the most likely token"},
        top_k={"type": int, "default": 0, "help": "only the k most likely tokens; 0: all"},
        top_p={
            "type": float,
            "default": 1.0,
            "help": "only the most likely tokens that have this probability together",
        },
        max_new_tokens={"type": int, "default": 256, "help": "the longest answer"},
        seed={"type": int, "default": 0, "help": "of the draws"},
        taps=TAPS,
    )
    sampling = {
        name: getattr(given, name)
        for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
    }
    check_sampling(**sampling, named=lambda option: f"--{option.replace('_', '-')}")
    from vlm_jax.infer import ask

    for text in ask.answer(given):
        print(text, end="", flush=True)
    print()
    return 0
