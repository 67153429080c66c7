"""The verbs about public checkpoints: `verify`, `export`, and `generate --checkpoint`."""

import argparse

from vlm_jax.config import ConfigError
from vlm_jax.limits import check_sampling
from vlm_jax.workdir import Workdir, is_run


class Parser(argparse.ArgumentParser):
    """A mistake is a ConfigError; what it does not know can be left to others."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str):
        raise ConfigError(f"{message}.")


def parsed(verb: str, arguments: list[str], **options: dict) -> argparse.Namespace:
    """The options of a verb; each `name=settings` is `--name` with the settings of `add_argument`.

    Raises:
      ConfigError: an option that does not exist, lacks its value, or has one of a wrong type.
    """
    parser = Parser(prog=f"python run.py {verb}")
    for name, settings in options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, **settings)
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise ConfigError(f"{verb} has no option {unknown[0]}: choose {', '.join('--' + name for name in options)}.")
    empty = [name for name, settings in options.items() if settings.get("required") and getattr(given, name) == ""]
    if empty:
        raise ConfigError(f"--{empty[0]} is empty.")
    return given


TAPS = {"choices": ("input", "output"), "help": "Llama 3.2 Vision: intermediate features enter or leave their layers"}


def verify(arguments: list[str]) -> int:
    given = parsed(
        "verify",
        arguments,
        checkpoint={"required": True, "help": "folder of a public checkpoint"},
        reference={"required": True, "help": ".npz file of <case>/in/<argument> and <case>/out/<output>"},
        outputs={"default": "", "help": "what to compare, separated by commas; default: all"},
        atol={"type": float, "help": "largest absolute difference; default: 1e-4, 3e-4 for Gemma and PaliGemma"},
        taps=TAPS,
    )
    from vlm_jax.hub.families import possible_taps
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

    if is_run(given.checkpoint):
        from vlm_jax.infer import demo

        workdir = Workdir(given.checkpoint)
        cfg = workdir.read_config()
        export.refuse_used(given.output)
        params, _ = demo.load_stored(cfg)
        kind = export.export_run(cfg, params, workdir.tokenizer, given.output, given.taps, workdir.processor)
        print(export.exportable(cfg))
    else:
        kind = export.export_checkpoint(given.checkpoint, given.output, given.taps)
    print(f"{given.output} holds a {kind} for transformers")
    return 0


def generate(arguments: list[str]) -> int:
    given = parsed(
        "generate",
        arguments,
        checkpoint={"required": True, "help": "folder of a public checkpoint"},
        image={"nargs": "+", "action": "extend", "default": [], "help": "image files that the prompt is about"},
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
    sampling = {name: getattr(given, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")}
    check_sampling(**sampling, named=lambda option: f"--{option.replace('_', '-')}")
    from vlm_jax.infer import ask

    for text in ask.answer(given):
        print(text, end="", flush=True)
    print()
    return 0
