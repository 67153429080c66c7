"""The command `chat`: a conversation with a training run or a public checkpoint."""

import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from vlm_jax.cli.model import (
    ANSWER_OPTIONS,
    MODEL_OPTIONS,
    answer_options,
    check_effect,
    open_model,
    parse_model,
)
from vlm_jax.config import ConfigError, NonFiniteError, UserError
from vlm_jax.config.hints import nearest

CHAT = """examples:
  python run.py chat --workdir runs/mine
  python run.py chat --checkpoint checkpoints/llava-1.5-7b-hf --temperature 0.7

Reads questions line by line from the terminal, or from a file or pipe, and prints each answer while
it is generated. A line that begins with / is a command: /help lists them."""
OPTIONS = {
    **MODEL_OPTIONS,
    **ANSWER_OPTIONS,
    "system": {"metavar": "TEXT", "help": "system turn before the conversation"},
}
HISTORY = Path("~/.cache/vlm_jax/chat_history")
PREVIEW_COLUMNS = 40


def chat(arguments: list[str]) -> int:
    """Answers the lines of stdin."""
    args, cfg = parse_model("chat", arguments, OPTIONS, CHAT)
    options = answer_options(args, cfg)
    check_effect(options)
    from vlm_jax.infer.session import Session
    from vlm_jax.nn.models import build_model

    model = open_model(args, cfg)
    processor = model.load_processor()
    session = Session(build_model(model.cfg), model.load_params(), processor, options)
    conversation = Chat(session)
    if args.system:
        conversation.system(args.system)
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        print("/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends the conversation.")
    for line in _terminal_lines() if is_terminal else _piped_lines():
        try:
            print_pieces(conversation.respond(line))
        except (UserError, NonFiniteError, OSError) as error:
            print(f"error: {error}", flush=True)
        except KeyboardInterrupt:
            print("\n(stopped)", flush=True)
    return 0


def print_pieces(pieces: Iterable[str]) -> None:
    """Prints a text as it comes, on lines of its own."""
    last = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        last = piece or last
    if last and not last.endswith("\n"):
        print(flush=True)


class Chat:
    """Lines of a user -> answers of a `Session`, and the commands in between."""

    def __init__(self, session):
        self._session = session
        self._images: list[str] = []  # of the next question

    def respond(self, line: str) -> Iterator[str]:
        """Yields the answer to a question, or the output of a command, in pieces."""
        line = line.strip()
        if line.startswith("/"):
            name, _, argument = line[1:].partition(" ")
            yield self._command(name)(argument.strip())
        elif line:
            images, self._images = self._images, []
            turns = len(self._session.turns)
            try:
                yield from self._session.ask(line, images)
            finally:
                # A question that was refused can be asked again about the same images.
                if len(self._session.turns) == turns:
                    self._images = images

    def _command(self, name: str) -> Callable[[str], str]:
        if name not in COMMANDS:
            choices = ", ".join(f"/{command}" for command in COMMANDS)
            raise ConfigError(f"/{name} is not a command{nearest(name, COMMANDS)}: {choices}.")
        return getattr(self, name)

    def image(self, argument: str) -> str:
        """Adds files to the images of the next question."""
        from vlm_jax.hub.images.steps import read

        if not self._session.model.cfg.fusion.has_images:
            raise ConfigError("the model is a text-only model: it takes no images.")
        try:
            files = shlex.split(argument)
        except ValueError as error:
            raise ConfigError(f"/image {argument}: {error}.") from None
        if not files:
            raise ConfigError("/image needs a FILE.")
        previews = [preview(read(file)) for file in files]
        self._images += [str(Path(os.path.expanduser(file)).absolute()) for file in files]
        return "".join(previews) + f"({len(self._images)} for the next question)"

    def undo(self, argument: str) -> str:
        """Removes the last question and its answer."""
        if self._images:
            self._images = []
            return "(removed the images of the next question)"
        return "(removed)" if self._session.undo() else "(there is no turn)"

    def reset(self, argument: str) -> str:
        """Begins a new conversation; the system turn stays."""
        self._images = []
        self._session.reset()
        return "(new conversation)"

    def system(self, argument: str) -> str:
        """Sets the system turn, or removes it."""
        if argument and not self._session.processor.takes_system_turn:
            raise ConfigError("the prompt form of the model has no system turn.")
        self._session.system = argument or None
        return "(system turn set)" if argument else "(no system turn)"

    def save(self, argument: str) -> str:
        """Writes the conversation as a file that --data.files reads."""
        from vlm_jax.infer.session import save_conversation

        if not argument:
            raise ConfigError("/save needs a FILE.")
        if Path(argument).suffix != ".json":
            raise ConfigError(f"/save {argument}: the name must end in .json.")
        save_conversation(self._session, Path(os.path.expanduser(argument)))
        return f"(saved: train --data.files {argument})"

    def help(self, argument: str) -> str:
        """Lists the commands."""
        lines = []
        for name, parameter in COMMANDS.items():
            description = getattr(self, name).__doc__
            lines.append(f"{f'/{name} {parameter}':<14}  {description}")
        return "\n".join(lines)


COMMANDS = {  # name of the method -> its argument
    "image": "FILE ...",
    "undo": "",
    "reset": "",
    "system": "[TEXT]",
    "save": "FILE.json",
    "help": "",
}


def preview(image) -> str:
    """Returns an image as lines of half blocks, for a terminal with 24-bit colors; "" elsewhere."""
    if not sys.stdout.isatty() or os.environ.get("COLORTERM") not in ("truecolor", "24bit"):
        return ""
    from vlm_jax.data.images import to_rgb

    image = to_rgb(image)
    columns = min(PREVIEW_COLUMNS, image.width)
    rows = max(1, round(columns * image.height / image.width / 2))
    pixels = image.resize((columns, 2 * min(rows, PREVIEW_COLUMNS)))
    lines = []
    for row in range(0, pixels.height, 2):
        cells = []
        for column in range(columns):
            upper, lower = pixels.getpixel((column, row)), pixels.getpixel((column, row + 1))
            foreground, background = ";".join(map(str, upper)), ";".join(map(str, lower))
            cells.append(f"\x1b[38;2;{foreground};48;2;{background}m\u2580")
        lines.append("".join(cells) + "\x1b[0m\n")
    return "".join(lines)


def _piped_lines() -> Iterator[str]:
    """Yields the lines of stdin; bytes that are not UTF-8 become an error of their line."""
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    yield from sys.stdin


def _terminal_lines() -> Iterator[str]:
    """Yields lines that are edited in the terminal, with the history of earlier conversations."""
    import readline

    history = HISTORY.expanduser()
    if history.exists():
        readline.read_history_file(history)
    try:
        while True:
            try:
                yield input("> ")
            except KeyboardInterrupt:
                print()
    except EOFError:
        print()
    finally:
        history.parent.mkdir(parents=True, exist_ok=True)
        readline.set_history_length(1000)
        readline.write_history_file(history)
