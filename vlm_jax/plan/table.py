"""Formats a plan as aligned tables."""

from collections import Counter

from vlm_jax.config import Experiment
from vlm_jax.cost.chips import GIB

UNITS = (
    (1e18, "E"),
    (1e15, "P"),
    (1e12, "T"),
    (1e9, "G"),
    (1e6, "M"),
    (1e3, "k"),
    (1, ""),
    (1e-3, "m"),
    (1e-6, "u"),
)
REMEDIES = {
    "activations": "decoder.remat and vision.remat full, train.compute_dtype bfloat16, "
    "more train.microbatches",
    "gradients": "a larger mesh.fsdp, or fewer trained parts (optim.lr_mult.PART 0)",
    "optimizer": "a larger mesh.fsdp, or fewer trained parts (optim.lr_mult.PART 0)",
    "parameters": "a larger mesh.fsdp or mesh.tensor, train.frozen_dtype int8 or nf4 for "
    "frozen parts",
}
# Steps of an operation's path that are not modules.
NOT_MODULES = ("jit(", "while", "body", "closed_call")


def format_plan(cfg: Experiment, plan: dict) -> str:
    """Returns the output of `python run.py plan`."""
    sections = [_parts(cfg, plan), _tokens(cfg, plan["tokens"]), _memory(plan)]
    if "topology" in plan:
        sections.append(_topology(plan))
    sections.append(f"export: {plan['export']}")
    return "\n\n".join(sections)


def short(value: float, unit: str = "") -> str:
    """Formats a number with three digits and a unit prefix: 12.3 G."""
    for size, letter in UNITS:
        if float(f"{value:.3g}") >= size:
            return f"{value / size:.3g} {letter}{unit}".rstrip()
    return f"{value:.3g} {unit}".rstrip()


def gib(value: float) -> str:
    return f"{value / GIB:.2f} GiB"


def align(rows: list[list[str]]) -> str:
    """Pads cells to the width of their column: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def _parts(cfg: Experiment, plan: dict) -> str:
    rows = [["part", "parameters", "", "forward", "backward"]]
    total = Counter()
    for name, part in plan["parts"].items():
        total.update({key: part[key] for key in ("parameters", "forward_flops", "backward_flops")})
        rows.append(_part_row(name, part, _training_state(cfg, part)))
    rows.append(_part_row("total", total, ""))
    tokens = f"all {cfg.data.text_length} text tokens per row"
    return f"One step of {plan['rows']} rows, if {tokens} are scored\n{align(rows)}"


def _training_state(cfg: Experiment, part: dict) -> str:
    count, trained = part["parameters"], part["trained_parameters"]
    state = "frozen"
    if trained:
        state = "trained" if trained == count else f"{trained / count:.1%} trained"
    quantized = part["quantized_parameters"]
    return f"{state}, {quantized / count:.1%} {cfg.train.frozen_dtype}" if quantized else state


def _part_row(name: str, part: dict, state: str) -> list[str]:
    forward, backward = part["forward_flops"], part["backward_flops"]
    return [
        name,
        f"{part['parameters']:,}",
        state,
        short(forward, "FLOP"),
        short(backward, "FLOP"),
    ]


def _tokens(cfg: Experiment, tokens: dict) -> str:
    if not tokens["images"]:
        return f"Tokens\ntext -> {_decoder_tokens(cfg, tokens)}"
    vision, side = cfg.vision, cfg.vision.image_size_px
    images = f"{tokens['images']} image(s) per row"
    patches = f"{tokens['patches']} patches of {vision.patch_size_px} px"
    if tokens["tiles"] > 1:
        images += f" in {vision.tiles} tiles"
        patches += " each"
        if vision.views > vision.cut_tiles:
            images += " and a thumbnail"
    size = f"of {side} x {side} px"
    if vision.is_native:
        size, patches = "of any shape", f"at most {patches} each"
    steps = [
        f"{images} {size}",
        patches,
        f"encoder: {tokens['encoder']} tokens" if vision.has_encoder else "no encoder",
        f"projector: {tokens['features']} -> {tokens['projected']} tokens",
        _decoder_tokens(cfg, tokens),
    ]
    return "Tokens\n" + " -> ".join(steps)


def _decoder_tokens(cfg: Experiment, tokens: dict) -> str:
    text = f"decoder: {tokens['sequence']} tokens per row"
    if cfg.fusion.image_in_sequence:
        text += ", image tokens included"
    if tokens["memory"]:
        text += f", which attend to {tokens['memory']} image tokens"
    return text


def _memory(plan: dict) -> str:
    mesh = " x ".join(f"{name} {size}" for name, size in plan["mesh"].items())
    rows = [[name, gib(value)] for name, value in plan["bytes_per_device"].items()]
    cache = f"KV cache of one row: {gib(plan['cache_bytes_per_row'])}"
    return f"Predicted memory per device, mesh {mesh}\n{align(rows)}\n{cache}"


def _topology(plan: dict) -> str:
    topology = plan["topology"]
    is_compiled = "compiled_bytes" in topology
    if is_compiled:
        used = topology["compiled_bytes"]
        head = f"Compiled for {topology['name']} in {topology['compile_seconds']:.0f} s"
    else:
        used = plan["bytes_per_device"]["total"]
        head = f"{topology['name']}, predicted without compiling"
    verdict = "fits" if topology["fits"] else "does not fit"
    head += f"\n{verdict}: {gib(used)} of {gib(topology['hbm_bytes'])} per chip"
    if not topology["fits"]:
        return f"{head}\n{_advice(plan)}"
    return f"{head}\n\n{_costs(plan, topology)}" if is_compiled else head


def _costs(plan: dict, topology: dict) -> str:
    """Costs of a compiled step."""
    seconds = topology["roofline_seconds"]
    flops = topology["xla_flops"] / topology["devices"]
    sent = sum(x["sent_bytes"] * x["times"] for x in topology["collectives"])
    ratio = topology["xla_flops"] / plan["train_flops"]
    resources = [
        ["one step", "per chip", "at peak rate"],
        ["FLOPs of XLA's program", short(flops, "FLOP"), short(seconds["compute"], "s")],
        ["HBM reads and writes", short(topology["moved_bytes"], "B"), short(seconds["hbm"], "s")],
        ["sent between chips", short(sent, "B"), short(seconds["interconnect"], "s")],
    ]
    speeds = [
        ["collectives", "step time", "MFU", "tokens/s", "images/s"],
        ["overlapped", *_speed(topology["overlapped"])],
        ["serial", *_speed(topology["serial"])],
    ]
    return "\n".join(
        [
            align(resources),
            f"XLA's program has {ratio:.3f} times the FLOPs of the model",
            "",
            align(speeds),
            "",
            _collectives(topology["collectives"]),
        ]
    )


def _speed(speed: dict) -> list[str]:
    return [
        short(speed["step_seconds"], "s"),
        f"{speed['mfu']:.2f}",
        f"{speed['tokens_per_second']:,.0f}",
        f"{speed['images_per_second']:,.0f}",
    ]


def _collectives(collectives: list[dict]) -> str:
    """One row for all collectives of the same kind, size and module."""
    times, sent = Counter(), Counter()
    for x in collectives:
        key = (x["kind"], short(x["bytes"], "B"), str(x["chips"]), _module_path(x["source"]))
        times[key] += x["times"]
        sent[key] += x["times"] * x["sent_bytes"]
    rows = [["collective", "bytes", "chips", "per step", "sent per step", "module"]]
    for key, total in sent.most_common():
        kind, size, chips, module = key
        rows.append([kind, size, chips, str(times[key]), short(total, "B"), module])
    # The last column is text, so it is aligned to the left.
    width = max(len(row[-1]) for row in rows)
    return align([[*row[:-1], row[-1].ljust(width)] for row in rows])


def _module_path(name: str) -> str:
    """The last four modules and operations of an operation's path."""
    name = name.replace("\\'", "'").replace("['", "/").replace("']", "")
    steps = [step for step in name.split("/") if step and not step.startswith(NOT_MODULES)]
    return "/".join(steps[-4:])


def _advice(plan: dict) -> str:
    """Config fields to change, for the largest consumer first."""
    sizes = plan["bytes_per_device"]
    names = sorted(REMEDIES, key=lambda name: -sizes[name])
    width = max(map(len, REMEDIES.values()))
    rows = [[name, gib(sizes[name]), REMEDIES[name].ljust(width)] for name in names]
    return "to reduce memory, change (or use a larger slice):\n" + align(rows)
