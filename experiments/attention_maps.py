"""One figure of the same questions asked of two runs, A beside B: maps of the answers' words.

    python experiments/attention_maps.py --workdir runs/easy_vqa_unified \\
        --against runs/easy_vqa_cross_attention --output attention_maps.png

Takes evenly spaced questions of the first run's `eval.split` that both runs answer rightly, or
any if there is none.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from vlm_jax.runtime.process import prepare_process  # noqa: E402

COLUMNS = 5
CELL_INCHES = (1.7, 1.95)
TRIED = 8  # questions for each one that is drawn


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workdir", required=True, metavar="DIR")
    parser.add_argument("--against", required=True, metavar="DIR")
    parser.add_argument("--questions", type=int, default=20, metavar="N")
    parser.add_argument("--method", default="mean", choices=("mean", "max", "rollout", "gradient"))
    parser.add_argument("--output", default="attention_maps.png", metavar="FILE")
    args = parser.parse_args(arguments)

    import numpy as np

    from vlm_jax.data import questions
    from vlm_jax.runtime.workdir import Workdir

    cfg = Workdir(args.workdir).read_config()
    examples = questions.load(cfg, cfg.eval.read_split)
    count = min(TRIED * args.questions, len(examples))
    tried = [examples[int(i)] for i in np.linspace(0, len(examples) - 1, count)]
    by_model = [read_maps(folder, tried, args.method) for folder in (args.workdir, args.against)]
    drawn = []
    for example, *answers in zip(tried, *by_model):
        if all(answer.answer in example.references for answer in answers):
            drawn.append((example, answers))
    if not drawn:
        print(f"none of {count} questions is answered rightly by both runs: drawing any of them")
        drawn = [(example, answers) for example, *answers in zip(tried, *by_model)]
    shown = np.linspace(0, len(drawn) - 1, min(args.questions, len(drawn)))
    drawn = [drawn[int(i)] for i in shown]
    draw(args.output, drawn, args.method)
    print(f"{len(drawn)} of {count} questions: {args.output}")
    return 0


def read_maps(folder: str, examples: list, method: str) -> list:
    """Returns the maps of a run's answer to each question."""
    from vlm_jax import from_run
    from vlm_jax.infer.answer import AnswerOptions, encode
    from vlm_jax.infer.look import COMPUTED
    from vlm_jax.infer.look.answer import look_at_answer
    from vlm_jax.infer.look.pictures import image_layouts

    model, params, processor = from_run(folder)
    options = AnswerOptions(max_new_tokens=processor.cfg.eval.max_new_tokens)
    name = Path(folder).name
    methods = [computed for computed in COMPUTED if computed == method]
    answers = []
    for example in examples:
        images = example.images()
        request = encode(model, processor, [example.question], [images], options)
        layouts = image_layouts(processor.cfg.vision, images, processor)
        answers.append(look_at_answer(request, params, name, layouts, methods))
    return answers


def draw(path: str, drawn: list, method: str) -> None:
    """Draws each question's image, then the map of the first word of each model's answer."""
    from vlm_jax.infer.samples import pyplot, save_figure, wrap

    models = len(drawn[0][1])
    rows = -(-len(drawn) // COLUMNS)
    size_inches = (COLUMNS * CELL_INCHES[0], (1 + models) * rows * CELL_INCHES[1])
    figure, cells = pyplot.subplots(
        (1 + models) * rows, COLUMNS, figsize=size_inches, squeeze=False, layout="constrained"
    )
    for cell in cells.flat:
        cell.axis("off")
    for i, (example, answers) in enumerate(drawn):
        row, column = (1 + models) * (i // COLUMNS), i % COLUMNS
        column_cells = cells[row : row + 1 + models, column]
        pictures = [answers[0].pictures[0].pixels]
        titles = [wrap(example.question)]
        for answer in answers:
            pictures.append(answer.pictures[0].shade(answer.combine(method)[0][0]))
            titles.append(wrap(f"{answer.model}: {answer.answer}"))
        for cell, pixels, title in zip(column_cells, pictures, titles):
            cell.imshow(pixels, interpolation="nearest")
            cell.set_title(title, fontsize=7, parse_math=False)
    save_figure(figure, Path(path))


if __name__ == "__main__":
    prepare_process()
    raise SystemExit(main())
