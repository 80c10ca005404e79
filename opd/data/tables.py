"""Parquet files and data sets of the Hugging Face hub, as (place, record) pairs; opd.data.records reads through these."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet

from opd.data.records import Unreachable

Records = Iterator[tuple[str, dict[str, Any]]]


def parquet(file: Path) -> Records:
    """Rows of a Parquet file. Raises ValueError for any other file."""
    try:
        table = pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file}: not a Parquet file ({str(error).splitlines()[0]})") from None
    with table:
        rows = (record for batch in table.iter_batches(1024) for record in batch.to_pylist())
        for number, record in enumerate(rows):
            yield f"{file}[{number}]", record


def hub(name: str, subset: str, split: str, limit: int) -> Records:
    """Rows of a split; streamed when limited. Raises ValueError with the library's reason where it cannot be read."""
    try:
        rows = datasets.load_dataset(name, subset or None, split=split, streaming=bool(limit))
        for number, record in enumerate(rows):
            yield f"{name}/{split}[{number}]", record
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        raise Unreachable(
            f"{name!r} is no file here, and as a data set of the hub (subset {subset or 'none'}, split {split}) it cannot be read: {reason}. "
            "Check the name, data.subset and data.split and the connection (HF_HUB_OFFLINE must not be 1), or give a local file"
        ) from None
