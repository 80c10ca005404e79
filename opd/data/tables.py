"""Parquet and Arrow files and data sets of the Hugging Face hub, as (place, record) pairs; opd.data.records reads through these."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow.ipc
import pyarrow.parquet

from opd.errors import Unreachable

Records = Iterator[tuple[str, dict[str, Any]]]


def parquet(file: Path, start: int = 0) -> Records:
    """Rows of a Parquet file from row `start` on. Raises ValueError for any other file."""
    try:
        table = pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file}: not a Parquet file ({str(error).splitlines()[0]})") from None
    with table:
        number = 0
        for group in range(table.num_row_groups):
            count = table.metadata.row_group(group).num_rows
            if number + count > start:
                rows = (record for batch in table.iter_batches(1024, row_groups=[group]) for record in batch.to_pylist())
                for row, record in enumerate(rows, number):
                    if row >= start:
                        yield f"{file}[{row}]", record
            number += count


def arrow(file: Path, start: int = 0) -> Records:
    """Rows of an Arrow file as the datasets library writes it, from row `start` on. Raises ValueError for any other file."""
    try:
        with pyarrow.memory_map(str(file)) as content, pyarrow.ipc.open_stream(content) as batches:
            rows = (record for batch in batches for record in batch.to_pylist())
            for row, record in enumerate(rows):
                if row >= start:
                    yield f"{file}[{row}]", record
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file}: not an Arrow stream ({str(error).splitlines()[0]})") from None


def hub(name: str, subset: str, split: str, streaming: bool, start: int = 0) -> Records:
    """Rows of a split from row `start` on. streaming: downloaded as they are read. Raises ValueError with the library's reason where that fails."""
    try:
        rows = datasets.load_dataset(name, subset or None, split=split, streaming=streaming)
        for number, record in enumerate(rows.skip(start) if start else rows, start):
            yield f"{name}/{split}[{number}]", record
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise Unreachable(
            f"{name!r} is no file here, and as a data set of the hub (subset {subset or 'none'}, split {split}) it cannot be read: {reason}. "
            "Check the name, data.subset and data.split and the connection (HF_HUB_OFFLINE must not be 1), or give a local file"
        ) from None
