"""SentencePiece models: the pieces, and the settings that decide token ids.

A file is one protocol buffer, `ModelProto` of `sentencepiece_model.proto` in
https://github.com/google/sentencepiece. Only a few of its fields are needed, so they are parsed
here without a library.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vlm_jax.config import CheckpointError
from vlm_jax.hub.tensors.folder import read_bytes

# Types of pieces (the others: unknown 2, unused 5, byte 6) and algorithms (word 3, character 4).
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
UNIGRAM, BPE = 1, 2

# Fields of ModelProto, and the wire types of protocol buffers.
PIECES, TRAINER, NORMALIZER = 1, 2, 3
VARINT, EIGHT_BYTES, LENGTH_DELIMITED, FOUR_BYTES = 0, 1, 2, 5


@dataclass(frozen=True)
class Piece:
    text: str
    score: float = 0.0
    kind: int = NORMAL


@dataclass(frozen=True)
class SentencePieceModel:
    pieces: tuple[Piece, ...]  # ordered by id
    algorithm: int = UNIGRAM
    byte_fallback: bool = False
    charsmap: bytes = b""  # compiled normalization rules, in the format of `tokenizers` too
    unk_id: int = 0
    unk: str | None = "<unk>"  # None, here and below: the model has no such token
    bos: str | None = "<s>"
    eos: str | None = "</s>"


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Reads a `tokenizer.model`.

    Raises:
      CheckpointError: the file cannot be read, is truncated, or is not a SentencePiece model of the
        types unigram and BPE.
    """
    data = read_bytes(path)
    try:
        model = _parse_model(data)
    except (ValueError, IndexError, TypeError, AttributeError, struct.error):
        raise CheckpointError(f"{path} is damaged or not a SentencePiece model.") from None
    if not model.pieces or model.algorithm not in (UNIGRAM, BPE):
        raise CheckpointError(f"{path} is not a SentencePiece model of the types unigram and BPE.")
    return model


def _parse_model(data: bytes) -> SentencePieceModel:
    fields = list(_fields(data))
    messages = dict(fields)
    trainer = dict(_fields(messages.get(TRAINER, b"")))
    normalizer = dict(_fields(messages.get(NORMALIZER, b"")))
    return SentencePieceModel(
        pieces=tuple(_parse_piece(value) for number, value in fields if number == PIECES),
        algorithm=trainer.get(3, UNIGRAM),
        byte_fallback=bool(trainer.get(35, False)),
        charsmap=normalizer.get(2, b""),
        unk_id=trainer.get(40, 0),
        unk=_special(trainer, 40, 45, SentencePieceModel.unk),
        bos=_special(trainer, 41, 46, SentencePieceModel.bos),
        eos=_special(trainer, 42, 47, SentencePieceModel.eos),
    )


def _parse_piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    score = struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0
    return Piece(fields.get(1, b"").decode(), score, fields.get(3, NORMAL))


def _special(trainer: dict, id_field: int, text_field: int, default: str) -> str | None:
    if trainer.get(id_field, 0) < 0:
        return None
    return trainer.get(text_field, default.encode()).decode()


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of every field. Raises IndexError or ValueError if `data` is not valid."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == VARINT:
            value, position = _varint(data, position)
            # Negative numbers are stored as 64-bit two's complement.
            yield number, value - (1 << 64) if value >> 63 else value
            continue
        if wire_type == LENGTH_DELIMITED:
            length, position = _varint(data, position)
        else:
            length = {EIGHT_BYTES: 8, FOUR_BYTES: 4}.get(wire_type)
        if length is None or position + length > len(data):
            raise ValueError(f"no field of a protocol buffer at byte {position}")
        yield number, data[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """(number, position after it): seven bits per byte, lowest first."""
    number = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, position
    raise ValueError(f"a number of more than ten bytes at byte {position}")
