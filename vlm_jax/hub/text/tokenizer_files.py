"""The files of a checkpoint's tokenizer -> a pipeline of the `tokenizers` library.

tokenizer.json                all of a pipeline; a class of `KINDS` takes the vocabulary of it
vocab.json and merges.txt     the vocabulary of a byte-level BPE
tokenizer.model               SentencePiece's
tokenizer_config.json, ...    settings, and tokens beside the vocabulary
"""

import base64
import contextlib
import json
import os
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from vlm_jax.config import CheckpointError, UserError
from vlm_jax.hub.tensors.folder import read_bytes
from vlm_jax.hub.text.sentencepiece import (
    BPE,
    CONTROL,
    USER_DEFINED,
    SentencePieceModel,
    read_sentencepiece,
)
from vlm_jax.hub.text.special_tokens import (
    TOKENIZER,
    TOKENIZER_CONFIG,
    SpecialTokens,
    add_special_tokens,
    read_if_there,
    read_special_tokens,
    set_template,
    to_token,
)
from vlm_jax.hub.text.tokenizer_classes import (
    KINDS,
    WORD_START,
    XLM_ROBERTA,
    TokenizerClass,
    Vocabulary,
    kind_of,
)

CONFIG, VOCAB, MERGES = "config.json", "vocab.json", "merges.txt"
SENTENCEPIECE = ("tokenizer.model", "sentencepiece.bpe.model")
ENDS = ("bos_token", "eos_token")


def read_pipeline(folder: Path) -> tuple[Tokenizer, SpecialTokens, TokenizerClass | None]:
    """The tokenizer of a folder, its special tokens, and its class, if it is one of `KINDS`.

    Raises:
      CheckpointError: there is no tokenizer in the folder, or a file of it is damaged or does not fit its class.
    """
    settings, config = read_if_there(folder / TOKENIZER_CONFIG), read_if_there(folder / CONFIG)
    whole = read_if_there(folder / TOKENIZER)
    special = read_special_tokens(folder, settings, whole)
    declared = settings.get("tokenizer_class") or config.get("tokenizer_class")
    kind = kind_of(str(config.get("model_type")), declared and str(declared), _is_byte_level(whole))
    with _naming(folder / TOKENIZER if whole else folder):
        if kind:
            defaults = {name: to_token(text) for name, text in kind.special_tokens.items()}
            special.named = defaults | special.named
            vocabulary = _of_whole(whole) if whole else _of_parts(folder, kind, special)
            backend = kind.build(vocabulary, settings, special.texts)
            backend.post_processor = vocabulary.post_processor
        elif whole:
            backend = Tokenizer.from_file(str(folder / TOKENIZER))
            if backend.padding:
                special.named.setdefault("pad_token", to_token(backend.padding["pad_token"]))
        else:
            backend = _as_sentencepiece(folder, special)
        add_special_tokens(backend, special)
        if kind and kind.around:
            set_template(backend, *map(special.texts.get, kind.around))
        elif not whole:
            set_template(
                backend,
                *(
                    special.texts.get(name) if settings.get(f"add_{name}") else None
                    for name in ENDS
                ),
            )
    backend.encode_special_tokens = bool(settings.get("split_special_tokens"))
    return backend, special, kind


@contextlib.contextmanager
def _naming(path: Path):
    """The library raises bare Exceptions; they become one sentence that names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise CheckpointError(f"{path} holds no tokenizer that can be read: {reason}.") from None


def _is_byte_level(whole: dict) -> bool:
    return '"ByteLevel"' in json.dumps([whole.get("pre_tokenizer"), whole.get("decoder")])


def _of_whole(whole: dict) -> Vocabulary:
    """The vocabulary of a tokenizer.json; merges are pairs there, or, before `tokenizers` 0.20, joined by a space."""
    model, normalizer = whole["model"], whole.get("normalizer") or {}
    tokens = (
        model["vocab"]
        if isinstance(model["vocab"], dict)
        else [tuple(pair) for pair in model["vocab"]]
    )
    merges = [
        tuple(pair.split(" ") if isinstance(pair, str) else pair)
        for pair in model.get("merges", [])
    ]
    steps = normalizer.get("normalizers", [normalizer])
    charsmap = next(
        (step["precompiled_charsmap"] for step in steps if step.get("type") == "Precompiled"), ""
    )
    without_words = {"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}
    frame = Tokenizer.from_str(json.dumps(whole | without_words))
    return Vocabulary(tokens, merges, base64.b64decode(charsmap), frame.post_processor)


def _of_parts(folder: Path, kind: TokenizerClass, special: SpecialTokens) -> Vocabulary:
    """The vocabulary that a class has without a tokenizer.json."""
    if kind.merges_file and os.path.isfile(folder / VOCAB):
        for name in (VOCAB, MERGES):
            read_bytes(folder / name)  # names a file that is missing or a Git LFS pointer
        return Vocabulary(*models.BPE.read_file(str(folder / VOCAB), str(folder / MERGES)))
    model = _sentencepiece(folder)
    _list_pieces(model, special)
    if kind is not KINDS[XLM_ROBERTA]:
        return _joining([piece.text for piece in model.pieces])
    texts = special.texts
    first = [
        (texts[f"{name}_token"], 0.0) for name in ("bos", "pad", "eos", "unk")
    ]  # in the place of the first three
    scored = [(piece.text, piece.score) for piece in model.pieces[3:]]
    return Vocabulary([*first, *scored, (texts["mask_token"], 0.0)], [], model.charsmap)


def _sentencepiece(folder: Path) -> SentencePieceModel:
    found = next((folder / name for name in SENTENCEPIECE if os.path.isfile(folder / name)), None)
    if found is None:
        raise CheckpointError(
            f"{folder} holds no tokenizer: there is no {TOKENIZER}, no {' or '.join(SENTENCEPIECE)}, and no {VOCAB} "
            f"with {MERGES} whose tokenizer_class, in {TOKENIZER_CONFIG}, is one of "
            f"{', '.join(name for name, kind in KINDS.items() if kind.merges_file)}."
        )
    return read_sentencepiece(found)


def _list_pieces(model: SentencePieceModel, special: SpecialTokens) -> None:
    """A model's control and user-defined pieces are found in a text, unless a file lists such tokens."""
    if special.unnamed is None:
        special.unnamed = [
            AddedToken(piece.text, normalized=False, special=piece.kind == CONTROL)
            for piece in model.pieces
            if piece.kind in (CONTROL, USER_DEFINED)
        ]


def _joining(pieces: list[str]) -> Vocabulary:
    """SentencePiece's BPE joins whatever makes the earliest piece; merges say which two parts those can be."""
    tokens = {piece: number for number, piece in enumerate(pieces)}
    pairs = ((piece[:cut], piece[cut:]) for piece in tokens for cut in range(1, len(piece)))
    return Vocabulary(
        tokens, [(left, right) for left, right in pairs if left in tokens and right in tokens]
    )


def _as_sentencepiece(folder: Path, special: SpecialTokens) -> Tokenizer:
    """A SentencePiece model whose checkpoint names none of `KINDS`; no space is put before the first word."""
    model = _sentencepiece(folder)
    texts = {"bos_token": model.bos, "eos_token": model.eos, "unk_token": model.unk}
    special.named = {
        name: to_token(text) for name, text in texts.items() if text is not None
    } | special.named
    _list_pieces(model, special)
    backend = Tokenizer(_bpe(model, special) if model.algorithm == BPE else _unigram(model))
    steps = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", WORD_START)])
    steps = [decoders.ByteFallback(), decoders.Fuse()] if model.byte_fallback else []
    backend.decoder = decoders.Sequence([decoders.Replace(WORD_START, " "), *steps])
    return backend


def _bpe(model: SentencePieceModel, special: SpecialTokens) -> models.BPE:
    """Tokens that were added later may stand in the place of pieces that the model kept free."""
    pieces = [piece.text for piece in model.pieces]
    for number, token in special.added.items():
        if number < len(pieces) and str(token) not in pieces:
            pieces[number] = str(token)
    vocabulary = _joining(pieces)
    return models.BPE(
        vocabulary.tokens,
        vocabulary.merges,
        unk_token=model.unk,
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
    )


def _unigram(model: SentencePieceModel) -> models.Unigram:
    scored = [(piece.text, piece.score) for piece in model.pieces]
    return models.Unigram(scored, unk_id=model.unk_id, byte_fallback=model.byte_fallback)
