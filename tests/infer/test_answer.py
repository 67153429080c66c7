"""`vlm_jax.generate` for runs and checkpoints: equal to the command line; batch equal to single."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GPT2Config, GPT2LMHeadModel

import vlm_jax
from tests.hub import tiny_checkpoints, tiny_tokenizers
from tests.hub.parity import saved
from tests.nn.models import raw_patches
from vlm_jax.cli.main import main
from vlm_jax.config import UserError
from vlm_jax.config.files import to_json
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.hub.text.prompts import ChatPrompt
from vlm_jax.infer import run as infer_run
from vlm_jax.infer.answer import AnswerOptions, encode
from vlm_jax.infer.processor import Processor
from vlm_jax.infer.run import RunProcessor
from vlm_jax.nn.vlm import VLM
from vlm_jax.runtime.workdir import Workdir
from vlm_jax.testing import random_params, tiny
from vlm_jax.train.checkpoint import Checkpoints
from vlm_jax.train.step import state_shapes

pytestmark = pytest.mark.usefixtures("one_device")

NEW = 6
PROMPTS = ["what is it?", "is there a cat, and where does it sit?", ""]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["what is it?", "is there a cat, and where does it sit?"] * 4, 300)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    files = [str(folder / name) for name in ("a.png", "b.png", "c.png")]
    for file in files:
        Image.fromarray(rng.integers(0, 255, (50, 70, 3), np.uint8)).save(file)
    return files


def experiment(kind="unified", template="plain", **data):
    """A run of conversations with a free head: a tied one repeats the last token."""
    cfg = raw_patches(tiny(kind))
    data = replace(
        cfg.data,
        source="conversations",
        files=("t.json",),
        images_per_row=2,
        template=template,
        **data,
    )
    decoder = replace(cfg.decoder, tie_word_embeddings=False, max_positions=128)
    return replace(cfg, data=data, decoder=decoder, eval=replace(cfg.eval, max_new_tokens=NEW))


def in_memory(cfg, tokenizer):
    """What `from_run` returns, with random parameters."""
    return VLM(cfg.model), random_params(cfg, 0.3), RunProcessor(cfg, tokenizer)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer):
    """The work folder of a run with two checkpoints, without a training."""
    cfg = replace(experiment(), workdir=str(tmp_path_factory.mktemp("runs") / "run"))
    workdir = Workdir(cfg.workdir)
    workdir.open(cfg)
    tokenizer.save(workdir.tokenizer)
    checkpoints = Checkpoints(workdir.checkpoints, cfg.train)
    empty = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state_shapes(cfg))
    for step in (2, 4):
        checkpoints.save(
            step, empty.replace(params=random_params(cfg, 0.3, seed=step)), {}, loss=1.0
        )
    checkpoints.close()
    return cfg.workdir


def printed(capsys, *arguments) -> str:
    assert main(["generate", *map(str, arguments)]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "template"),
    [
        ("unified", "plain"),
        ("cross_attention", "plain"),
        ("encoder_decoder", "caption"),
        ("text_only", "plain"),
    ],
)
def test_a_batch_of_prompts_and_images_of_a_run_is_answered_as_one_by_one(
    kind, template, tokenizer, pictures
):
    run = in_memory(experiment(kind, template), tokenizer)
    images = [[pictures[0]], pictures[1:], []]
    together = vlm_jax.generate(*run, PROMPTS, images, max_new_tokens=NEW)
    alone = [vlm_jax.generate(*run, *one, max_new_tokens=NEW) for one in zip(PROMPTS, images)]
    assert [[text] for text in together] == alone


def test_a_run_is_answered_as_the_command_line_does(run, pictures, capsys):
    model, params, processor = vlm_jax.from_run(run)
    for files in (pictures[:2], []):
        shown = [[file] for file in files] or [[]]
        images = [row for row in shown for _ in PROMPTS]
        texts = vlm_jax.generate(
            model, params, processor, PROMPTS * len(shown), images, max_new_tokens=NEW
        )
        lines = [
            "  ".join([*row, *pair]) for row, *pair in zip(images, PROMPTS * len(shown), texts)
        ]
        options = ["--image", *files] if files else []
        assert (
            printed(capsys, "--workdir", run, *options, "--prompt", *PROMPTS)
            == "\n".join(lines) + "\n"
        )


def test_the_answer_of_a_run_is_streamed(run, pictures, capsys):
    """The pieces are together the answer, and the command line prints each when it is there."""
    model, params, processor = vlm_jax.from_run(run)
    images = [[pictures[0]]]
    options = AnswerOptions(max_new_tokens=NEW)
    request = encode(model, processor, PROMPTS[:1], images, options)
    pieces = list(request.stream(params))
    (answer,) = request.answers(params)
    assert "".join(pieces) == answer
    assert len(pieces) > 1 and pieces[0]
    command = printed(capsys, "--workdir", run, "--image", pictures[0], "--prompt", PROMPTS[0])
    assert command == f"{pictures[0]}  {PROMPTS[0]}  {answer}\n"

    first, stop = answer[:1], answer[1:]
    request = encode(model, processor, PROMPTS[:1], images, replace(options, stop=(stop,)))
    assert request.answers(params) == ["".join(request.stream(params))] == [first]
    arguments = ["--workdir", run, "--image", pictures[0], "--prompt", PROMPTS[0], "--stop", stop]
    assert printed(capsys, *arguments) == f"{pictures[0]}  {PROMPTS[0]}  {first}\n"


def test_both_processors_are_of_the_protocol(gpt2, tokenizer):
    assert isinstance(RunProcessor(experiment(), tokenizer), Processor)
    assert isinstance(vlm_jax.from_pretrained(gpt2)[2], Processor)


def test_a_conversation_is_a_prompt_of_a_run(tokenizer, pictures):
    """One turn is the prompt itself; later ones follow the answers before them."""
    processor = RunProcessor(experiment(template="vicuna"), tokenizer)
    alone = processor(PROMPTS[0], [pictures[:1]])
    chat = ChatPrompt((f"<image>\n{PROMPTS[0]}",))
    np.testing.assert_array_equal(processor(chat, [pictures[:1]]).tokens, alone.tokens)
    longer = ChatPrompt((*chat.turns, "a cat", PROMPTS[1]), system="be brief")
    padded = processor([longer, chat], [pictures[:1]] * 2, pad_to_multiple_of=64)
    assert padded.tokens.shape == (2, 128)
    is_token = np.asarray(padded.segment_ids) > 0
    # <eos> ends the answer of the first turn, and would end its text.
    ids = [i for i in padded.tokens[0][is_token[0]] if i != tokenizer.eos_id]
    text = tokenizer.decode(ids)
    assert text.index("be brief") < text.index("a cat") < text.index(PROMPTS[1])
    np.testing.assert_array_equal(padded.tokens[1][is_token[1]], alone.tokens[0])


def test_a_run_of_single_questions_refuses_a_conversation(tokenizer):
    processor = RunProcessor(tiny(), tokenizer)
    alone, chat = processor("what?"), ChatPrompt(("<image>\nwhat?",))
    np.testing.assert_array_equal(processor(chat).tokens, alone.tokens)
    with pytest.raises(UserError, match="trained on single questions .data.source easy_vqa"):
        processor(ChatPrompt(("what?", "a", "b")))


def test_a_run_refuses_prompts_without_its_format(tokenizer):
    with pytest.raises(UserError, match="chat is False, but a run formats every prompt"):
        vlm_jax.generate(*in_memory(experiment(), tokenizer), "a", chat=False)


def test_a_checkpoint_of_a_run_is_named_by_its_step(run, tokenizer):
    cfg = Workdir(run).read_config()
    for step, found in ((2, vlm_jax.from_run(run, step=2)), (4, vlm_jax.from_run(run))):
        jax.tree.map(np.testing.assert_array_equal, found[1], random_params(cfg, 0.3, seed=step))
    with pytest.raises(UserError, match="no checkpoint of step 3: choose 4, 2"):
        vlm_jax.from_run(run, step=3)
    with pytest.raises(UserError, match="is not a run"):
        vlm_jax.from_run(run + "/nowhere")


def test_generate_and_export_take_the_best_checkpoint(run, pictures, capsys, monkeypatch):
    """`eval` is tested in tests/infer/test_conversation_runs.py."""
    Workdir(run).best.write_text('{"step": 2}')
    params = vlm_jax.from_run(run, step="best")[1]
    expected = random_params(Workdir(run).read_config(), 0.3, seed=2)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    arguments = ["--workdir", run, "--image", pictures[0], "--prompt", PROMPTS[0]]
    printed_best = printed(capsys, *arguments, "--step", "best")
    assert printed_best == printed(capsys, *arguments, "--step", 2)
    assert printed_best != printed(capsys, *arguments)

    # No family has the layers of this run, so that `export` ends after it has loaded the run.
    loaded = []
    load = infer_run.load_stored

    def load_stored(cfg, step):
        loaded.append(load(cfg, step))
        return loaded[-1]

    monkeypatch.setattr(infer_run, "load_stored", load_stored)
    assert main(["export", "--checkpoint", run, "--step", "best", "--output", "x"]) != 0
    jax.tree.map(np.testing.assert_array_equal, loaded[0][0], expected)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["generate", "--prompt", "a"], "--step applies to --workdir only"),
        (["export", "--output", "x"], "--step is for a run"),
        (["eval"], "--step is for the run in --workdir"),
    ],
)
def test_a_checkpoint_has_no_steps(command, message, gpt2, capsys):
    assert main([*command, "--checkpoint", str(gpt2), "--step", "best"]) == 2
    assert message in capsys.readouterr().err


def test_files_open_images_and_arrays_are_one(tokenizer, pictures):
    processor = RunProcessor(experiment(), tokenizer)
    opened = Image.open(pictures[0])
    batches = [
        processor(["what?"], [[image]]) for image in (pictures[0], opened, np.asarray(opened))
    ]
    for batch in batches[1:]:
        np.testing.assert_array_equal(batch.images, batches[0].images)


@pytest.mark.parametrize(
    ("prompts", "images", "said"),
    [
        (["a", "b"], [["x.png"]], "images has 1 lists for 2 prompts"),
        (["a", "b"], ["x.png"] * 3, "flat list of 3 images does not match 2 prompts"),
        ("<image> a <image>", [Image.new("RGB", (4, 4))], "2 <image> placeholders for 1 images"),
        ("a", ["a\0.png"], r"cannot read the image 'a\\x00.png': embedded null byte"),
        ("a", [b"x" * 9000], r"images holds b'x{1,60}\.\.\.x{1,60}': give one list"),
        ("a", ["nowhere.png"], "cannot read the image nowhere.png"),
        ("a", [np.zeros((4, 4, 3))], "float64 .* is not an image: it must be uint8"),
        (7, (), "prompts is 7: it must be text, or a list of texts"),
        (ChatPrompt(("a", "b")), (), "has 2 turns: .* the last turn must be a question"),
        (ChatPrompt(()), (), "has 0 turns: .* the last turn must be a question"),
        (["a", b"b"], (), r"prompts is \['a', b'b'\]: it must be text"),
        ("word " * 100, (), "is too long: decoder.max_positions 128"),
    ],
)
def test_a_mistake_is_a_sentence(prompts, images, said, tokenizer):
    with pytest.raises(UserError, match=said):
        vlm_jax.generate(*in_memory(experiment(), tokenizer), prompts, images)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"temperature": -1}, "temperature -1: it must be at least 0"),
        ({"temperature": "1"}, "temperature '1': it must be a number"),
        ({"top_p": None}, "top_p None: it must be a number"),
        ({"top_k": 1.5}, "top_k 1.5: it must be a whole number"),
        ({"max_new_tokens": 2.0}, "max_new_tokens 2.0: it must be a whole number"),
        ({"seed": True}, "seed True: it must be a whole number"),
        ({"max_new_tokens": 0}, "max_new_tokens 0: it must be at least 1"),
        ({"top_p": 2.0}, "top_p 2.0: it must be above 0 and at most 1"),
    ],
)
def test_an_option_out_of_range_is_refused(option, said, tokenizer):
    with pytest.raises(UserError, match=said):
        vlm_jax.generate(*in_memory(experiment(), tokenizer), "a", **option)


def test_options_may_be_numbers_of_numpy():
    AnswerOptions(np.int64(3), np.float32(0.5), np.int32(2), np.float64(1), np.uint32(7)).check()


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([None], r"^answers\[0\] is None, not a text"),
        (["a", "b"], "answers must be a list of 1 texts"),
    ],
)
def test_an_answer_that_is_not_a_text_is_refused(answers, said, tokenizer):
    _, _, processor = in_memory(experiment(), tokenizer)
    with pytest.raises(UserError, match=said):
        processor(["a"], answers=answers)


def test_a_run_is_not_loaded_as_a_public_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text(to_json(experiment()))
    with pytest.raises(UserError, match="is a run, not a public .*: load it with vlm_jax.from_run"):
        vlm_jax.from_pretrained(tmp_path)


def test_a_long_prompt_does_not_shorten_the_other_answers(tokenizer, pictures):
    model, params, processor = in_memory(experiment("cross_attention"), tokenizer)
    prompts, images = ["a " * 122, "is it?"], [[pictures[0]], [pictures[1]]]
    together = vlm_jax.generate(model, params, processor, prompts, images, max_new_tokens=NEW)
    alone = [
        vlm_jax.generate(model, params, processor, *one, max_new_tokens=NEW)[0]
        for one in zip(prompts, images)
    ]
    assert together == alone
    room = 128 - len(tokenizer.encode(prompts[0] + "\n"))
    assert 0 < room < NEW


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gpt2")
    tiny_tokenizers.gpt2(folder)
    config = GPT2Config(
        vocab_size=800, n_positions=64, n_embd=32, n_layer=2, n_head=4, tie_word_embeddings=False
    )
    saved(GPT2LMHeadModel(config), folder)
    return folder


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    torch.manual_seed(0)
    return tiny_checkpoints.llava(tmp_path_factory.mktemp("llava")).path


def test_a_decoder_answers_as_the_command_line_does(gpt2, capsys):
    model, params, processor = vlm_jax.from_pretrained(gpt2)
    sampled = {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "seed": 3}
    for sampling in ({}, sampled):
        options = [
            word
            for name, value in sampling.items()
            for word in (f"--{name.replace('_', '-')}", value)
        ]
        command = printed(
            capsys, "--checkpoint", gpt2, "--prompt", "hello", "--max-new-tokens", NEW, *options
        )
        answers = vlm_jax.generate(
            model, params, processor, "hello", max_new_tokens=NEW, **sampling
        )
        assert [command] == [text + "\n" for text in answers]


def test_a_llava_answers_as_the_command_line_does_with_or_without_its_template(
    llava, pictures, capsys
):
    model, params, processor = vlm_jax.from_pretrained(llava)
    asked = ["what is it?", "and what is this one?"]
    images = [[pictures[0]], [pictures[1]]]
    texts = vlm_jax.generate(model, params, processor, asked, images, max_new_tokens=NEW)
    for prompt, (file,), text in zip(asked, images, texts):
        options = ("--image", file, "--prompt", prompt, "--max-new-tokens", NEW)
        assert printed(capsys, "--checkpoint", llava, *options) == text + "\n"
    formatted = [processor.chat(prompt, 1) for prompt in asked]
    assert formatted != asked
    options = ("--image", pictures[0], "--prompt", formatted[0], "--max-new-tokens", NEW)
    assert printed(capsys, "--checkpoint", llava, "--no-chat", *options) == texts[0] + "\n"
    assert (
        vlm_jax.generate(
            model, params, processor, formatted, images, max_new_tokens=NEW, chat=False
        )
        == texts
    )


def test_a_checkpoint_answers_several_prompts_about_images_together_or_one_by_one(
    llava, pictures, capsys
):
    model, params, processor = vlm_jax.from_pretrained(llava)
    asked, files = ["what is it?", "and what is this one?"], pictures[:2]
    for options, pairs in (
        (("--image", files[0], "--prompt", *asked), [(files[:1], text) for text in asked]),
        (
            ("--image", *files, "--prompt", asked[1], "--images-per-prompt", "one"),
            [([file], asked[1]) for file in files],
        ),
    ):
        images, prompts = map(list, zip(*pairs))
        texts = vlm_jax.generate(model, params, processor, prompts, images, max_new_tokens=NEW)
        lines = ["  ".join([*row, prompt, text]) for (row, prompt), text in zip(pairs, texts)]
        command = printed(capsys, "--checkpoint", llava, "--max-new-tokens", NEW, *options)
        assert command == "\n".join(lines) + "\n"


@pytest.mark.parametrize("kind", ["unified", "cross_attention"])
@pytest.mark.parametrize("is_conversation", [True, False])
def test_a_run_scores_answers_behind_its_prompts(tokenizer, pictures, kind, is_conversation):
    """Tokens: the prompt to continue, the answer and <eos>; only the latter two are scored."""
    cfg = experiment(kind) if is_conversation else replace(tiny(kind), eval=experiment().eval)
    processor = RunProcessor(cfg, tokenizer)
    prompts, images = PROMPTS[:2], [[pictures[0]], [pictures[1]]]
    batch = processor(prompts, images, answers=["a cat", "it"])
    asked = processor(prompts[:1], images[:1])
    row = np.asarray(batch.tokens[0])[np.asarray(batch.segment_ids[0]) > 0].tolist()
    answer = [*tokenizer.encode("a cat"), tokenizer.eos_id]
    assert row == [*np.asarray(asked.tokens[0]).tolist(), *answer]
    weights = np.asarray(batch.loss_weights[0]) > 0
    assert np.asarray(batch.targets[0])[weights].tolist() == answer
    with pytest.raises(UserError, match="answers must be a list of 2 texts"):
        processor(prompts, images, answers=["one"])
