"""Rows: each file kind, formats told by columns, splits, and one-line errors that name the line or row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from burnish.config import UserError
from burnish.store.data import Row, detect_format, read_rows, rename_columns, split_rows

ROWS: list[Row] = [
    {"prompt": "What is 12 + 30?", "completion": " 42"},
    {"prompt": "Grün und schön: 漢字?", "completion": " 🦊"},
]
TALK = [{"role": "user", "content": "capital?"}, {"role": "assistant", "content": "Berga"}]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_reads_jsonl_with_blank_lines_and_unicode(tmp_path: Path) -> None:
    lines = "\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    assert read_rows(write(tmp_path / "a.jsonl", lines)) == ROWS


@pytest.mark.parametrize(
    "wrap", [list, lambda rows: {"data": rows}, lambda rows: {"version": 1, "train": rows, "test": []}]
)
def test_reads_json(tmp_path: Path, wrap) -> None:
    assert read_rows(write(tmp_path / "a.json", json.dumps(wrap(ROWS)))) == ROWS


def test_reads_json_splits_and_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", json.dumps({"train": ROWS, "test": ROWS[:1]}))
    assert read_rows(path, "test") == ROWS[:1]
    with pytest.raises(UserError, match="no list 'tests' .did you mean 'test'"):
        read_rows(path, "tests")
    assert read_rows(write(tmp_path / "b.json", "\n".join(map(json.dumps, ROWS)))) == ROWS
    assert read_rows(write(tmp_path / "c.json", json.dumps({"messages": TALK, "tags": ["x"]}))) == [
        {"messages": TALK, "tags": ["x"]}
    ]


def test_reads_csv_and_tsv(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'prompt,completion\n"a, ""b""\nc",ü\n,x\n')
    assert read_rows(path) == [{"prompt": 'a, "b"\nc', "completion": "ü"}, {"prompt": "", "completion": "x"}]
    assert read_rows(write(tmp_path / "a.tsv", "text\tn\nhello, you\t1\n")) == [{"text": "hello, you", "n": "1"}]


@pytest.mark.parametrize("line, found", [("a,b,c", 3), ("a", 1)])
def test_csv_with_a_ragged_row_is_refused(tmp_path: Path, line: str, found: int) -> None:
    path = write(tmp_path / "a.csv", f"prompt,completion\nx,y\n{line}\n")
    with pytest.raises(UserError, match=rf"row 2 \(line 3\): {found} cells for 2 columns"):
        read_rows(path)


def test_reads_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"messages": TALK, "n": 1}, {"messages": TALK * 2, "n": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet") == rows
    with pytest.raises(UserError, match="not valid Parquet"):
        read_rows(write(tmp_path / "b.parquet", "no"))


def test_reads_paragraphs(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "\none\ntwo\n\n \nthree\n")
    assert read_rows(str(path)) == [{"text": "one\ntwo"}, {"text": "three"}]


def test_reads_a_folder_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl", "\n".join(map(json.dumps, ROWS)))
    write(tmp_path / "set" / "test.jsonl", json.dumps(ROWS[0]))
    assert read_rows(tmp_path / "set") == ROWS
    assert read_rows(tmp_path / "set", "test") == ROWS[:1]
    with pytest.raises(UserError, match="neither a data file nor a data set"):
        read_rows(tmp_path / "set", "nope")


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": }\n', "line 3: not valid JSON"),
        ("a.jsonl", '{"a": 1}\n[1]\n', r"line 2: expected an object \{...\}, found a list"),
        ("a.json", '[{"a": 1},\n 2]', "row 2: expected an object"),
        ("a.json", '[{"a": 1},\n oops]', "line 2: not valid JSON"),
        ("a.json", '"text"', "expected a list of objects, found a str"),
        ("a.csv", 'a\n"x', "line 2: not valid CSV"),
        ("a.xml", "<a/>", "unknown ending '.xml'; data files end in .jsonl, .json, .csv"),
        ("a.jsonl", "\n", "the data is empty"),
        ("a.json", "", "the data is empty"),
        ("a.json", "[]", "the data is empty"),
        ("a.csv", "prompt,completion\n", "the data is empty"),
        ("a.txt", "  \n", "the data is empty"),
    ],
)
def test_bad_files_give_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_rows(write(tmp_path / name, text))
    assert "\n" not in str(error.value) and name in str(error.value)


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", "{}")
    with pytest.raises(UserError, match="no such file .did you mean 'train.jsonl'"):
        read_rows(tmp_path / "trian.jsonl")
    with pytest.raises(UserError, match="no such file"):
        read_rows("nowhere_at_all")
    with pytest.raises(UserError, match="has no split 'test'"):
        read_rows(tmp_path / "train.jsonl", "test")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9"}')
    with pytest.raises(UserError, match="not UTF-8"):
        read_rows(tmp_path / "latin.jsonl")


@pytest.mark.parametrize(
    "columns, expected",
    [
        ("messages prompt", "messages"),
        ("conversations id", "conversations"),
        ("instruction input output", "alpaca"),
        ("instruction output text", "alpaca"),
        ("prompt completion", "prompt_completion"),
        ("text label", "text"),
    ],
)
def test_detects_format(columns: str, expected: str) -> None:
    assert detect_format([dict.fromkeys(columns.split(), "x")]) == expected


def test_unknown_format_names_columns_and_formats() -> None:
    with pytest.raises(UserError, match="my.csv: columns found: question, answer; needed: messages | conversations"):
        detect_format([{"question": "a", "answer": "b"}], "my.csv")


def test_missing_column_names_found_and_nearest() -> None:
    message = r"f.csv: no column 'anwser' .did you mean 'answer'\?.; columns found: question, answer"
    with pytest.raises(UserError, match=message):
        rename_columns([{"question": "a", "answer": "b"}], {"completion": "anwser"}, "f.csv")


def test_split_keeps_equal_rows_together() -> None:
    rows: list[Row] = [{"text": str(i % 40)} for i in range(100)]
    train, held = split_rows(rows, 0.2, seed=1)
    assert sorted(map(str, train + held)) == sorted(map(str, rows))
    assert not {row["text"] for row in train} & {row["text"] for row in held}
    assert 15 <= len(held) <= 20
    assert split_rows(rows, 0.2, seed=1) == (train, held)
    assert split_rows(rows, 0.2, seed=2) != (train, held)
    assert train == [row for row in rows if row in train]


def test_split_edges() -> None:
    rows: list[Row] = [{"text": "a"}, {"text": "b"}]
    assert split_rows(rows, 0, seed=0) == (rows, [])
    assert [len(part) for part in split_rows(rows, 0.001, seed=0)] == [1, 1]
    assert [len(part) for part in split_rows(rows, 0.999, seed=0)] == [1, 1]
    with pytest.raises(UserError, match="distinct"):
        split_rows([rows[0], rows[0]], 0.5, seed=0)
    with pytest.raises(UserError, match="share 1"):
        split_rows(rows, 1, seed=0)
