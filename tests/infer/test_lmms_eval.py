"""The model that lmms-eval loads: requests of both forms, rounds, options, and real tasks.

The tests up to the line "real lmms-eval" need no lmms-eval.
"""

import importlib
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

import vlm_jax
from tests.infer.test_likelihood import tiny_run
from vlm_jax.config import UserError
from vlm_jax.data.forms.record import IMAGE_PLACEHOLDER
from vlm_jax.hub.text.prompts import ChatPrompt
from vlm_jax.infer.answer import AnswerOptions
from vlm_jax.infer.likelihood import score_answers
from vlm_jax.infer.lmms_eval import queries, responses
from vlm_jax.infer.lmms_eval.responses import Responder, load_model, make_responder
from vlm_jax.infer.stop import find_stop

NEW = 6
PICTURES = [
    Image.fromarray(np.random.default_rng(i).integers(0, 255, (20, 30, 3), np.uint8))
    for i in range(3)
]
DOCUMENTS = [
    {"question": "what is it?", "images": PICTURES[:1], "answer": "cat", "choices": ["cat", "it"]},
    {
        "question": "is there a cat, and where does it sit?",
        "images": PICTURES[1:],
        "answer": "it",
        "choices": ["where", "is there a cat"],
    },
    {"question": "where is it?", "images": PICTURES[2:], "answer": "it", "choices": ["a", "cat"]},
]
OPTIONS = {"max_new_tokens": NEW, "temperature": 0, "top_p": None, "num_beams": 1}


@pytest.fixture(scope="module", autouse=True)
def images_cut_short_stay_errors():
    """Undo what an import of lmms-eval changes in the whole process."""
    yield
    ImageFile.LOAD_TRUNCATED_IMAGES = False


def documents(task: str, split: str, doc_id: int):
    assert (task, split) == ("colors", "test")
    return DOCUMENTS[doc_id]


def messages(document) -> list[dict]:
    images = [{"type": "image", "url": image} for image in document["images"]]
    return [{"role": "user", "content": [*images, {"type": "text", "text": document["question"]}]}]


def simple_requests(options=OPTIONS) -> list[tuple]:
    source = lambda i: (lambda document: document["images"], i, "colors", "test")  # noqa: E731
    return [(doc["question"], options, *source(i)) for i, doc in enumerate(DOCUMENTS)]


def chat_requests(options=OPTIONS) -> list[tuple]:
    return [
        (doc["question"], messages, options, i, "colors", "test") for i, doc in enumerate(DOCUMENTS)
    ]


def read(read_query, requests) -> list[queries.Query]:
    return [read_query(request, documents) for request in requests]


@pytest.fixture(scope="module")
def run():
    return tiny_run("unified")


@pytest.fixture(scope="module")
def expected(run):
    """The answer to each document, alone."""
    return [
        vlm_jax.generate(
            *run,
            ChatPrompt(("<image>\n" * len(document["images"]) + document["question"],)),
            [document["images"]],
            max_new_tokens=NEW,
        )[0]
        for document in DOCUMENTS
    ]


def test_both_forms_are_answered_in_batches_as_one_by_one(run, expected):
    responder = make_responder(run, "2", None)
    assert responder.answer(read(queries.chat_query, chat_requests())) == expected
    stop = expected[0][1:3]
    stopped = [text[: find_stop(text, [stop])] for text in expected]
    assert stopped[0] != expected[0]
    requests = simple_requests({**OPTIONS, "until": [stop]})
    assert responder.answer(read(queries.simple_query, requests)) == stopped


def test_choices_are_scored_without_the_white_space_around_them(run):
    requests = [
        (doc["question"], f" {choice}", lambda doc: doc["images"], i, "colors", "test")
        for i, doc in enumerate(DOCUMENTS)
        for choice in doc["choices"]
    ]
    for i, likelihood in enumerate(make_responder(run, 4, None).score(requests, documents)):
        document = DOCUMENTS[i // 2]
        prompt = "<image>\n" * len(document["images"]) + document["question"]
        images, choice = [document["images"]], document["choices"][i % 2]
        (alone,) = score_answers(*run, [ChatPrompt((prompt,))], images, [choice], 64)
        np.testing.assert_allclose(likelihood.log_likelihood, alone.log_likelihood, atol=1e-4)


class Echo(Responder):
    """Answers with the number of images and the text of the question."""

    def answer(self, queries):
        questions = [query.read() for query in queries]
        return [
            f"{len(images)}: {prompt.turns[-1].rpartition(IMAGE_PLACEHOLDER)[2].strip()}"
            for prompt, images in questions
        ]


def doc_to_text(document, previous_output, round_idx, previous_round_info):
    """As many rounds as the document has images; the second has an image of its own."""
    if round_idx > len(document["images"]):
        return None, None, True, [*previous_output, "end"], None
    assert previous_round_info == (None if round_idx == 1 else round_idx - 1)
    return PICTURES[:1], f"again {previous_output[-1]}", False, previous_output, round_idx


def rounds_of_messages(document, round_idx=None, previous_output=None, previous_round_info=None):
    if round_idx is None:
        return messages(document)
    visuals, text, is_over, outputs, info = doc_to_text(
        document, previous_output, round_idx, previous_round_info
    )
    shown = None if is_over else messages({"question": text, "images": visuals})
    return shown, is_over, outputs, info


def test_a_request_of_several_rounds_has_an_answer_for_each():
    echo = Echo(None, None, None, 2, NEW)
    simple = [
        (context, options, visuals, doc_to_text, *source)
        for context, options, visuals, *source in simple_requests()
    ]
    chat = [(context, rounds_of_messages, *rest) for context, _, *rest in chat_requests()]
    for requests in (read(queries.simple_query, simple), read(queries.chat_query, chat)):
        outputs = echo.answer_rounds(requests)
        assert [len(texts) for texts in outputs] == [3, 4, 3]
        assert outputs[0] == ["1: what is it?", "1: again 1: what is it?", "end"]


def test_messages_keep_the_order_of_texts_and_images():
    image = {"type": "image", "url": PICTURES[0]}
    text = {"type": "text", "text": "and"}
    question = queries.chat_question(
        [
            {"role": "system", "content": [{"type": "text", "text": "be brief"}]},
            {"role": "user", "content": [text, image, text, image]},
            {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
            {"role": "user", "content": "why?"},
        ],
        "a",
    )
    turns = ("and<image>\nand<image>", "two", "why?")
    assert question.prompt == ChatPrompt(turns, "be brief")
    assert question.images == [PICTURES[0]] * 2
    placed = queries.simple_question("is <image> as <image>?", PICTURES[:2], "a")
    assert placed.prompt.turns == ("is <image> as <image>?",)


@pytest.mark.parametrize(
    ("gen_kwargs", "options"),
    [
        ({}, AnswerOptions(16)),
        (OPTIONS | {"until": "\n\n", "video_fps": 3}, AnswerOptions(NEW, stop=("\n\n",))),
        ({"temperature": 0.5, "top_p": 0.9}, AnswerOptions(16, 0.5, top_p=0.9)),
        ({"do_sample": True, "top_k": 3}, AnswerOptions(16, 1.0, top_k=3)),
        ({"do_sample": False, "temperature": 0.5, "top_p": 0}, AnswerOptions(16)),
    ],
)
def test_options_of_a_task(gen_kwargs, options):
    read_options, ignored = queries.read_options(gen_kwargs, 16)
    assert read_options == options
    assert ignored == [name for name in gen_kwargs if name == "video_fps"]


def ask(role, *parts):
    return {"role": role, "content": list(parts)}


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (queries.read_options, ({"num_beams": 3}, 16), "num_beams 3, but beam search is not"),
        (queries.read_options, ({"top_p": 2, "do_sample": True}, 16), "top_p 2: it must be"),
        (queries.read_options, ({"until": [""]}, 16), "stop has an empty text"),
        (queries.simple_question, ("<image> a <image>", PICTURES[:1], "d"), "d has 1 images but 2"),
        (queries.simple_question, ("a", [{"type": "video"}], "d"), "d has a video: only images"),
        (
            queries.chat_question,
            ([ask("user", {"type": "audio"})], "d"),
            "a part of the type audio",
        ),
        (queries.chat_question, ([ask("assistant")], "d"), "of assistant where one of user must"),
        (queries.chat_question, ([], "d"), "d does not end with a message of user"),
        (load_model, (), "needs workdir=DIR, .*, or checkpoint=DIR"),
        (load_model, ("a", "b"), "needs workdir=DIR, .*, or checkpoint=DIR"),
        (load_model, ("a", None, "c"), "adapter and intermediate_layers are for checkpoint=DIR"),
        (load_model, (None, "a", None, 3), "step is for workdir=DIR"),
        (make_responder, ((None,) * 3, "auto", 3), "batch_size auto: it must be a whole number"),
    ],
)
def test_a_mistake_is_a_sentence(function, arguments, message):
    with pytest.raises(UserError, match=message):
        function(*arguments)


def test_a_run_states_the_most_tokens_of_a_task_that_states_none(run):
    model, params, processor = run
    cfg = replace(processor.cfg, eval=replace(processor.cfg.eval, max_new_tokens=9))
    processor = replace(processor, cfg=cfg)
    assert responses.default_max_new_tokens(processor) == 9
    assert responses.default_max_new_tokens(None) == AnswerOptions().max_new_tokens


# ---- real lmms-eval: pip install --no-deps lmms-eval, and requirements-lmms-eval.txt

TASKS = {
    "colors_generate": """
output_type: generate_until
generation_kwargs:
  max_new_tokens: 6
  temperature: 0
  until: ["\\n\\n"]
process_results: !function utils.process_results
metric_list:
  - metric: is_equal
    aggregation: !function utils.mean
    higher_is_better: true
""",
    "colors_choice": """
output_type: multiple_choice
doc_to_choice: choices
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
""",
}
COMMON = """
task: NAME
dataset_path: FOLDER/data
dataset_kwargs: {load_from_disk: true}
test_split: test
doc_to_visual: !function utils.doc_to_visual
doc_to_text: question
"""
UTILS = """
def doc_to_visual(document):
    return [image.convert("RGB") for image in document["images"]]


def process_results(document, results):
    return {"is_equal": float(results[0] == document["answer"])}


def mean(scores):
    return sum(scores) / len(scores)
"""


@pytest.fixture
def task_folder(tmp_path, expected):
    """Tasks about DOCUMENTS; two of them have the run's answers."""
    datasets = pytest.importorskip("datasets")
    rows = [dict(document, label=0) for document in DOCUMENTS]
    for row, answer in zip(rows[:2], expected):
        row["answer"] = answer
    features = datasets.Features(
        {
            "question": datasets.Value("string"),
            "images": datasets.List(datasets.Image()),
            "answer": datasets.Value("string"),
            "choices": datasets.List(datasets.Value("string")),
            "label": datasets.Value("int64"),
        }
    )
    split = datasets.Dataset.from_list(rows, features)
    datasets.DatasetDict({"test": split}).save_to_disk(tmp_path / "data")
    (tmp_path / "utils.py").write_text(UTILS)
    targets = {"colors_generate": "answer", "colors_choice": "label"}
    for name, text in TASKS.items():
        common = COMMON.replace("NAME", name).replace("FOLDER", str(tmp_path))
        task = f"{common}doc_to_target: {targets[name]}\n{text}"
        (tmp_path / f"{name}.yaml").write_text(task)
    return tmp_path


@pytest.fixture
def evaluate(task_folder, monkeypatch):
    """Evaluates a model of lmms-eval on a task, without the network."""
    evaluator = pytest.importorskip("lmms_eval.evaluator")
    from lmms_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    manager = TaskManager(include_path=str(task_folder), include_defaults=False)

    def run_task(model, name):
        results = evaluator.simple_evaluate(model=model, tasks=[name], task_manager=manager)
        return results["results"][name], results["samples"][name]

    return run_task


def test_lmms_eval_generates_with_a_model_in_memory(evaluate, run, expected):
    from vlm_jax.infer.lmms_eval.models import ChatVlmJax, SimpleVlmJax

    for kind in (ChatVlmJax, SimpleVlmJax):
        scores, samples = evaluate(kind(model=run, batch_size=2), "colors_generate")
        assert scores["is_equal,none"] == pytest.approx(2 / 3)
        assert [sample["filtered_resps"] for sample in samples] == [[text] for text in expected]


def test_lmms_eval_chooses_by_the_likelihood(evaluate, run):
    from vlm_jax.infer.lmms_eval.models import SimpleVlmJax

    scores, _ = evaluate(SimpleVlmJax(model=run, batch_size=4), "colors_choice")
    are_first = []
    for document in DOCUMENTS:
        prompt = "<image>\n" * len(document["images"]) + document["question"]
        prompts, images = [ChatPrompt((prompt,))] * 2, [document["images"]] * 2
        first, second = score_answers(*run, prompts, images, document["choices"])
        are_first.append(first.log_likelihood > second.log_likelihood)
    assert scores["acc,none"] == pytest.approx(np.mean(are_first))


def test_the_entry_point_is_a_manifest_of_both_forms():
    project = tomllib.loads(Path(__file__).parents[2].joinpath("pyproject.toml").read_text())
    module, _, name = project["project"]["entry-points"]["lmms_eval.models"]["vlm_jax"].partition(
        ":"
    )
    registry = pytest.importorskip("lmms_eval.models.registry_v2").ModelRegistryV2()
    registry.register_manifest(getattr(importlib.import_module(module), name))
    assert not registry.get_model_class("vlm_jax").is_simple
    assert registry.get_model_class("vlm_jax", force_simple=True).is_simple
