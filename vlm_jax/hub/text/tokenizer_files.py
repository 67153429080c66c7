"""Builds a pipeline of the `tokenizers` library from the files of a checkpoint.

tokenizer.json                a complete pipeline; a class of `CLASSES` takes only its vocabulary
vocab.json and merges.txt     vocabulary of a byte-level BPE
tokenizer.model               SentencePiece model
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
    read_json_if_exists,
    read_special_tokens,
    set_template,
    to_token,
)
from vlm_jax.hub.text.tokenizer_classes import (
    CLASSES,
    WORD_START,
    XLM_ROBERTA,
    TokenizerClass,
    Vocabulary,
    tokenizer_class,
)

CONFIG, VOCAB, MERGES = "config.json", "vocab.json", "merges.txt"
SENTENCEPIECE = ("tokenizer.model", "sentencepiece.bpe.model")


def read_pipeline(folder: Path) -> tuple[Tokenizer, SpecialTokens, TokenizerClass | None]:
    """Returns the tokenizer of a folder, its special tokens and its class, if that is in `CLASSES`.

    Raises:
      CheckpointError: the folder has no tokenizer, or a file is damaged or does not fit its class.
    """
    settings = read_json_if_exists(folder / TOKENIZER_CONFIG)
    config = read_json_if_exists(folder / CONFIG)
    tokenizer_json = read_json_if_exists(folder / TOKENIZER)
    special = read_special_tokens(folder, settings, tokenizer_json)
    declared = settings.get("tokenizer_class") or config.get("tokenizer_class")
    known_class = tokenizer_class(
        str(config.get("model_type")), declared and str(declared), _is_byte_level(tokenizer_json)
    )
    with _errors_name(folder / TOKENIZER if tokenizer_json else folder):
        if known_class:
            defaults = {name: to_token(text) for name, text in known_class.special_tokens.items()}
            special.named = defaults | special.named
            if tokenizer_json:
                vocabulary = _from_tokenizer_json(tokenizer_json)
            else:
                vocabulary = _from_vocabulary_files(folder, known_class, special)
            backend = known_class.build(vocabulary, settings, special.texts)
            backend.post_processor = vocabulary.post_processor
        elif tokenizer_json:
            backend = Tokenizer.from_file(str(folder / TOKENIZER))
            if backend.padding:
                special.named.setdefault("pad_token", to_token(backend.padding["pad_token"]))
        else:
            backend = _from_sentencepiece(folder, special)
        add_special_tokens(backend, special)
        # Of the class, else of tokenizer.json, else of the settings.
        if known_class and known_class.around:
            set_template(backend, *map(special.texts.get, known_class.around))
        elif not tokenizer_json:
            bos = special.texts.get("bos_token") if settings.get("add_bos_token") else None
            eos = special.texts.get("eos_token") if settings.get("add_eos_token") else None
            set_template(backend, bos, eos)
    backend.encode_special_tokens = bool(settings.get("split_special_tokens"))
    return backend, special, known_class


@contextlib.contextmanager
def _errors_name(path: Path):
    """Re-raises the bare Exceptions of the `tokenizers` library with the file name."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise CheckpointError(f"cannot read the tokenizer in {path}: {reason}.") from None


def _is_byte_level(tokenizer_json: dict) -> bool:
    parts = [tokenizer_json.get("pre_tokenizer"), tokenizer_json.get("decoder")]
    return '"ByteLevel"' in json.dumps(parts)


def _from_tokenizer_json(tokenizer_json: dict) -> Vocabulary:
    """Vocabulary of a tokenizer.json; before `tokenizers` 0.20, merges were pairs in one string."""
    model = tokenizer_json["model"]
    tokens = model["vocab"]
    if not isinstance(tokens, dict):
        tokens = [tuple(pair) for pair in tokens]
    merges = [
        tuple(pair.split(" ") if isinstance(pair, str) else pair)
        for pair in model.get("merges", [])
    ]
    normalizer = tokenizer_json.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    charsmaps = [
        step["precompiled_charsmap"] for step in steps if step.get("type") == "Precompiled"
    ]
    charsmap = charsmaps[0] if charsmaps else ""
    # The library parses the post-processor only as part of a pipeline.
    empty_model = {"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}
    pipeline = Tokenizer.from_str(json.dumps(tokenizer_json | empty_model))
    return Vocabulary(tokens, merges, base64.b64decode(charsmap), pipeline.post_processor)


def _from_vocabulary_files(
    folder: Path, known_class: TokenizerClass, special: SpecialTokens
) -> Vocabulary:
    """Vocabulary of a class without a tokenizer.json."""
    if known_class.merges_file and os.path.isfile(folder / VOCAB):
        # read_bytes() names a file that is missing or a Git LFS pointer.
        for name in (VOCAB, MERGES):
            read_bytes(folder / name)
        return Vocabulary(*models.BPE.read_file(str(folder / VOCAB), str(folder / MERGES)))
    model = _read_sentencepiece(folder)
    _list_pieces(model, special)
    if known_class is not CLASSES[XLM_ROBERTA]:
        return _with_merges([piece.text for piece in model.pieces])
    # fairseq's ids: four special tokens replace the first three pieces, and <mask> is the last.
    texts = special.texts
    first = [(texts[f"{name}_token"], 0.0) for name in ("bos", "pad", "eos", "unk")]
    scored = [(piece.text, piece.score) for piece in model.pieces[3:]]
    return Vocabulary([*first, *scored, (texts["mask_token"], 0.0)], [], model.charsmap)


def _read_sentencepiece(folder: Path) -> SentencePieceModel:
    path = next((folder / name for name in SENTENCEPIECE if os.path.isfile(folder / name)), None)
    if path is None:
        with_merges = [name for name, known_class in CLASSES.items() if known_class.merges_file]
        raise CheckpointError(
            f"{folder} has no tokenizer: add {TOKENIZER}, {' or '.join(SENTENCEPIECE)}, or {VOCAB} "
            f"and {MERGES} with a tokenizer_class in {TOKENIZER_CONFIG} "
            f"(one of {', '.join(with_merges)})."
        )
    return read_sentencepiece(path)


def _list_pieces(model: SentencePieceModel, special: SpecialTokens) -> None:
    """Adds a model's control and user-defined pieces as tokens, unless a file lists such tokens."""
    if special.unnamed is None:
        special.unnamed = [
            AddedToken(piece.text, normalized=False, special=piece.kind == CONTROL)
            for piece in model.pieces
            if piece.kind in (CONTROL, USER_DEFINED)
        ]


def _with_merges(pieces: list[str]) -> Vocabulary:
    """Adds merges to SentencePiece's BPE pieces, which have none.

    SentencePiece merges any two pieces that form a piece, the one with the lowest id first. That is
    BPE with a merge for every split of every piece into two pieces.
    """
    tokens = {piece: number for number, piece in enumerate(pieces)}
    merges = []
    for piece in tokens:
        splits = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        merges += [(left, right) for left, right in splits if left in tokens and right in tokens]
    return Vocabulary(tokens, merges)


def _from_sentencepiece(folder: Path, special: SpecialTokens) -> Tokenizer:
    """Pipeline of a SentencePiece model of no class in `CLASSES`; adds no space to the start."""
    model = _read_sentencepiece(folder)
    texts = {"bos_token": model.bos, "eos_token": model.eos, "unk_token": model.unk}
    tokens = {name: to_token(text) for name, text in texts.items() if text is not None}
    special.named = tokens | special.named
    _list_pieces(model, special)
    backend = Tokenizer(_bpe(model, special) if model.algorithm == BPE else _unigram(model))
    steps = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", WORD_START)])
    steps = [decoders.ByteFallback(), decoders.Fuse()] if model.byte_fallback else []
    backend.decoder = decoders.Sequence([decoders.Replace(WORD_START, " "), *steps])
    return backend


def _bpe(model: SentencePieceModel, special: SpecialTokens) -> models.BPE:
    """BPE of the pieces; tokens added later replace reserved pieces that have their ids."""
    pieces = [piece.text for piece in model.pieces]
    for number, token in special.added.items():
        if number < len(pieces) and str(token) not in pieces:
            pieces[number] = str(token)
    vocabulary = _with_merges(pieces)
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
