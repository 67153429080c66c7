"""A plan as aligned tables for people."""

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


def text(cfg: Experiment, plan: dict) -> str:
    """What `python run.py plan` prints."""
    sections = [_parts(cfg, plan), _flow(cfg, plan["tokens"]), _memory(plan)]
    if "topology" in plan:
        sections.append(_topology(plan))
    sections.append(f"export: {plan['export']}")
    return "\n\n".join(sections)


def short(value: float, unit: str = "") -> str:
    """12.3 G: three digits and a power of ten."""
    for size, letter in UNITS:
        if float(f"{value:.3g}") >= size:
            return f"{value / size:.3g} {letter}{unit}".rstrip()
    return f"{value:.3g} {unit}".rstrip()


def gib(value: float) -> str:
    return f"{value / GIB:.2f} GiB"


def _rows(lines: list[list[str]]) -> str:
    """Columns as wide as they need to be, the first to the left and the others to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]

    def padded(line):
        first, *others = (
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths))
        )
        return "  ".join([first, *others]).rstrip()

    return "\n".join(map(padded, lines))


def _parts(cfg: Experiment, plan: dict) -> str:
    lines = [["part", "parameters", "", "forward", "backward"]]
    for name, part in plan["parts"].items():
        state = "trained" if part["trained"] else "frozen"
        work = (short(part[f"{way}_flops"], "FLOP") for way in ("forward", "backward"))
        lines.append([name, f"{part['parameters']:,}", state, *work])
    parts = plan["parts"].values()
    forward, backward = (
        sum(part[f"{way}_flops"] for part in parts) for way in ("forward", "backward")
    )
    total = f"{sum(part['parameters'] for part in parts):,}"
    lines.append(["all", total, "", short(forward, "FLOP"), short(backward, "FLOP")])
    head = f"A step of {plan['rows']} rows, if all {cfg.data.text_length} text tokens of each are scored"
    return f"{head}\n{_rows(lines)}"


def _flow(cfg: Experiment, tokens: dict) -> str:
    if not tokens["images"]:
        return f"Tokens\ntext -> {_decoder(cfg, tokens)}"
    vision, side = cfg.vision, cfg.vision.image_size_px
    whole = " and a thumbnail" if vision.views > vision.cut_tiles else ""
    tiles = f" in {vision.tiles} tiles{whole}" if tokens["tiles"] > 1 else ""
    encoder = f"encoder: {tokens['encoder']} tokens" if vision.kind == "vit" else "no encoder"
    steps = [
        f"{tokens['images']} image(s) a row{tiles} of {side} x {side} px",
        f"{tokens['patches']} patches of {vision.patch_size_px} px" + (" each" if tiles else ""),
        encoder,
        f"projector: {tokens['features']} -> {tokens['projected']} tokens",
        _decoder(cfg, tokens),
    ]
    return "Tokens\n" + " -> ".join(steps)


def _decoder(cfg: Experiment, tokens: dict) -> str:
    said = f"decoder: {tokens['sequence']} tokens a row"
    if cfg.fusion.image_in_sequence:
        said += ", image tokens among them" + ("," if tokens["memory"] else "")
    return said + (f" that read {tokens['memory']} image tokens" if tokens["memory"] else "")


def _memory(plan: dict) -> str:
    mesh = " x ".join(f"{name} {size}" for name, size in plan["mesh"].items())
    lines = [[name, gib(value)] for name, value in plan["bytes_per_device"].items()]
    cache = f"cache of one row while decoding: {gib(plan['cache_bytes_per_row'])}"
    return f"Memory on each device of {mesh}, predicted\n{_rows(lines)}\n{cache}"


def _topology(plan: dict) -> str:
    found = plan["topology"]
    is_compiled = "compiled_bytes" in found
    used = gib(found["compiled_bytes"] if is_compiled else plan["bytes_per_device"]["total"])
    head = f"{found['name']}, predicted and not compiled"
    if is_compiled:
        head = f"Compiled for {found['name']} in {found['compile_seconds']:.0f} s"
    head += f"\n{'fits' if found['fits'] else 'does not fit'}: {used} of {gib(found['hbm_bytes'])} a chip\n"
    if not found["fits"]:
        return head + _advice(plan)
    return head + _costs(plan, found) if is_compiled else head.rstrip()


def _costs(plan: dict, found: dict) -> str:
    """What a compiled step costs."""
    work = [
        ["", "time of a step", "MFU", "tokens/s", "images/s"],
        *(
            [name, *_speed(found[key])]
            for name, key in (("collectives hidden", "overlapped"), ("not hidden", "serial"))
        ),
    ]
    roof = found["roofline_seconds"]
    ratio = found["xla_flops"] / plan["train_flops"]
    return "\n".join(
        [
            "",
            _rows(
                [
                    ["a step", "", "at peak"],
                    [
                        "products, by XLA's program",
                        short(found["xla_flops"] / found["devices"], "FLOP a chip"),
                        short(roof["compute"], "s"),
                    ],
                    [
                        "read and written in HBM",
                        short(found["moved_bytes"], "B a chip"),
                        short(roof["hbm"], "s"),
                    ],
                    [
                        "sent between chips",
                        short(_sent(found), "B a chip"),
                        short(roof["interconnect"], "s"),
                    ],
                ]
            ),
            f"XLA's FLOPs are {ratio:.3f} of the model's\n",
            _rows(work) + "\n",
            _collectives(found["collectives"]),
        ]
    )


def _speed(at: dict) -> list[str]:
    return [
        short(at["step_seconds"], "s"),
        f"{at['mfu']:.2f}",
        f"{at['tokens_per_second']:,.0f}",
        f"{at['images_per_second']:,.0f}",
    ]


def _sent(found: dict) -> float:
    return sum(
        collective["sent_bytes"] * collective["times"] for collective in found["collectives"]
    )


def _collectives(collectives: list[dict]) -> str:
    """Those of one kind and size for one module in one line."""
    times, sent = Counter(), Counter()
    for c in collectives:
        line = (c["kind"], short(c["bytes"], "B"), str(c["chips"]), _source(c["source"]))
        times[line] += c["times"]
        sent[line] += c["times"] * c["sent_bytes"]
    lines = [["collective", "bytes", "chips", "times a step", "sent a step", "for"]]
    for line, total in sent.most_common():
        kind, size, chips, source = line
        lines.append([kind, size, chips, str(times[line]), short(total, "B"), source])
    last = max(len(line[-1]) for line in lines)
    return _rows([[*line[:-1], line[-1].ljust(last)] for line in lines])


def _source(name: str) -> str:
    """The end of an operation's path, where modules are named."""
    name = name.replace("\\'", "'").replace("['", "/").replace("']", "")
    steps = [
        step
        for step in name.split("/")
        if step and not step.startswith(("jit(", "while", "body", "closed_call"))
    ]
    return "/".join(steps[-4:])


def _advice(plan: dict) -> str:
    """What to change, in terms of fields, the largest consumer first."""
    sizes = plan["bytes_per_device"]
    ways = {
        "activations": "decoder.remat and vision.remat full, train.compute_dtype bfloat16, more train.microbatches",
        "gradients": "a larger mesh.fsdp, or fewer trained parts (optim.lr_mult.PART 0)",
        "optimizer": "a larger mesh.fsdp, or fewer trained parts (optim.lr_mult.PART 0)",
        "parameters": "a larger mesh.fsdp or mesh.tensor",
    }
    order = sorted(ways, key=lambda name: -sizes[name])
    lines = [
        [name, gib(sizes[name]), ways[name].ljust(max(map(len, ways.values())))] for name in order
    ]
    return "what would make room, or a larger slice would:\n" + _rows(lines)
