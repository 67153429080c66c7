"""SentencePiece models: the pieces, and the few settings beside them that decide about token ids.

A file is one protocol buffer, `ModelProto` of `sentencepiece_model.proto` in https://github.com/google/sentencepiece,
of which a handful of fields matters here; reading them needs no library.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vlm_jax.config import CheckpointError
from vlm_jax.hub.tensors.folder import read_bytes

NORMAL, CONTROL, USER_DEFINED = (
    1,
    3,
    4,
)  # kinds of pieces; the others are unknown 2, unused 5, byte 6
UNIGRAM, BPE = 1, 2  # algorithms; the others are words 3 and characters 4

PIECES, TRAINER, NORMALIZER = 1, 2, 3  # fields of ModelProto
VARINT, EIGHT_BYTES, LENGTH_DELIMITED, FOUR_BYTES = 0, 1, 2, 5  # the wire types of protocol buffers


@dataclass(frozen=True)
class Piece:
    text: str
    score: float = 0.0
    kind: int = NORMAL


@dataclass(frozen=True)
class SentencePieceModel:
    pieces: tuple[Piece, ...]  # in the order of their ids
    algorithm: int = UNIGRAM
    byte_fallback: bool = False
    charsmap: bytes = b""  # the compiled normalization, which the `tokenizers` library reads too
    unk_id: int = 0
    unk: str | None = "<unk>"  # None, here and below: there is no such token
    bos: str | None = "<s>"
    eos: str | None = "</s>"


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Reads a `tokenizer.model`.

    Raises:
      CheckpointError: the file cannot be read, is cut short, or is no SentencePiece model of the kinds unigram and BPE.
    """
    data = read_bytes(path)
    try:
        model = _model(data)
    except (ValueError, IndexError, TypeError, AttributeError, struct.error):
        raise CheckpointError(f"{path} is damaged, or no SentencePiece model.") from None
    if not model.pieces or model.algorithm not in (UNIGRAM, BPE):
        raise CheckpointError(f"{path} is no SentencePiece model of the kinds unigram and BPE.")
    return model


def _model(data: bytes) -> SentencePieceModel:
    fields = list(_fields(data))
    trainer, normalizer = (
        dict(_fields(dict(fields).get(number, b""))) for number in (TRAINER, NORMALIZER)
    )
    return SentencePieceModel(
        pieces=tuple(_piece(value) for number, value in fields if number == PIECES),
        algorithm=trainer.get(3, UNIGRAM),
        byte_fallback=bool(trainer.get(35, False)),
        charsmap=normalizer.get(2, b""),
        unk_id=trainer.get(40, 0),
        unk=_special(trainer, 40, 45, SentencePieceModel.unk),
        bos=_special(trainer, 41, 46, SentencePieceModel.bos),
        eos=_special(trainer, 42, 47, SentencePieceModel.eos),
    )


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    score = struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0
    return Piece(fields.get(1, b"").decode(), score, fields.get(3, NORMAL))


def _special(trainer: dict, id_field: int, text_field: int, default: str) -> str | None:
    return (
        None if trainer.get(id_field, 0) < 0 else trainer.get(text_field, default.encode()).decode()
    )


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of every field of a protocol buffer; IndexError or ValueError where it is none."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        if key & 7 == VARINT:
            value, position = _varint(data, position)
            yield key >> 3, value - (1 << 64) if value >> 63 else value
            continue
        lengths = {EIGHT_BYTES: 8, FOUR_BYTES: 4}
        length, position = (
            _varint(data, position)
            if key & 7 == LENGTH_DELIMITED
            else (lengths.get(key & 7), position)
        )
        if length is None or position + length > len(data):
            raise ValueError(f"no field of a protocol buffer at byte {position}")
        yield key >> 3, data[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A number, seven bits a byte, the lowest first, and the position behind it."""
    number = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, position
    raise ValueError(f"a number of more than ten bytes at byte {position}")
