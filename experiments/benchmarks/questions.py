"""Training questions per second on easy-VQA: ours packed by image, transformers one a row.

    python experiments/benchmarks/questions.py [--turns 7]

Both sides have one LLaVA-like model (a CLIP of 4 layers and a Llama of 3, width 128, 64 tokens an
image) with the same initial weights, AdamW with clipping and the same rates, 64 rows a batch, and
real batches made during the step. Rows of one question are cut to the longest question with its
answer, the best case without packing. The losses on the first such batch must agree.
"""

import math
from dataclasses import replace

import numpy as np
import probe
import report
import turns

from vlm_jax.runtime.process import prepare_process

CONFIG, IMAGE_ID = "configs/easy_vqa/unified.py", 1
SMALL = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4}


def torch_model():
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    ids = {"vocab_size": 512, "bos_token_id": 0, "eos_token_id": 3, "pad_token_id": 0}
    vision = {"num_hidden_layers": 4, "image_size": 64, "patch_size": 8}
    config = LlavaConfig(
        text_config={
            "model_type": "llama",
            "num_hidden_layers": 3,
            "max_position_embeddings": 256,
            **SMALL,
            **ids,
        },
        vision_config={"model_type": "clip_vision_model", **vision, **SMALL},
        vision_feature_layer=-1,
        image_token_index=IMAGE_ID,
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(config)


def experiment(folder: str):
    """Loads the folder's model, with data and optimizer of easy-VQA's main job."""
    from vlm_jax.config import files

    main = files.load(CONFIG)
    sections = {"data": main.data, "train": main.train, "optim": replace(main.optim, kind="adamw")}
    return probe.Ours.load(folder, **sections)


def single(cfg):
    """Returns the experiment with rows of one question, its tokenizer, and its batches."""
    from packing import batch_views

    from vlm_jax.data import pipeline

    tokenizer = pipeline.train_tokenizer(cfg)
    cfg = batch_views(cfg, tokenizer)
    return cfg, tokenizer, pipeline.training_iterator(cfg, tokenizer)


def ours(folder: str):
    """Returns the loss of the first batch, and a function that takes a step.

    A step returns its number of questions.
    """
    import jax
    from flax import traverse_util
    from packing import Side

    from vlm_jax.nn.vlm import VLM
    from vlm_jax.train.loss import cross_entropy

    model = experiment(folder)
    cfg, tokenizer, data = single(model.cfg)
    batch = next(data)
    total, count = cross_entropy(
        VLM(cfg.model).apply({"params": model.params}, batch).logits, batch
    )
    side = Side(model.cfg, tokenizer, traverse_util.flatten_dict(model.params, sep="/"))

    def step() -> int:
        with jax.set_mesh(side.mesh):
            return side.take_step()

    return float(total / count), step


def theirs(folder: str):
    import torch
    from transformers import LlavaForConditionalGeneration

    from vlm_jax.train.optim import schedule

    cfg, _, data = single(experiment(folder).cfg)
    model = LlavaForConditionalGeneration.from_pretrained(
        folder, attn_implementation="sdpa"
    ).train()
    optim, rate = cfg.optim, schedule(cfg.optim, cfg.train.steps)
    matrices, others = (
        [p for p in model.parameters() if (p.ndim > 1) == is_matrix] for is_matrix in (True, False)
    )
    groups = [
        {"params": matrices, "weight_decay": optim.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, 1.0, (optim.beta1, optim.beta2), fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(rate(step)))

    def loss_of(batch):
        scored = np.pad(batch.loss_weights[:, :-1] > 0, ((0, 0), (1, 0)))
        return model(
            input_ids=torch.tensor(batch.tokens, dtype=torch.long),
            attention_mask=torch.tensor(batch.segment_ids, dtype=torch.long),
            pixel_values=torch.tensor(batch.images[:, 0].transpose(0, 3, 1, 2)),
            labels=torch.tensor(np.where(scored, batch.tokens, -100), dtype=torch.long),
            use_cache=False,
        ).loss

    def step() -> int:
        batch = next(data)
        loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        loss.item()
        return len(batch.tokens)

    with torch.no_grad():
        return loss_of(next(data)).item(), step


SIDES = {"vlm_jax": ours, "transformers": theirs}


def serve(side: str, folder: str) -> None:
    loss, step = SIDES[side](folder)
    step()

    def answer(seconds: float) -> dict[str, float]:
        asked = []
        found = turns.times(lambda: asked.append(step()), seconds)
        questions = sum(asked) / len(asked)
        return {name: value / questions for name, value in found.items()}  # seconds a question

    turns.serve({"loss": loss}, answer)


def main() -> None:
    options = turns.parser(__doc__, seconds=3.0).parse_args()
    if options.serve:
        serve(options.serve, options.folder)
        return
    first, answers = turns.with_one_model(torch_model(), options)
    losses = [answer["loss"] for answer in first]
    print("losses of the first batch: ours {:.5f}, theirs {:.5f}".format(*losses))
    if not math.isclose(*losses, rel_tol=1e-4):
        raise SystemExit("the losses do not agree")
    for side, side_answers in answers.items():
        speed = 1 / turns.middle(side_answers, "seconds")
        print(f"{side:<16}{speed:>8.0f} questions a second")
    report.write([turns.speed("questions of easy-VQA", *answers.values())], options.json)


if __name__ == "__main__":
    prepare_process()
    main()
