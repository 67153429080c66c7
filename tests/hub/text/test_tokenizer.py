"""Ids, texts and special tokens equal those of transformers' AutoTokenizer for the same folder."""

import shutil

import numpy as np
import pytest
import sentencepiece
from transformers import AutoTokenizer

from tests.hub import tiny_tokenizers as tiny
from vlm_jax.config import UserError
from vlm_jax.hub.text.tokenizer import HubTokenizer

FOLDERS = {
    build.__name__: build
    for build in (
        *(
            tiny.gpt2,
            tiny.gpt2_whole,
            tiny.gpt2_with_older_files,
            tiny.opt,
            tiny.roberta,
            tiny.clip,
            tiny.clip_whole,
            tiny.qwen2,
            tiny.qwen3,
            tiny.olmo2,
            tiny.idefics3,
            tiny.internvl,
        ),
        *(
            tiny.llama3,
            tiny.llama3_called_llama,
            tiny.llama,
            tiny.llama_legacy,
            tiny.llama_without_prefix_space,
        ),
        *(
            tiny.llava,
            tiny.phi3,
            tiny.mistral_unigram,
            tiny.gemma,
            tiny.xlm_roberta,
            tiny.wordpiece,
        ),
    )
}
every_folder = pytest.mark.parametrize("name", FOLDERS)
TEXTS = [
    "",
    " ",
    "the cat sat",
    " the  cat",
    "Hello   World!  \n\n\tthe end \n",
    "what's   on the street, isn't it ? they 've",
    "naïve café Ångström e\u0301 \u212b",  # composed and decomposed
    "猫が座った 😀👩‍👩‍👧 \u200d\ufeff مرحبا",
    "1234567 and 3.14",
    "a▁b ▁ c",
    "<s>the cat</s> <|endoftext|>x<unk> <mask> [UNK]",
    "the <image> cat<image>\n<|image|> the<pad>end <unused>",
    "<start_of_turn>user\nhi<end_of_turn>\n <|im_start|>  <|eot_id|>",
    "\x00\x07 control\r\n",
]


def folder_of(name: str, tmp_path):
    FOLDERS[name](tmp_path)
    return tmp_path


def assert_equal(folder):
    tokenizer, reference = HubTokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == len(reference)
    assert tokenizer.special_tokens == reference.special_tokens_map
    for text in TEXTS:
        for special in (True, False):
            ids = reference.encode(text, add_special_tokens=special)
            assert tokenizer.encode(text, add_special_tokens=special) == ids, text
            assert tokenizer.decode(ids, skip_special_tokens=special) == reference.decode(
                ids, skip_special_tokens=special
            )
    for name in tokenizer.special_tokens.values():
        assert tokenizer.token_to_id(name) == reference.convert_tokens_to_ids(name)
    if reference.bos_token_id is not None:
        assert tokenizer.bos_id == reference.bos_token_id


@every_folder
def test_ids_and_texts_are_those_of_transformers(name, tmp_path):
    assert_equal(folder_of(name, tmp_path))


@every_folder
def test_what_transformers_saves_gives_the_same(name, tmp_path):
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    AutoTokenizer.from_pretrained(folder_of(name, before)).save_pretrained(after)
    if (before / "config.json").is_file():
        shutil.copy(before / "config.json", after)
    assert_equal(after)


def test_llamas_ids_are_those_of_sentencepiece(tmp_path):
    """For texts without special tokens, and without a space that only the legacy form keeps."""
    tiny.llama(tmp_path)
    tokenizer = HubTokenizer.load(tmp_path)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in (
        text for text in TEXTS if "<" not in text and not text.startswith(" ") and "▁" not in text
    ):
        assert tokenizer.encode(text, add_special_tokens=False) == model.encode(text)


def test_any_text_comes_back(tmp_path):
    tiny.gpt2(tmp_path)
    tokenizer = HubTokenizer.load(tmp_path)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


# ---- ids that other files state


def test_ends_of_answers_are_those_of_the_generation_config_first(tmp_path):
    tiny.llama3(tmp_path)
    assert HubTokenizer.load(tmp_path).eos_ids == (1, 2)
    (tmp_path / "generation_config.json").unlink()
    assert HubTokenizer.load(tmp_path).eos_ids == (1,)
    tiny.write(tmp_path, config={"model_type": "llava", "text_config": {"eos_token_id": [3]}})
    assert HubTokenizer.load(tmp_path).eos_ids == (3,)
    tiny.write(tmp_path, config={"model_type": "llama"})
    assert HubTokenizer.load(tmp_path).eos_ids == (
        HubTokenizer.load(tmp_path).token_to_id("<|eot_id|>"),
    )
    tiny.write(tmp_path, config={"model_type": "llama"}, generation_config={"eos_token_id": []})
    assert HubTokenizer.load(tmp_path).eos_ids == (
        HubTokenizer.load(tmp_path).token_to_id("<|eot_id|>"),
    )


def test_padding_is_the_tokenizers_first(tmp_path):
    tiny.llama3(tmp_path)
    tiny.write(tmp_path, generation_config={"pad_token_id": 4})
    assert HubTokenizer.load(tmp_path).pad_id == 1
    tiny.gpt2(tmp_path / ".")
    (tmp_path / "tokenizer.json").unlink()
    tiny.write(tmp_path, tokenizer_config={})
    assert HubTokenizer.load(tmp_path).pad_id == 4
    (tmp_path / "generation_config.json").unlink()
    assert HubTokenizer.load(tmp_path).pad_id is None


# ---- streams


@every_folder
def test_a_stream_shows_the_text_piece_by_piece(name, tmp_path):
    tokenizer = HubTokenizer.load(folder_of(name, tmp_path))
    for text in TEXTS[:-1]:
        for skip in (True, False):
            ids = tokenizer.encode(text)
            stream = tokenizer.stream(skip_special_tokens=skip)
            parts = [stream.feed([i]) for i in ids] + [stream.end()]
            assert "".join(parts) == tokenizer.decode(ids, skip_special_tokens=skip)


def test_a_stream_never_shows_half_a_character(tmp_path):
    tiny.gpt2(tmp_path)
    tokenizer = HubTokenizer.load(tmp_path)
    ids = tokenizer.encode("a 😀 猫")
    assert len(ids) > 7  # a character of the corpus' outside is several tokens
    stream = tokenizer.stream()
    parts = [stream.feed(np.array([i])) for i in ids]
    assert not any("\ufffd" in part for part in parts)
    assert [part for part in parts if part] == ["a", " ", "😀", " ", "猫"]
    stream = tokenizer.stream()
    assert stream.feed(ids[:-1]) == "a 😀 "
    assert stream.end() == "\ufffd"


# ---- invalid folders


def refusal(folder) -> str:
    with pytest.raises(UserError) as error:
        HubTokenizer.load(folder)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_without_a_tokenizer(tmp_path):
    assert "not a folder" in refusal(tmp_path / "none")
    assert "tokenizer.json" in refusal(tmp_path) and "tokenizer.model" in refusal(tmp_path)


def test_merges_without_a_class_are_refused(tmp_path):
    tiny.gpt2(tmp_path)
    (tmp_path / "config.json").unlink()
    assert "tokenizer_class" in refusal(tmp_path) and "GPT2Tokenizer" in refusal(tmp_path)


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"model": {}}', '{"model": {"type": "BPE", "vocab": 1}}']
)
@pytest.mark.parametrize("name", ["gpt2_whole", "llama3"])
def test_a_damaged_tokenizer_json(name, content, tmp_path):
    folder = folder_of(name, tmp_path)
    (folder / "tokenizer.json").write_text(content)
    assert "tokenizer.json" in refusal(folder)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_damaged_or_missing_parts(name, tmp_path):
    tiny.gpt2(tmp_path)
    (tmp_path / name).write_text("} {\nx")
    assert str(tmp_path) in refusal(tmp_path)
    (tmp_path / name).unlink()
    assert str(tmp_path) in refusal(tmp_path)


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-5], lambda b: b"", lambda b: b"IQ== 0\nIg== 1\n", lambda b: b[3:]]
)
def test_a_damaged_sentencepiece_model(damage, tmp_path):
    tiny.llama(tmp_path)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(damage(path.read_bytes()))
    assert "tokenizer.model" in refusal(tmp_path)


def test_tokens_that_are_none(tmp_path):
    tiny.llama(tmp_path, added_tokens_decoder={"x": "y"})
    assert "tokenizer_config.json" in refusal(tmp_path)
    with pytest.raises(UserError, match="<image>"):
        tiny.gpt2(tmp_path)
        tiny.write(tmp_path, tokenizer_config={}, added_tokens={})
        HubTokenizer.load(tmp_path).token_to_id("<image>")
