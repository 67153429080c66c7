"""The server and chats with the 39 M model: tokens a second, and the first token of a second turn.

    python experiments/benchmarks/serve.py [--clients 1 8] [--turns 7] [--json FILE]

Float32 and the same weights and prompts (an image of 196 tokens and 16 text tokens), 128 greedy
tokens without end-of-text. vlm_jax answers over HTTP, `clients` requests at once; transformers'
`generate` answers the same prompts one by one. The tokens of both sides must agree. The second turn
follows a history of 1,000 tokens, with the KV cache kept and without it.
"""

import argparse
import base64
import concurrent.futures
import io
import json
import socket
import tempfile
import threading
import time
import urllib.request

import numpy as np
import probe
import report
import turns
from PIL import Image

from vlm_jax.runtime.process import prepare_process

PROMPT_TOKENS, NEW_TOKENS = 16, 128
HISTORY_TOKENS = 1000
# Minimum share of equal tokens: rounding decides between two almost equal logits.
MIN_AGREEMENT = 0.99
MODEL_NAME = "probe"


def prompt_ids(row: int, length: int = PROMPT_TOKENS) -> list[int]:
    return np.random.default_rng(row).integers(2, probe.IMAGE_ID, length).tolist()


def picture(row: int) -> np.ndarray:
    """(height, width, 3) uint8."""
    shape = (probe.IMAGE_SIZE_PX, probe.IMAGE_SIZE_PX, 3)
    return np.random.default_rng(row).integers(0, 256, shape).astype(np.uint8)


def arrays(ids: list[int], images: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Returns transformers' arguments for one prompt behind its images."""
    row = [probe.IMAGE_ID] * (probe.IMAGE_TOKENS * len(images)) + ids
    inputs = {"input_ids": np.array([row]), "attention_mask": np.ones((1, len(row)), np.int64)}
    if images:
        pixels = np.stack(images).astype(np.float32) / 127.5 - 1
        inputs["pixel_values"] = np.moveaxis(pixels, -1, 1)
    return inputs


class IdProcessor:
    """Implements `infer.processor.Processor` for texts that are token ids."""

    eos_ids = ()
    takes_conversations, takes_system_turn = True, False

    def __init__(self, model: probe.Ours):
        self._model = model

    def __call__(self, prompts, images=(), **settings):
        from vlm_jax.hub.inputs import to_batch

        ((prompt,), (row,)) = prompts, images
        text = " ".join(prompt.turns).replace("<image>", "")
        inputs = arrays([int(word) for word in text.split()], [np.asarray(image) for image in row])
        return to_batch(self._model.cfg, inputs, self._model.image_id, generating=True)

    def decode(self, ids) -> str:
        return "".join(f" {i}" for i in ids)

    def decode_stream(self):
        from vlm_jax.hub.text.tokenizer import TextStream

        return TextStream(self.decode)


def load_ours(folder: str):
    from vlm_jax.nn.vlm import VLM

    model = probe.Ours.load(folder)
    return VLM(model.cfg.model), model.params, IdProcessor(model)


def start_server(folder: str) -> str:
    """Serves the model from threads of this process; returns its URL."""
    import uvicorn

    from vlm_jax.infer.answer import AnswerOptions
    from vlm_jax.serve.app import Settings, build_app
    from vlm_jax.serve.engine import Engine
    from vlm_jax.serve.limits import Limits

    engine = Engine(*load_ours(folder), Limits())
    app = build_app(engine, Settings(MODEL_NAME, AnswerOptions(NEW_TOKENS)))
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    threading.Thread(target=server.run, args=([listener],), daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}/v1/chat/completions"


def request_body(row: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(row)).save(file, "png")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    text = " ".join(map(str, prompt_ids(row)))
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    messages = [{"role": "user", "content": parts}]
    return json.dumps({"model": MODEL_NAME, "messages": messages}).encode()


def ours(folder: str, clients: int):
    url = start_server(folder)
    bodies = [request_body(row) for row in range(clients)]
    pool = concurrent.futures.ThreadPoolExecutor(clients)

    def ask(body: bytes) -> list[int]:
        with urllib.request.urlopen(urllib.request.Request(url, body)) as response:
            answer = json.loads(response.read())
        return [int(word) for word in answer["choices"][0]["message"]["content"].split()]

    return lambda: list(pool.map(ask, bodies))


def theirs(folder: str, clients: int):
    import torch
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}

    def ask(row: int) -> list[int]:
        inputs = arrays(prompt_ids(row), [picture(row)])
        batch = {name: torch.tensor(array) for name, array in inputs.items()}
        with torch.inference_mode():
            output = model.generate(**batch, **settings)
        return output[0, batch["input_ids"].shape[1] :].tolist()

    return lambda: [ask(row) for row in range(clients)]


SIDES = {"vlm_jax": ours, "transformers": theirs}


def serve(side: str, folder: str, clients: int) -> None:
    answer = SIDES[side](folder, clients)
    # Whether requests meet in one batch depends on the moment: compile all batches first.
    for _ in range(3):
        first = {"tokens": answer()}
    turns.serve(first, lambda seconds: turns.times(answer, seconds))


def compare(clients: int, options: argparse.Namespace) -> report.Result:
    model = probe.torch_model("llava")
    first, answers = turns.with_one_model(model, options, "--clients", str(clients))
    tokens = [np.array(answer["tokens"]) for answer in first]
    same = np.mean(tokens[0] == tokens[1])
    print(f"{clients} clients: {same:.1%} of the tokens agree")
    if same < MIN_AGREEMENT:
        raise SystemExit("the tokens do not agree")
    for side, side_answers in answers.items():
        per_second = clients * NEW_TOKENS / turns.middle(side_answers, "seconds")
        print(f"{side:<16}{per_second:>8.0f} tokens a second")
    return turns.speed(f"server, {clients} at once", *answers.values())


def second_turn(folder: str, turn_count: int) -> report.Result:
    """Compares the time to the first token of a second turn with and without the kept cache."""
    from vlm_jax.infer.answer import AnswerOptions
    from vlm_jax.infer.session import Session

    model, answer_tokens = load_ours(folder), 8
    question_tokens = HISTORY_TOKENS - probe.IMAGE_TOKENS - answer_tokens
    question = " ".join(map(str, prompt_ids(0, question_tokens)))
    kept = Session(*model, AnswerOptions(answer_tokens))
    answer = "".join(kept.ask(question, [picture(0)]))

    def first_token(session: Session, row: int) -> float:
        start = time.perf_counter()
        pieces = session.ask(" ".join(map(str, prompt_ids(row))))
        next(pieces)
        seconds = time.perf_counter() - start
        pieces.close()
        session.undo()
        return seconds

    kept_times, anew_times = [], []
    # The first turn compiles, and is not counted.
    for row in range(turn_count + 1):
        kept_seconds = first_token(kept, row + 1)
        anew = Session(*model, kept.options, turns=[f"<image>\n{question}", answer])
        anew.images = [picture(0)]
        anew._blocks = kept._blocks
        anew_seconds = first_token(anew, row + 1)
        if row > 0:
            kept_times.append(kept_seconds)
            anew_times.append(anew_seconds)
    fastest_kept, fastest_anew = min(kept_times), min(anew_times)
    print(f"first token {1e3 * fastest_kept:.1f} ms, {1e3 * fastest_anew:.1f} without cache")
    return report.Result.of(
        f"first token of a second turn after {HISTORY_TOKENS} tokens",
        "times the time without a kept cache",
        [a / b for a, b in zip(kept_times, anew_times, strict=True)],
        fastest_kept / fastest_anew,
    )


def main() -> None:
    parser = turns.parser(__doc__, seconds=3.0)
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8])
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.folder, options.clients[0])
        return
    with tempfile.TemporaryDirectory() as folder:
        probe.torch_model("llava").save_pretrained(folder)
        results = [second_turn(folder, options.turns)]
    results += [compare(clients, options) for clients in options.clients]
    report.write(results, options.json)


if __name__ == "__main__":
    prepare_process()
    main()
