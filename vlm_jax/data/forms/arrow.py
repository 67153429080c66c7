"""Folders that `datasets.save_to_disk` writes: state.json, dataset_info.json and Arrow streams.

Source: datasets 5.2, `Dataset.save_to_disk` and `DatasetDict.save_to_disk`.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from vlm_jax.config import DataError
from vlm_jax.data.forms.columns import known_columns, read_rows, reading

STATE = "state.json"
SPLITS = "dataset_dict.json"  # of a folder with a folder for each split


def recognize(path: Path, head: bytes) -> bool:
    """Returns whether a path is a folder: no other form is."""
    return path.is_dir()


def read(path: Path) -> Iterator[tuple[str, dict]]:
    """Yields the location and the values of each row.

    Raises:
      DataError: the folder is not a saved dataset, or a file of it is missing or damaged.
    """
    count = 0
    with reading(path, "Arrow dataset"):
        for row in read_rows(_batches(path)):
            yield row
            count += 1
    if not count:
        raise DataError(f"{path} has no rows: it has no conversations.")


def files(path: Path) -> list[Path]:
    """Returns the Arrow files of a saved dataset, in the order of their rows.

    Raises:
      DataError: the folder is not a saved dataset.
    """
    if (path / SPLITS).is_file():
        splits = _read_json(path / SPLITS).get("splits", [])
        raise DataError(
            f"{path} holds the splits {', '.join(splits)}: name the folder of one, such as "
            f"{path / splits[0] if splits else path}."
        )
    if not (path / STATE).is_file():
        raise DataError(
            f"{path} is a folder without {STATE}: only folders of datasets.save_to_disk are read."
        )
    state = _read_json(path / STATE)
    if state.get("_indices_data_files"):
        raise DataError(
            f"{path} has an index of its rows: save the dataset with flatten_indices()."
        )
    if not state.get("_data_files"):
        raise DataError(f"{path / STATE} names no Arrow files.")
    return [path / file["filename"] for file in state["_data_files"]]


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    for file in files(path):
        with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as reader:
            columns = known_columns(reader.schema)
            for batch in reader:
                yield batch.select(columns)


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}.") from None
