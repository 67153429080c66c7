"""Folders with a tiny tokenizer of every kind, as checkpoints have them."""

import functools
import json
import tempfile
from pathlib import Path

import sentencepiece
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = 20 * [
    "a photo of the cat that sat on the mat, isn't it? yes!",
    "the naïve café is at 1234 high street; what colour is the sky?",
    "hello  world,\n\nthis is    a longer line\twith a tab. it's red, they've seen it",
    "User: describe the image\nAssistant: a red car in the street",
]
UNNAMED = "additional_special_tokens"


def write(folder: Path, **files: dict) -> Path:
    """Files of JSON, by their names without the ending."""
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def token(text: str, **flags: bool) -> dict:
    defaults = {
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "single_word": False,
        "special": True,
    }
    return {"content": text, **defaults, **flags}


# ---- vocabularies


@functools.cache
def _byte_level(specials: tuple[str, ...], end_of_word: str) -> str:
    backend = Tokenizer(models.BPE(end_of_word_suffix=end_of_word))
    backend.normalizer = normalizers.Lowercase() if end_of_word else None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=list(specials),
        initial_alphabet=alphabet,
        show_progress=False,
        end_of_word_suffix=end_of_word,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend.to_str()


def byte_level(*specials: str, end_of_word: str = "") -> Tokenizer:
    return Tokenizer.from_str(_byte_level(specials, end_of_word))


@functools.cache
def _sentencepiece(kind: str, options: tuple) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS),
            model_prefix=f"{folder}/m",
            vocab_size=420,
            hard_vocab_limit=False,
            model_type=kind,
            character_coverage=0.98,  # rare characters are left to the bytes
            minloglevel=2,
            **dict(options),
        )
        return Path(folder, "m.model").read_bytes()


def sentencepiece_model(path: Path, kind: str = "bpe", **options) -> None:
    """Trains a model with Llama 2's options, unless others are given."""
    options = {
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "split_digits": True,
    } | options
    options = {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True} | options
    path.write_bytes(_sentencepiece(kind, tuple(sorted(options.items()))))


# ---- folders


def gpt2(folder: Path) -> None:
    byte_level("<|endoftext|>").model.save(str(folder))
    write(folder, config={"model_type": "gpt2"})


def gpt2_whole(folder: Path) -> None:
    byte_level("<|endoftext|>").save(str(folder / "tokenizer.json"))
    write(
        folder, config={"model_type": "gpt2"}, tokenizer_config={"tokenizer_class": "GPT2Tokenizer"}
    )


def gpt2_with_older_files(folder: Path) -> None:
    byte_level("<|endoftext|>").model.save(str(folder))
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "add_prefix_space": True}
    write(
        folder,
        config={
            "model_type": "vision-encoder-decoder",
            "encoder": {"model_type": "vit"},
            "decoder": {},
        },
        tokenizer_config=settings | {"clean_up_tokenization_spaces": True},
        special_tokens_map={
            "pad_token": token("<pad>"),
            "unk_token": "<unk>",
            UNNAMED: ["<|im_start|>"],
        },
        added_tokens={"<image>": 702, "<pad>": 700, "<|image|>": 701},
    )


def opt(folder: Path, model_type: str = "opt") -> None:
    """GPT-2's, with a beginning of text that has the name of its end."""
    byte_level("<s>", "<pad>", "</s>", "<unk>").model.save(str(folder))
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "errors": "replace"}
    write(folder, config={"model_type": model_type}, tokenizer_config=settings | special)


def roberta(folder: Path) -> None:
    """TrOCR's."""
    byte_level("<s>", "<pad>", "</s>", "<unk>", "<mask>").model.save(str(folder))
    config = {"model_type": "vision-encoder-decoder", "encoder": {"model_type": "vit"}}
    config |= {"decoder": {"model_type": "trocr", "eos_token_id": 2}}
    write(folder, config=config, tokenizer_config={"tokenizer_class": "RobertaTokenizer"})


def clip(folder: Path) -> None:
    byte_level("<|startoftext|>", "<|endoftext|>", end_of_word="</w>").model.save(str(folder))
    write(
        folder, config={"model_type": "clip"}, tokenizer_config={"tokenizer_class": "CLIPTokenizer"}
    )


def clip_whole(folder: Path) -> None:
    """As OpenCLIP's folders have it: without transformers' config."""
    byte_level("<|startoftext|>", "<|endoftext|>", end_of_word="</w>").save(
        str(folder / "tokenizer.json")
    )
    write(folder, tokenizer_config={"tokenizer_class": "CLIPTokenizerFast", "pad_token": "!"})


def qwen2(folder: Path, model_type: str = "qwen2", eos: str = "<|im_start|>") -> None:
    byte_level("<|endoftext|>").model.save(str(folder))
    added = {
        "0": token("<|endoftext|>"),
        "700": token("<|im_start|>"),
        "701": token("<image>", special=False),
        "702": token("<|im_end|>"),
    }
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": added,
        "bos_token": None,
    }
    settings |= {
        "eos_token": eos,
        "pad_token": "<|endoftext|>",
        UNNAMED: ["<|im_start|>"],
    }
    write(folder, config={"model_type": model_type}, tokenizer_config=settings)


def qwen3(folder: Path) -> None:
    qwen2(folder, "qwen3", "<|im_end|>")


def olmo2(folder: Path) -> None:
    """It names GPT-2's class, but splits text in another way."""
    backend = byte_level("<|endoftext|>")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
    write(folder, config={"model_type": "olmo2"}, tokenizer_config=settings)


def idefics3(folder: Path) -> None:
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]
    specials = ("<|im_start|>", "<|im_end|>", "<image>", "<fake_token_around_image>")
    byte_level(*specials, "<end_of_utterance>", "<global-img>", *tiles).save(
        str(folder / "tokenizer.json")
    )
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": "<|im_start|>",
        "eos_token": "<end_of_utterance>",
        "pad_token": "<|im_end|>",
    }
    write(folder, config={"model_type": "idefics3"}, tokenizer_config=settings)


def internvl(folder: Path) -> None:
    qwen3(folder)
    names = {
        "context_image_token": "<IMG_CONTEXT>",
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "video_token": "<video>",
    }
    settings = read(folder, "tokenizer_config")
    added = {str(i): token(text) for i, text in enumerate(names.values(), start=703)}
    settings["added_tokens_decoder"] |= added
    settings["extra_special_tokens"] = names
    write(folder, config={"model_type": "internvl"}, tokenizer_config=settings)


def qwen2_vl(folder: Path) -> None:
    qwen3(folder)
    names = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    settings = read(folder, "tokenizer_config")
    settings["added_tokens_decoder"] |= {str(i): token(x) for i, x in enumerate(names, start=703)}
    write(folder, config={"model_type": "qwen2_5_vl"}, tokenizer_config=settings)


def llama3(folder: Path, model_type: str = "llama") -> None:
    specials = (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
    )
    backend = byte_level(*specials, "<|image|>")
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    backend.save(str(folder / "tokenizer.json"))
    named = {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "pad_token": "<|end_of_text|>",
    }
    write(
        folder,
        config={"model_type": model_type, "eos_token_id": 1},
        generation_config={"eos_token_id": [1, 2]},
        tokenizer_config={
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": False,
            **named,
        },
    )


def mistral3(folder: Path) -> None:
    names = ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
    byte_level("<s>", "</s>", "<pad>", "[IMG]", "[IMG_BREAK]", "[IMG_END]", *names).save(
        str(folder / "tokenizer.json")
    )
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    write(folder, config={"model_type": "mistral3"}, tokenizer_config=settings)


def llama3_called_llama(folder: Path) -> None:
    llama3(folder)
    write(
        folder,
        tokenizer_config={"tokenizer_class": "LlamaTokenizer", "bos_token": "<|begin_of_text|>"},
    )


def llama(folder: Path, config: dict | None = None, **settings) -> None:
    sentencepiece_model(folder / "tokenizer.model")
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "pad_token": "<pad>",
    } | settings
    write(folder, config=config or {"model_type": "llama"}, tokenizer_config=settings)
    write(folder, added_tokens={"<image>": 420, "<pad>": 421})


def llama_legacy(folder: Path) -> None:
    llama(
        folder,
        legacy=True,
        add_eos_token=True,
        unk_token={"__type": "AddedToken", **token("<unk>")},
    )


def llama_without_prefix_space(folder: Path) -> None:
    llama(folder, add_prefix_space=False)


def llava(folder: Path) -> None:
    """A SentencePiece model, one of whose pieces is replaced by a later token."""
    added = {
        "1": token("<s>"),
        "2": token("</s>"),
        "3": token("<|image|>"),
        "420": token("<image>"),
    }
    llama(folder, {"model_type": "llava"}, added_tokens_decoder=added, image_token="<image>")


def phi3(folder: Path) -> None:
    """Tokens that take the spaces around them along."""
    added = {
        "1": token("<s>"),
        "2": token("</s>", rstrip=True, special=False),
        "420": token("<unused>"),
    }
    added |= {
        "421": token("<|endoftext|>", rstrip=True),
        "422": token("<|im_start|>", rstrip=True, lstrip=True),
    }
    llama(
        folder,
        {"model_type": "phi3"},
        added_tokens_decoder=added,
        eos_token="<|endoftext|>",
        pad_token="</s>",
    )


def mistral_unigram(folder: Path) -> None:
    """Without a token for the start."""
    ids = {"bos_id": -1, "eos_id": 1}
    sentencepiece_model(
        folder / "tokenizer.model", "unigram", normalization_rule_name="nmt_nfkc", **ids
    )
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_eos_token": True,
        "clean_up_tokenization_spaces": True,
    }
    write(folder, config={"model_type": "mistral"}, tokenizer_config=settings)


def gemma(folder: Path, **settings) -> None:
    names = ("pad", "eos", "bos", "unk")
    own = {f"{name}_piece": f"<{name}>" for name in names} | {
        f"{name}_id": i for i, name in enumerate(names)
    }
    symbols = "<mask>,\n,\n\n,▁▁,▁▁▁,<start_of_turn>,<end_of_turn>"
    sentencepiece_model(
        folder / "tokenizer.model", add_dummy_prefix=False, user_defined_symbols=symbols, **own
    )
    settings = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True} | settings
    write(folder, config={"model_type": "gemma"}, tokenizer_config=settings)


def gemma3(folder: Path) -> None:
    names = {
        "boi_token": "<start_of_image>",
        "image_token": "<image_soft_token>",
        "eoi_token": "<end_of_image>",
    }
    added = {str(i): token(text) for i, text in enumerate(names.values(), start=450)}
    gemma(folder, added_tokens_decoder=added, extra_special_tokens=names)


def xlm_roberta(folder: Path) -> None:
    """TrOCR's small ones."""
    path = folder / "sentencepiece.bpe.model"
    sentencepiece_model(path, "unigram", normalization_rule_name="nmt_nfkc", byte_fallback=False)
    write(
        folder,
        config={"model_type": "trocr"},
        tokenizer_config={"tokenizer_class": "XLMRobertaTokenizer"},
    )


def wordpiece(folder: Path) -> None:
    """Nothing but a tokenizer.json and its settings; padding and truncation in it are not ours."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = (
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
    )
    backend.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[UNK]", "[PAD]"], show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.enable_padding(length=12, pad_id=1)
    backend.enable_truncation(3)
    backend.save(str(folder / "tokenizer.json"))
    new = {"mask_token": "[MASK]", "sep_token": "[SEP]"}
    write(
        folder,
        tokenizer_config=new | {"clean_up_tokenization_spaces": True, "split_special_tokens": True},
    )
