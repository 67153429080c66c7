"""Tokenizer classes that checkpoints name, each as a pipeline of the `tokenizers` library.

A class fixes how text is normalized and split. It takes the vocabulary and a few settings from the
checkpoint, and ignores the rest even if a `tokenizer.json` defines more.

Reference: transformers 5.23, `models/*/tokenization_*.py` and `models/auto`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

WORD_START = "▁"  # SentencePiece's symbol for a space
Settings = Mapping[str, Any]  # content of tokenizer_config.json


@dataclass(frozen=True)
class Vocabulary:
    """The parts of a checkpoint's files that a tokenizer class uses."""

    # BPE: token -> id; unigram: (token, score), ordered by id.
    tokens: dict[str, int] | list[tuple[str, float]]
    merges: list[tuple[str, str]]
    charsmap: bytes = b""  # SentencePiece's compiled normalization rules
    post_processor: Any = None  # from tokenizer.json: special tokens around a text


@dataclass(frozen=True)
class TokenizerClass:
    build: Callable[[Vocabulary, Settings, Mapping[str, str]], Tokenizer]
    special_tokens: Mapping[str, str]  # defaults, for tokens that no file names
    # Files without a tokenizer.json: vocab.json and merges.txt, or a SentencePiece model.
    merges_file: bool = True
    # Names of the special tokens before and after every text.
    around: tuple[str, str] | None = None
    end_of_word: str = ""  # end-of-word suffix in decoded text


def _gpt2(vocabulary: Vocabulary, settings: Settings, specials: Mapping[str, str]) -> Tokenizer:
    backend = Tokenizer(models.BPE(vocabulary.tokens, vocabulary.merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=bool(settings.get("add_prefix_space"))
    )
    backend.decoder = decoders.ByteLevel()
    return backend


# Contractions, words, digits, punctuation with line ends, line ends, spaces.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def _qwen2(vocabulary: Vocabulary, settings: Settings, specials: Mapping[str, str]) -> Tokenizer:
    backend = Tokenizer(models.BPE(vocabulary.tokens, vocabulary.merges))
    prefix_space = bool(settings.get("add_prefix_space"))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


CLIP_END_OF_WORD = "</w>"
CLIP_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


def _clip(vocabulary: Vocabulary, settings: Settings, specials: Mapping[str, str]) -> Tokenizer:
    bpe = models.BPE(
        vocabulary.tokens,
        vocabulary.merges,
        end_of_word_suffix=CLIP_END_OF_WORD,
        unk_token=specials.get("unk_token"),
    )
    backend = Tokenizer(bpe)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _llama(vocabulary: Vocabulary, settings: Settings, specials: Mapping[str, str]) -> Tokenizer:
    """A space precedes the first word and, in the legacy form, every text after a special token."""
    backend = Tokenizer(
        models.BPE(vocabulary.tokens, vocabulary.merges, fuse_unk=True, byte_fallback=True)
    )
    prefix_space = settings.get("add_prefix_space") in (None, True)
    scheme = "never"
    if prefix_space:
        scheme = "always" if settings.get("legacy") else "first"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(WORD_START, scheme, split=False)
    steps = [decoders.Replace(WORD_START, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix_space:
        steps.append(decoders.Strip(" ", left=1))
    backend.decoder = decoders.Sequence(steps)
    return backend


def _gemma(vocabulary: Vocabulary, settings: Settings, specials: Mapping[str, str]) -> Tokenizer:
    bpe = models.BPE(
        vocabulary.tokens,
        vocabulary.merges,
        fuse_unk=True,
        unk_token=specials.get("unk_token"),
        byte_fallback=True,
    )
    backend = Tokenizer(bpe)
    backend.normalizer = normalizers.Replace(" ", WORD_START)
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence(
        [decoders.Replace(WORD_START, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return backend


def _xlm_roberta(
    vocabulary: Vocabulary, settings: Settings, specials: Mapping[str, str]
) -> Tokenizer:
    backend = Tokenizer(models.Unigram(vocabulary.tokens, unk_id=3))
    if vocabulary.charsmap:
        backend.normalizer = normalizers.Precompiled(vocabulary.charsmap)
    scheme = "always" if settings.get("add_prefix_space", True) else "never"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(WORD_START, scheme)]
    )
    backend.decoder = decoders.Metaspace(WORD_START, scheme)
    return backend


def _same(names: str, token: str) -> dict[str, str]:
    return {f"{name}_token": token for name in names.split()}


def _named(names: str) -> dict[str, str]:
    return {f"{name}_token": f"<{name}>" for name in names.split()}


ROBERTA = _same("bos cls", "<s>") | _same("eos sep", "</s>") | _named("unk pad mask")
LLAMA, QWEN2, GEMMA = "LlamaTokenizer", "Qwen2Tokenizer", "GemmaTokenizer"
GPT2, CLIP, XLM_ROBERTA = "GPT2Tokenizer", "CLIPTokenizer", "XLMRobertaTokenizer"
CLASSES = {
    GPT2: TokenizerClass(_gpt2, _same("unk bos eos", "<|endoftext|>")),
    "RobertaTokenizer": TokenizerClass(_gpt2, ROBERTA, around=("cls_token", "sep_token")),
    QWEN2: TokenizerClass(_qwen2, _same("unk eos pad", "<|endoftext|>")),
    CLIP: TokenizerClass(
        _clip,
        _same("unk eos pad", "<|endoftext|>") | _same("bos", "<|startoftext|>"),
        around=("bos_token", "eos_token"),
        end_of_word=CLIP_END_OF_WORD,
    ),
    LLAMA: TokenizerClass(
        _llama, {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}, merges_file=False
    ),
    GEMMA: TokenizerClass(_gemma, _named("unk bos eos pad mask"), merges_file=False),
    XLM_ROBERTA: TokenizerClass(
        _xlm_roberta, ROBERTA, merges_file=False, around=("bos_token", "eos_token")
    ),
}

# Model type -> tokenizer class; None: the pipeline of tokenizer.json as it is.
CLASS_OF_MODEL_TYPE = {
    "clip": CLIP,
    "fuyu": None,
    "gemma": GEMMA,
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "gemma3_text": GEMMA,
    "gpt2": GPT2,
    "internvl": QWEN2,
    "llava": None,
    "llava_next": None,
    "mistral": None,
    "mistral3": None,
    "olmo2": None,
    "phi3": None,
    "qwen2": QWEN2,
    "qwen2_5_vl": QWEN2,
    "qwen2_vl": QWEN2,
    "qwen3": QWEN2,
    "qwen3_vl": QWEN2,
    "smolvlm": None,
    "trocr": XLM_ROBERTA,
}


def tokenizer_class(
    model_type: str | None, declared: str | None, is_byte_level: bool
) -> TokenizerClass | None:
    """Tokenizer class of a checkpoint; None: use the pipeline of `tokenizer.json` as it is.

    Args:
      declared: `tokenizer_class` of tokenizer_config.json or config.json.
      is_byte_level: tokenizer.json describes a byte-level pipeline.
    """
    declared = declared and declared.removesuffix("Fast")
    name = CLASS_OF_MODEL_TYPE.get(model_type, declared)
    # A declared class overrides that of the model type, except in Qwen2 folders, which name others.
    if declared and name is not None and model_type != "qwen2":
        name = declared
    # Llama 3's folders name Llama 2's class, but their tokenizer is a byte-level BPE.
    if name == LLAMA and is_byte_level:
        return None
    return CLASSES.get(name)
