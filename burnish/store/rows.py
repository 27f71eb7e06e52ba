"""Rows from JSONL, JSON, CSV, TSV, Parquet or text files, from a folder, or from the Hugging Face hub."""

from __future__ import annotations

import csv
import json
import random
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from burnish.config import UserError, nearest

Row = dict[str, Any]
FORMATS = {  # in order of preference, as data sets often keep the columns they were made from
    "messages": ("messages",),
    "conversations": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
ACCEPTED = "messages | conversations | instruction, output (and input) | prompt, completion | text"
HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?")


def read_rows(source: str | Path, split: str | None = None) -> list[Row]:
    """The rows of a file, of a folder, or of a hub data set (`owner/name`, or `owner/name:config`).

    Files are told by their ending: .jsonl, .json (a list of objects, an object with such lists by split name,
    or JSONL), .csv and .tsv with a header line, .parquet, .txt (a row {"text": ...} for each paragraph).
    `split` names a split of a folder, of a hub data set or of a JSON object; without it they give "train".

    Raises UserError for a missing, unreadable or empty source, naming the line or row that is malformed.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        rows = _from_datasets(str(path), None, split)
    elif path.is_file():
        rows = _from_file(path, split)
    elif (hub := HUB_ID.fullmatch(str(source))) and path.suffix not in READERS and not path.parent.is_dir():
        rows = _from_datasets(hub[1], hub[2], split)
    else:
        beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(
            f"{source}: no such file{nearest(path.name, beside)}; give a data file, a folder or a hub id (owner/name)"
        )
    if not rows:
        raise UserError(f"{source}: the data is empty; give at least one row")
    return rows


def detect_format(rows: Sequence[Row], where: str = "data", columns: Iterable[str] = ()) -> str:
    """'messages', 'conversations', 'alpaca', 'prompt_completion' or 'text', from the columns of all rows.

    Of several that fit, one that uses a column named in `columns` is preferred. Raises UserError naming the
    columns found.
    """
    found = _columns(rows)
    fitting = [name for name, needed in FORMATS.items() if set(needed) <= set(found)]
    if not fitting:
        raise UserError(
            f"{where}: columns found: {', '.join(found) or 'none'}; needed: {ACCEPTED};"
            " rename yours with columns, for example {prompt: question, completion: answer}"
        )
    return next((name for name in fitting if set(FORMATS[name]) & set(columns)), fitting[0])


def rename_columns(rows: Sequence[Row], columns: Mapping[str, str], where: str = "data") -> list[Row]:
    """Rows with the content of column `columns[name]` under `name` too; UserError if there is none."""
    for source in columns.values():
        require_column(rows, source, where)
    return [row | {name: row[source] for name, source in columns.items() if source in row} for row in rows]


def split_rows(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(train, evaluation) rows, about `fraction` of them for evaluation, each in the order given; equal rows
    stay together.

    At least one distinct row is left on either side. Raises UserError if `fraction` is not in [0, 1) or all
    rows are equal.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"the evaluation share {fraction} must be at least 0 and below 1")
    if fraction == 0:
        return list(rows), []
    keys = [json.dumps(row, sort_keys=True, default=str) for row in rows]
    counts = dict.fromkeys(keys, 0)
    for key in keys:
        counts[key] += 1
    distinct = list(counts)
    if len(distinct) < 2:
        raise UserError("the data has fewer than two distinct rows, so none can be kept apart for evaluation; add rows")
    random.Random(seed).shuffle(distinct)
    chosen, size = {distinct[0]}, counts[distinct[0]]
    for key in distinct[1:-1]:
        if size + counts[key] <= fraction * len(rows):
            chosen.add(key)
            size += counts[key]
    pairs = list(zip(keys, rows, strict=True))
    return [row for key, row in pairs if key not in chosen], [row for key, row in pairs if key in chosen]


def _from_file(path: Path, split: str | None) -> list[Row]:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: unknown ending '{path.suffix}'; data files end in {', '.join(READERS)}")
    if split not in (None, "train") and reader is not _read_json:
        raise UserError(f"{path}: a {path.suffix} file has no split '{split}'; name the file of that split instead")
    try:
        return _read_json(path, split) if reader is _read_json else reader(path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text at byte {error.start}; save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(
                        f"{path}: line {number}: not valid JSON: {error.msg} at column {error.colno}"
                    ) from error
                if not isinstance(row, dict):
                    raise UserError(f"{path}: line {number}: expected an object {{...}}, found a {type(row).__name__}")
                rows.append(row)
    return rows


def _read_json(path: Path, split: str | None = None) -> list[Row]:
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        return []
    try:
        loaded = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object a line, under the wrong ending
            return _read_jsonl(path)
        raise UserError(f"{path}: line {error.lineno}: not valid JSON: {error.msg} at column {error.colno}") from error
    if isinstance(loaded, dict):
        lists = {name: value for name, value in loaded.items() if isinstance(value, list)}
        name = split or next((name for name in ("train", "data", *lists) if name in lists), None)
        if name is None or (not split and {"messages", "conversations"} & set(loaded)):  # a lone row
            return [loaded]
        if name not in lists:
            raise UserError(f"{path}: no list '{name}'{nearest(name, lists)}; it has {', '.join(loaded)}")
        if not split and not any(isinstance(item, dict) for item in lists[name]):
            return [loaded]
        loaded = lists[name]
    if not isinstance(loaded, list):
        raise UserError(f"{path}: expected a list of objects, found a {type(loaded).__name__}")
    for number, row in enumerate(loaded, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path}: row {number}: expected an object {{...}}, found a {type(row).__name__}")
    return loaded


def _read_csv(path: Path) -> list[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    rows: list[Row] = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    found = sum(cell is not None for cell in row.values()) + len(row.get(None, ())) - (None in row)
                    expected = len(reader.fieldnames or ())
                    raise UserError(
                        f"{path}: row {len(rows) + 1} (line {reader.line_num}): {found} cells for"
                        f" {expected} columns; quote cells that hold the separator"
                    )
                rows.append(row)
        except csv.Error as error:
            raise UserError(f"{path}: line {reader.reader.line_num}: not valid CSV: {error}") from error
    return rows


def _read_parquet(path: Path) -> list[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: Parquet needs pyarrow; run: pip install pyarrow") from error
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not valid Parquet: {str(error).splitlines()[0]}") from error


def _read_text(path: Path) -> list[Row]:
    paragraphs = re.split(r"\n\s*\n", path.read_text(encoding="utf-8-sig"))
    return [{"text": paragraph.strip()} for paragraph in paragraphs if paragraph.strip()]


def _from_datasets(name: str, config: str | None, split: str | None) -> list[Row]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(
            f"{name}: folders and hub data sets need the datasets library; run: pip install datasets"
        ) from error
    try:
        return load_dataset(name, config, split=split or "train").to_list()
    except Exception as error:  # the library and the hub raise many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{name}: neither a data file nor a data set that can be loaded: {reason}") from error


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def require_column(rows: Sequence[Row], column: str, where: str) -> None:
    found = _columns(rows)
    if column not in found:
        raise UserError(
            f"{where}: no column '{column}'{nearest(column, found)}; columns found: {', '.join(found) or 'none'}"
        )


READERS: dict[str, Callable[..., list[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
