"""Greedy generation of the 39 M model, ours against transformers' `generate`: ms a token.

    python experiments/benchmarks/decode.py [--rows 1 8 32] [--turns 7]

Float32, the same weights and prompts (an image of 196 tokens and 16 text tokens a row), 128 new
tokens without end-of-text. Times are of the whole call, prefill included. The tokens of both sides
must agree.
"""

import argparse

import numpy as np
import probe
import report
import turns

from vlm_jax.runtime.process import prepare_process

PROMPT_TOKENS, NEW_TOKENS = 16, 128
# Minimum share of equal tokens: rounding decides between two almost equal logits.
MIN_AGREEMENT = 0.99


def ours(folder: str, rows: int):
    import jax

    from vlm_jax.infer.generate import SamplingParams, generate

    model = probe.Ours.load(folder)
    batch = model.batch(probe.inputs("llava", rows, PROMPT_TOKENS)).replace(
        targets=None, loss_weights=None
    )
    batch, sampling = jax.device_put(batch), SamplingParams()
    return lambda: np.asarray(generate(model.cfg.model, model.params, batch, NEW_TOKENS, sampling))


def theirs(folder: str, rows: int):
    import torch
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    batch = {
        name: torch.tensor(array)
        for name, array in probe.inputs("llava", rows, PROMPT_TOKENS).items()
    }
    length = batch["input_ids"].shape[1]

    def generate():
        with torch.inference_mode():
            output = model.generate(
                **batch, do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS
            )
        return output[:, length:].numpy()

    return generate


SIDES = {"vlm_jax": ours, "transformers": theirs}


def serve(side: str, folder: str, rows: int) -> None:
    generate = SIDES[side](folder, rows)
    first = {"tokens": generate().tolist()}
    turns.serve(first, lambda seconds: turns.times(generate, seconds))


def compare(rows: int, options: argparse.Namespace) -> report.Result:
    first, answers = turns.with_one_model(probe.torch_model("llava"), options, "--rows", str(rows))
    tokens = [np.array(answer["tokens"]) for answer in first]
    same = np.mean(tokens[0] == tokens[1])
    print(f"batch {rows}: {same:.1%} of the tokens agree")
    if same < MIN_AGREEMENT:
        raise SystemExit("the tokens do not agree")
    for side, side_answers in answers.items():
        median_ms = 1e3 * turns.middle(side_answers, "seconds") / NEW_TOKENS
        best_ms = 1e3 * turns.best(side_answers) / NEW_TOKENS
        print(f"{side:<16}{median_ms:>8.2f} ms a token, fastest {best_ms:.2f}")
    return turns.speed(f"generation, batch {rows}", *answers.values())


def main() -> None:
    parser = turns.parser(__doc__, seconds=3.0)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32])
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.folder, options.rows[0])
        return
    report.write([compare(rows, options) for rows in options.rows], options.json)


if __name__ == "__main__":
    prepare_process()
    main()
