"""Raw records of a data source, each with the place it stands at: JSONL, JSON, Parquet, Arrow and CSV files, and data sets of the hub."""

import csv
import json
import re
from collections.abc import Iterator
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from opd.config.choices import nearest

Records = Iterator[tuple[str, dict[str, Any]]]
SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow", ".csv", ".tsv")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def read_records(source: str, *, subset: str = "", split: str = "train", limit: int = 0, start: int = 0, lazy: bool = False) -> Records:
    """(place, record) pairs of a file or hub data set, in order; the first `limit` of them, 0 for all. start: records that are passed over.

    A name of the form owner/name that is no file is looked for on the hub (subset and split choose there; with a limit it is streamed, so
    that no more is downloaded than is read). lazy: of a hub data set too, nothing is held but what is being read. Raises ValueError with the
    place and the fix.
    """
    if on_hub(source):
        records = _tables().hub(source, subset, split, lazy or bool(limit), start)
    else:
        records = _file(existing_file(source), start)
    return islice(records, max(0, limit - start) if limit else None)


def on_hub(source: str) -> bool:
    """Whether a source is a data set of the hub: of the form owner/name, and no file."""
    file = Path(source).expanduser()
    return not file.exists() and _HUB_NAME.fullmatch(source) is not None and not file.suffix.lower().endswith(SUFFIXES)


def existing_file(path: str | Path) -> Path:
    """The path, if a file is there. Raises ValueError with the nearest existing name."""
    file = Path(path).expanduser()
    if file.is_file():
        return file
    if file.is_dir():
        inside = sorted(p.name for p in file.iterdir() if p.suffix.lower() in SUFFIXES)
        raise ValueError(f"{file} is a folder; give a file in it: {', '.join(inside) or 'it has none of ' + ', '.join(SUFFIXES)}")
    folder = file.parent
    while not folder.is_dir():
        folder = folder.parent
    missing = file.relative_to(folder).parts[0]
    raise ValueError(f"{file} does not exist{nearest(missing, [p.name for p in folder.iterdir()])}; looked in {folder.resolve()}")


def _tables() -> Any:
    """opd.data.tables, imported when it is needed: the libraries behind it take a second and 50 MiB."""
    try:
        return import_module("opd.data.tables")
    except ModuleNotFoundError as error:
        raise ValueError(f'Parquet and Arrow files and the hub need {error.name}: pip install "opd-train[train]"') from None


def _file(file: Path, start: int = 0) -> Records:
    match file.suffix.lower():
        case ".parquet":
            return _tables().parquet(file, start)
        case ".arrow":
            return _tables().arrow(file, start)
        case ".csv":
            return islice(_csv(file, ","), start, None)
        case ".tsv":
            return islice(_csv(file, "\t"), start, None)
        case ".json":
            return islice(_json(file), start, None)
        case _:
            return _jsonl(file, start)


def _jsonl(file: Path, start: int = 0) -> Records:
    with file.open("rb") as lines:
        records = 0
        for number, raw in enumerate(lines, 1):
            if not raw.strip():
                continue
            records += 1
            if records <= start:
                continue
            try:
                record = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{file}:{number}: not UTF-8 ({error.reason} at byte {error.start}); convert the file") from None
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{file}:{number}: malformed JSON: {error.msg} at column {error.colno}; expected one JSON object a line"
                ) from None
            if not isinstance(record, dict):
                raise ValueError(f"{file}:{number}: expected a JSON object, found {type(record).__name__}")
            yield f"{file}:{number}", record


def _json(file: Path) -> Records:
    try:
        loaded = json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        if "Extra data" in error.msg:  # one object a line under the name of .json, as many data sets have it
            yield from _jsonl(file)
            return
        raise ValueError(f"{file}:{error.lineno}: malformed JSON: {error.msg} at column {error.colno}") from None
    records = next((value for value in loaded.values() if isinstance(value, list)), [loaded]) if isinstance(loaded, dict) else loaded
    if not isinstance(records, list):
        raise ValueError(f"{file}: expected a list of objects, found {type(records).__name__}")
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(f"{file}[{number}]: expected a JSON object, found {type(record).__name__}")
        yield f"{file}[{number}]", record


def _csv(file: Path, delimiter: str) -> Records:
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
            for record in reader:
                if None in record or None in record.values():
                    width = len(reader.fieldnames or ())
                    raise ValueError(f"{file}:{reader.line_num}: the row has not the {width} fields of the header; quote fields with {delimiter!r}")
                yield f"{file}:{reader.line_num}", dict(record)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 ({error.reason} at byte {error.start}); convert the file") from None
    except csv.Error as error:
        raise ValueError(f"{file}: malformed CSV: {error}") from None
