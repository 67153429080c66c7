"""Greedy generation with the 39 M model, ours against transformers' `generate`: milliseconds a token.

    python experiments/benchmarks/decode.py [--rows 1 8] [--turns 7]

Float32, the same weights and prompts (an image of 196 tokens and 16 text tokens a row), 128 new tokens, no token ends a
text. The time is that of the whole call, prefill included. The tokens of both sides have to agree.
"""

import argparse

import numpy as np
import probe
import turns

from vlm_jax.runtime.process import prepare_process

PROMPT_TOKENS, NEW_TOKENS = 16, 128
SAME = (
    0.99  # of the tokens, at the least: what two are all but equal for may be told apart otherwise
)


def ours(folder: str, rows: int):
    import jax

    from vlm_jax.infer.generate import SamplingParams, generate

    model = probe.Ours.load(folder)
    batch = model.batch(probe.inputs("llava", rows, PROMPT_TOKENS)).replace(
        targets=None, loss_weights=None
    )
    batch, how = jax.device_put(batch), SamplingParams()
    return lambda: np.asarray(generate(model.cfg.model, model.params, batch, NEW_TOKENS, how))


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
            made = model.generate(
                **batch, do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS
            )
        return made[:, length:].numpy()

    return generate


SIDES = {"vlm_jax": ours, "transformers": theirs}


def serve(side: str, folder: str, rows: int) -> None:
    generate = SIDES[side](folder, rows)
    first = {"tokens": generate().tolist()}
    turns.serve(first, lambda seconds: turns.times(generate, seconds))


def compare(rows: int, given: argparse.Namespace) -> None:
    first, answers = turns.with_one_model(probe.torch_model("llava"), given, "--rows", str(rows))
    tokens = [np.array(said["tokens"]) for said in first]
    same = np.mean(tokens[0] == tokens[1])
    print(f"batch {rows}: {same:.1%} of the tokens are the same")
    if same < SAME:
        raise SystemExit("the tokens do not agree")
    for side, found in answers.items():
        middle, best = (
            1e3 * x / NEW_TOKENS for x in (turns.middle(found, "seconds"), turns.best(found))
        )
        print(f"{side:<16}{middle:>8.2f} ms a token, fastest {best:.2f}")
    print(f"{'speed, ours over theirs':<28}{turns.speed(*answers.values())}", flush=True)


def main() -> None:
    parser = turns.parser(__doc__, seconds=3.0)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8])
    given = parser.parse_args()
    if given.serve:
        serve(given.serve, given.folder, given.rows[0])
        return
    for rows in given.rows:
        compare(rows, given)


if __name__ == "__main__":
    prepare_process()
    main()
