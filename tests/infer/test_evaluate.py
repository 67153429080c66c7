"""Scores are correct shares; every question is answered with its own and with another image."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from PIL import Image

from vlm_jax.config import ConfigError, Data, Eval, UserError
from vlm_jax.data import questions
from vlm_jax.data.questions import Question
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.infer import evaluate, samples
from vlm_jax.infer.answer_loss import answer_losses
from vlm_jax.infer.metrics.loss import AnswerLoss
from vlm_jax.infer.metrics.predictions import read_predictions, score_predictions
from vlm_jax.infer.metrics.scores import parse_score
from vlm_jax.infer.metrics.table import METRICS, Metric
from vlm_jax.nn.vlm import VLM
from vlm_jax.runtime.workdir import Workdir
from vlm_jax.testing import random_params, tiny

QUESTIONS = [  # image, question, answer, type
    (0, "is it red ?", "yes", "yes_no"),
    (0, "what shape ?", "circle", "shape"),
    (1, "is it red ?", "no", "yes_no"),
    (1, "what shape ?", "triangle", "shape"),
    (1, "is it blue ?", "yes", "yes_no"),
]


def picture(number):
    return np.full((16, 16, 3), number / 8, np.float32)


@pytest.fixture
def asked():
    readers = [
        lambda number=number: [np.full((16, 16, 3), number, np.uint8)] for number in range(2)
    ]
    return [Question(*parts, images=readers[parts[0]]) for parts in QUESTIONS]


@pytest.fixture
def cfg(tmp_path):
    return tiny(workdir=str(tmp_path), eval=Eval(split="test", batch_size=2, max_new_tokens=4))


@pytest.fixture
def scores(cfg, asked, tokenizer, monkeypatch):
    """Scores of fixed answers: 3 of 5 right with the images, 2 of 5 with shuffled images."""
    answers = [["yes", "circle", "yes", "triangle", ""], ["no"] * 4 + ["yes"]]
    monkeypatch.setattr(evaluate.questions, "to_evaluate", lambda cfg: asked)
    monkeypatch.setattr(evaluate, "answer", lambda cfg, params, tok, asked, shown: answers)
    return evaluate.evaluate(cfg, None, tokenizer, step=7)


def test_the_scores_are_shares_of_equal_answers(scores, cfg):
    rules = scores.pop("metrics")
    assert rules["exact_match"].keys() == {"variant", "source"}
    low, high = scores.pop("exact_match_interval")
    assert 0.2 < low < 3 / 5 < high < 0.9
    assert scores.pop("by_type_intervals").keys() == {"shape", "yes_no"}
    assert scores == {
        "split": "test",
        "files": [],
        "examples": 5,
        "step": 7,
        "max_new_tokens": 4,
        "exact_match": 3 / 5,
        "by_type": {"shape": 2 / 2, "yes_no": 1 / 3},
        "image_shuffled_exact_match": 2 / 5,
    }
    assert scores.items() <= json.loads(Workdir(cfg.workdir).eval.read_text()).items()


def test_a_metric_is_a_function_and_a_row(cfg, asked, tokenizer, monkeypatch):
    """It is in eval.json, in predictions.jsonl, in what is printed, and a study can name it."""

    def closeness(prediction, references):
        return max(1 / (1 + abs(len(prediction) - len(text))) for text in references)

    row = Metric(closeness, variant="nearness of lengths", source="this test")
    monkeypatch.setitem(METRICS, "closeness", row)
    cfg = replace(cfg, eval=replace(cfg.eval, metrics=("exact_match", "closeness")))
    predictions = [["yes", "circle", "yes", "triangle", ""], ["no"] * 4 + ["yes"]]
    monkeypatch.setattr(evaluate.questions, "to_evaluate", lambda cfg: asked)
    monkeypatch.setattr(evaluate, "answer", lambda *args: predictions)
    scores = evaluate.evaluate(cfg, None, tokenizer)
    assert scores == json.loads(Workdir(cfg.workdir).eval.read_text())
    assert scores["closeness"] == pytest.approx((1 + 1 + 1 / 2 + 1 + 1 / 4) / 5)
    assert scores["closeness_by_type"] == pytest.approx(
        {"shape": 1, "yes_no": (1 + 1 / 2 + 1 / 4) / 3}
    )
    assert scores["image_shuffled_closeness"] < scores["closeness"]
    assert (scores["exact_match"], scores["by_type"]["shape"]) == (3 / 5, 1)
    lines = [json.loads(line) for line in Workdir(cfg.workdir).predictions.read_text().splitlines()]
    assert [line["closeness"] for line in lines] == [1, 1, 1 / 2, 1, 1 / 4]
    assert scores["metrics"]["closeness"] == {
        "variant": "nearness of lengths",
        "source": "this test",
    }
    first, second = evaluate.describe_scores(scores, "test")
    assert first == (
        "exact match 0.6000 (95 % interval 0.2307 to 0.8824) on 5 questions of test, 0.4000 with "
        "shuffled images"
    )
    assert second.startswith("closeness 0.7500 (95 % interval 0.")
    for name in ("closeness", "image_shuffled_closeness", "closeness_by_type.shape"):
        assert parse_score(name).metric == "closeness"
    assert parse_score("closeness.shape") is None


def test_a_question_may_have_several_right_answers(cfg, asked, tokenizer, monkeypatch):
    """Any of them is right, the picture agrees, and `score` computes the same from the file."""
    asked = [
        replace(asked[0], answer="no", answers=("yes", "yeah")),
        replace(asked[3], answer="B", choices=("circle", "triangle")),
    ]
    metrics = ("exact_match", "multiple_choice", "bleu")
    cfg = replace(cfg, eval=replace(cfg.eval, metrics=metrics))
    monkeypatch.setattr(evaluate.questions, "to_evaluate", lambda cfg: asked)
    with pytest.raises(UserError, match="image 0: 'is it red .': metric multiple_choice"):
        evaluate.evaluate(cfg, None, tokenizer)
    asked[0] = replace(asked[0], answers=("A", "C"), choices=("yes", "no", "yeah"))
    answers = [["A", "it must be the triangle shape"], ["", "B"]]
    monkeypatch.setattr(evaluate, "answer", lambda *args: answers)
    scores = evaluate.evaluate(cfg, None, tokenizer)
    assert (scores["exact_match"], scores["multiple_choice"]) == (0.5, 1.0)
    assert scores["image_shuffled_multiple_choice"] == 0.5
    file = Workdir(cfg.workdir).predictions
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["correct"] for line in lines] == [True, False]
    assert lines[0]["references"] == ["A", "C"] and "bleu" not in lines[0]
    scored = score_predictions(metrics, read_predictions(str(file)))
    assert scored.items() <= scores.items()


def test_an_unknown_metric_is_refused_before_the_work(cfg):
    unknown = replace(cfg, eval=replace(cfg.eval, metrics=("exactmatch",)))
    with pytest.raises(ConfigError, match="eval.metrics 'exactmatch' is not .* exact_match"):
        evaluate.evaluate(unknown, None, None)


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(cfg, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="workdir .*file/run cannot be written"):
        evaluate.evaluate(replace(cfg, workdir=str(tmp_path / "file" / "run")), None, None)


def test_an_evaluation_that_fails_leaves_no_folder_behind(cfg, tmp_path):
    missing = replace(cfg, eval=replace(cfg.eval, split="nowhere"))
    folder = Workdir(str(tmp_path / "run")).later_evaluation(missing, 7, {})
    with pytest.raises(UserError):
        evaluate.evaluate(missing, None, None, folder=folder)
    assert not (tmp_path / "run").exists()
    folder.keep_settings()
    assert folder.path.is_dir()


def test_an_answer_that_has_no_room_is_refused(cfg, asked, tokenizer):
    room = questions.prompt_length(cfg, tokenizer, [question.question for question in asked])
    exact = replace(cfg, eval=replace(cfg.eval, max_new_tokens=cfg.decoder.max_positions - room))
    assert questions.prompt_length(exact, tokenizer, ["is it red ?"]) <= room
    with pytest.raises(
        ConfigError, match="decoder.max_positions 64 has no room .* eval.max_new_tokens 64"
    ):
        too_many = replace(cfg, eval=replace(cfg.eval, max_new_tokens=64))
        evaluate.answer(too_many, None, tokenizer, asked, {"evaluating": asked})


def test_answers_longer_than_what_is_generated_are_counted(cfg, asked, tokenizer):
    lengths = [len(tokenizer.encode(question.answer)) for question in asked]
    longest = max(lengths)
    assert (
        evaluate.warn_of_long_answers(
            replace(cfg, eval=replace(cfg.eval, max_new_tokens=longest)), tokenizer, asked
        )
        == ""
    )
    short = replace(cfg, eval=replace(cfg.eval, max_new_tokens=longest - 1))
    said = (
        f"{lengths.count(longest)} of 5 answers are longer than eval.max_new_tokens {longest - 1} "
    )
    assert evaluate.warn_of_long_answers(short, tokenizer, asked).startswith(said)


def test_every_answer_is_a_line_of_the_predictions(scores, cfg):
    lines = [json.loads(line) for line in Workdir(cfg.workdir).predictions.read_text().splitlines()]
    assert len(lines) == 5
    assert lines[2] == {
        "image_id": 1,
        "question": "is it red ?",
        "type": "yes_no",
        "answer": "no",
        "references": ["no"],
        "prediction": "yes",
        "correct": False,
    }
    assert [line["correct"] for line in lines] == [True, True, False, True, False]


def test_the_samples_are_a_picture(scores, cfg):
    with Image.open(Workdir(cfg.workdir).samples) as image:
        image.load()
        colors = {color for _, color in image.convert("RGB").getcolors(1 << 20)}
    assert min(image.size) > 200
    assert {(0x1A, 0x7F, 0x37), (0xCF, 0x22, 0x2E)} <= colors, (
        "right answers in green, wrong ones in red"
    )


@pytest.mark.parametrize("said", ["$x$ $", "$\\frac$", "", "\n", "\u4e00"])
def test_a_picture_is_drawn_whatever_the_model_says(said, asked, tmp_path):
    evaluate.draw_samples(tmp_path / "samples.png", asked, [said] * 5, "test")
    assert Image.open(tmp_path / "samples.png").size


def test_a_cell_shows_the_answer_and_of_a_wrong_one_the_right_one_too():
    assert samples.verdict("rectangle", "rectangle") == "rectangle"
    assert samples.verdict("rectangle", "circle") == "said circle, is rectangle"
    assert samples.verdict("rectangle", "") == "said nothing, is rectangle"
    long = samples.verdict("rectangle", "a b c d e f g " * 30)
    assert long.startswith("said a b c ") and long.endswith(" …,\nis rectangle")


def test_the_heading_counts_what_is_drawn_of_what_there_is():
    is_right = [i % 50 != 0 for i in range(1000)]
    wrong, right = samples.choose_samples(is_right)
    assert (len(wrong), len(right)) == (12, 12)
    assert not any(is_right[i] for i in wrong) and all(is_right[i] for i in right)
    text = samples.heading(is_right, len(wrong), len(right), "test")
    assert text == (
        "test: exact match 0.9800 on 1,000 questions\n"
        "drawn here: 12 of 20 errors (red), 12 of 980 right answers (green)"
    )
    wrong, right = samples.choose_samples([True] * 30)
    text = samples.heading([True] * 30, len(wrong), len(right), "test")
    assert "no errors, 24 of 30 right answers" in text


@pytest.mark.parametrize("count", [1, 2, 5, 30])
def test_any_number_of_samples_is_drawn(count, asked, tmp_path):
    evaluate.draw_samples(tmp_path / "samples.png", (asked * 6)[:count], ["yes"] * count, "test")
    assert Image.open(tmp_path / "samples.png").size


@pytest.fixture
def tokenizer():
    return Tokenizer.train([line for parts in QUESTIONS for line in parts[1:3]], 300)


@pytest.fixture
def said_image_and_question(monkeypatch, tokenizer):
    """A model that answers with the number of the image and the question that it was given."""

    def generate(cfg, params, batch, new_tokens, how):
        shapes.add((batch.tokens.shape, batch.images.shape))
        rows = []
        for tokens, branch, image in zip(
            batch.tokens, batch.branch_ids, batch.images[batch.image_rows]
        ):
            number = round((float(image.mean()) + 1) * 255 / 2)
            rows.append(
                tokenizer.encode(f"{number} {tokenizer.decode(tokens[branch > 0])}")
                + [*how.eos, *how.eos]
            )
        longest = max(map(len, rows))
        return np.array([row + [*how.eos] * (longest - len(row)) for row in rows])

    shapes = set()
    monkeypatch.setattr(evaluate, "generate", generate)
    return shapes


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_question_is_asked_about_the_image_that_is_shown(
    count, cfg, asked, tokenizer, said_image_and_question
):
    shown = asked[::-1][:count]
    (answers,) = evaluate.answer(cfg, None, tokenizer, asked[:count], {"evaluating": shown})
    assert answers == [f"{there.image_id} {here.question}" for here, there in zip(asked, shown)]
    assert len(said_image_and_question) == 1, "batches of several shapes are compiled several times"


def test_an_image_that_questions_of_a_batch_share_is_encoded_once(
    cfg, asked, tokenizer, said_image_and_question
):
    cfg = replace(cfg, eval=replace(cfg.eval, batch_size=16))
    evaluate.answer(
        cfg, None, tokenizer, asked, {"evaluating": asked, "with shuffled images": asked[::-1]}
    )
    ((tokens, images),) = said_image_and_question
    assert (tokens[0], images[0]) == (16, 8), (
        "2 images, and as many more as give each of 8 devices one"
    )


@pytest.mark.parametrize("examples, batch_size", [(6, 4), (3, 8), (1, 8)])
def test_real_questions_are_asked_once_each(
    examples, batch_size, cfg, tokenizer, datasets_dir, monkeypatch
):
    limits = Eval(split="test", max_examples=examples, batch_size=batch_size)
    cfg = replace(cfg, data=Data(dir=datasets_dir), eval=limits)
    monkeypatch.setattr(
        evaluate, "answer", lambda cfg, params, tok, asked, shown: [[q.answer for q in asked]] * 2
    )
    scores = evaluate.evaluate(cfg, None, tokenizer)
    assert (scores["examples"], scores["exact_match"]) == (examples, 1.0)
    assert len(Workdir(cfg.workdir).predictions.read_text().splitlines()) == examples


def test_shuffled_images_are_those_of_other_records(cfg, tokenizer, datasets_dir, monkeypatch):
    def look(cfg, params, tokenizer, asked, shown):
        for label, those in shown.items():
            seen[label] = [(here.image_id, there.image_id) for here, there in zip(asked, those)]
        return [[""] * len(asked)] * 2

    seen = {}
    monkeypatch.setattr(evaluate, "answer", look)
    evaluate.evaluate(
        replace(cfg, data=Data(dir=datasets_dir), eval=Eval(max_examples=101)), None, tokenizer
    )
    assert all(here == there for here, there in seen["evaluating"])
    assert all(here != there for here, there in seen["with shuffled images"])
    assert sorted(there for _, there in seen["with shuffled images"]) == [
        here for here, _ in seen["evaluating"]
    ]


def test_a_question_is_asked_about_the_images_of_another_with_as_many():
    asked = [
        Question(i, "", "", "", list, image_count=count)
        for i, count in enumerate([0, 1, 2, 1, 2, 1, 1, 2])
    ]
    shown = evaluate.shuffle_images(asked)
    assert [question.image_count for question in shown] == [
        question.image_count for question in asked
    ]
    assert sorted(question.image_id for question in shown) == list(range(8))
    assert [i for i, question in enumerate(shown) if question.image_id == i] == [0], (
        "it is alone with no image"
    )


def test_the_loss_of_the_right_answers_is_that_of_a_forward_pass(cfg, asked, tokenizer):
    """In batches of two, of which the last is filled up; an end token follows each answer."""
    cfg = replace(cfg, decoder=replace(cfg.decoder, tie_word_embeddings=False))
    params = jax.device_put(random_params(cfg, 0.3))
    shown = evaluate.shuffle_images(asked)
    losses = answer_losses(cfg, params, tokenizer, asked, shown)
    batch = questions.question_batch(
        cfg, tokenizer, asked, shown, answers=[question.answer for question in asked]
    )
    logits = VLM(cfg.model).apply({"params": params}, jax.device_put(batch)).logits
    log_probs = jax.nn.log_softmax(logits)
    for row, (question, loss) in enumerate(zip(asked, losses, strict=True)):
        ids = [*tokenizer.encode(question.answer), tokenizer.eos_id]
        slots = range(batch.tokens.shape[1] - len(ids) - 1, batch.tokens.shape[1] - 1)
        expected = -sum(float(log_probs[row, slot, token]) for slot, token in zip(slots, ids))
        assert loss.tokens == len(ids)
        np.testing.assert_allclose(loss.nats, expected, rtol=1e-4)


def test_nats_are_summed_over_all_tokens_of_a_type(cfg, asked, tokenizer, monkeypatch):
    cfg = replace(cfg, eval=replace(cfg.eval, metrics=("exact_match", "nats")))
    losses = [AnswerLoss(nats, tokens) for nats, tokens in ((1, 2), (6, 2), (2, 1), (2, 2), (0, 1))]
    monkeypatch.setattr(evaluate.questions, "to_evaluate", lambda cfg: asked)
    monkeypatch.setattr(evaluate, "answer", lambda *args: [[""] * 5] * 2)
    monkeypatch.setattr(evaluate, "answer_losses", lambda *args: losses)
    scores = evaluate.evaluate(cfg, None, tokenizer)
    assert scores["nats"] == scores["image_shuffled_nats"] == pytest.approx(11 / 8)
    assert scores["nats_by_type"] == pytest.approx({"shape": 8 / 4, "yes_no": 3 / 4})
    low, high = scores["nats_interval"]
    assert low < 11 / 8 < high
