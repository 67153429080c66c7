"""The classes of tokenizers that checkpoints name, each as a pipeline of the `tokenizers` library.

A class fixes how text is normalized and split; from a checkpoint it takes the vocabulary and a few settings, even
where a `tokenizer.json` says more. Facts from transformers 5.23, `models/*/tokenization_*.py` and `models/auto`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

WORD_START = "▁"  # how SentencePiece writes a space
Settings = Mapping[str, Any]  # what tokenizer_config.json says


@dataclass(frozen=True)
class Vocabulary:
    """What a class takes from a checkpoint's files."""

    tokens: (
        dict[str, int] | list[tuple[str, float]]
    )  # BPE: token -> id; unigram: (token, score), in the order of ids
    merges: list[tuple[str, str]]
    charsmap: bytes = b""  # SentencePiece's compiled normalization
    post_processor: Any = None  # of a tokenizer.json: which special tokens stand around a text


@dataclass(frozen=True)
class TokenizerClass:
    build: Callable[[Vocabulary, Settings, Mapping[str, str]], Tokenizer]
    special_tokens: Mapping[str, str]  # where no file says otherwise
    merges_file: bool = (
        True  # without a tokenizer.json: vocab.json and merges.txt; False: a SentencePiece model
    )
    around: tuple[str, str] | None = (
        None  # the special tokens that always stand before and after a text
    )
    end_of_word: str = ""  # what marks the end of a word in decoded text


def _gpt2(vocabulary: Vocabulary, settings: Settings, specials: Mapping[str, str]) -> Tokenizer:
    backend = Tokenizer(models.BPE(vocabulary.tokens, vocabulary.merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=bool(settings.get("add_prefix_space"))
    )
    backend.decoder = decoders.ByteLevel()
    return backend


QWEN2_WORDS = (  # contractions | word | digit | punctuation and line ends | line ends | spaces
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
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
    """A space is put before the first word, or, in the legacy form, also before what follows a special token."""
    backend = Tokenizer(
        models.BPE(vocabulary.tokens, vocabulary.merges, fuse_unk=True, byte_fallback=True)
    )
    prefix_space = settings.get("add_prefix_space") in (None, True)
    scheme = ("always" if settings.get("legacy") else "first") if prefix_space else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(WORD_START, scheme, split=False)
    steps = [decoders.Replace(WORD_START, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + [decoders.Strip(" ", left=1)] * prefix_space)
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


def _own(names: str) -> dict[str, str]:
    return {f"{name}_token": f"<{name}>" for name in names.split()}


ROBERTA = _same("bos cls", "<s>") | _same("eos sep", "</s>") | _own("unk pad mask")
XLM_ROBERTA = "XLMRobertaTokenizer"
LLAMA, QWEN2, GEMMA, GPT2, CLIP = (
    f"{name}Tokenizer" for name in ("Llama", "Qwen2", "Gemma", "GPT2", "CLIP")
)
KINDS = {
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
    GEMMA: TokenizerClass(_gemma, _own("unk bos eos pad mask"), merges_file=False),
    XLM_ROBERTA: TokenizerClass(
        _xlm_roberta, ROBERTA, merges_file=False, around=("bos_token", "eos_token")
    ),
}

# Model type -> the class of its tokenizer; None: whatever tokenizer.json describes.
OF_MODEL_TYPE = {
    "clip": CLIP,
    "fuyu": None,
    "gemma": GEMMA,
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "gemma3_text": GEMMA,
    "gpt2": GPT2,
    "llava": None,
    "mistral": None,
    "phi3": None,
    "qwen2": QWEN2,
    "trocr": XLM_ROBERTA,
}


def kind_of(
    model_type: str | None, declared: str | None, byte_level: bool
) -> TokenizerClass | None:
    """The class of a checkpoint's tokenizer; None: what `tokenizer.json` describes, as it stands there.

    Args:
      declared: `tokenizer_class` of tokenizer_config.json or config.json.
      byte_level: tokenizer.json works on bytes, as Llama 3's does, whose folders name Llama 2's class.
    """
    declared = declared and declared.removesuffix("Fast")
    own = OF_MODEL_TYPE.get(model_type, declared)
    name = (
        declared if declared and own is not None and model_type != "qwen2" else own
    )  # qwen2's name other classes
    return None if name == LLAMA and byte_level else KINDS.get(name)
