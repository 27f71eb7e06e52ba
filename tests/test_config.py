from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from burnish.config import Bytes, UserError, from_mapping, load_yaml, nearest, read_config, to_mapping, type_name


@dataclass(frozen=True)
class Settings:
    positional: ClassVar[str] = "model"
    model: str
    learning_rate: float = 1e-4
    max_length: int = 512
    packing: bool = False
    output_dir: Path = Path("runs")
    dtype: Literal["bf16", "fp32"] | None = None
    bits: Literal[4, 8] = 8
    target_modules: str | list[str] | None = None
    techniques: list[str | dict[str, Any]] = field(default_factory=list)
    betas: tuple[float, float] = (0.9, 0.999)
    rates: tuple[float, ...] = ()
    limit: Bytes = Bytes(0)
    stop: list[str] = field(default_factory=list)
    extra: dict[str, int] = field(default_factory=dict)


def read(**values: Any) -> Settings:
    return from_mapping(Settings, {"model": "m", **values}, "x.yaml")


def write(folder: Path, text: str) -> Path:
    path = folder / "x.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("key", "given", "expected"),
    [
        ("learning_rate", "1e-3", 1e-3),
        ("learning_rate", 1, 1.0),
        ("max_length", "1e3", 1000),
        ("max_length", "-1", -1),
        ("max_length", str(2**53 + 1), 2**53 + 1),
        ("limit", "64MB", 64_000_000),
        ("limit", "1.5 GiB", 3 << 29),
        ("limit", 4096, 4096),
        ("packing", "yes", True),
        ("packing", 0, False),
        ("packing", "FALSE", False),
        ("model", 7, "7"),
        ("output_dir", "a/b", Path("a/b")),
        ("output_dir", "~/b", Path.home() / "b"),
        ("dtype", "bf16", "bf16"),
        ("dtype", "none", None),
        ("dtype", None, None),
        ("bits", "4", 4),
        ("target_modules", "all-linear", "all-linear"),
        ("target_modules", "q_proj,v_proj", ["q_proj", "v_proj"]),
        ("target_modules", "[q_proj]", ["q_proj"]),
        ("target_modules", ["q_proj"], ["q_proj"]),
        ("target_modules", "null", None),
        ("techniques", "nf4", ["nf4"]),
        ("techniques", "[nf4, {lora: {r: 8}}]", ["nf4", {"lora": {"r": 8}}]),
        ("techniques", {"lora": {"r": 8}}, [{"lora": {"r": 8}}]),
        ("betas", "0.9, 0.95", (0.9, 0.95)),
        ("rates", [1, "2e-4"], (1.0, 2e-4)),
        ("rates", 3, (3.0,)),
        ("stop", "a, b", ["a", "b"]),
        ("extra", "{a: 1}", {"a": 1}),
    ],
)
def test_values_are_coerced_to_their_type(key: str, given: Any, expected: Any) -> None:
    found = getattr(read(**{key: given}), key)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("key", "given", "message"),
    [
        ("learning_rate", "fast", "expected number, found 'fast'"),
        ("learning_rate", True, "expected number, found True"),
        ("learning_rate", "nan", "expected number"),
        ("limit", "64 cows", "expected bytes, as 64MB, found '64 cows'"),
        ("limit", "nanMB", "expected bytes"),
        ("limit", True, "expected bytes"),
        ("max_length", 1.5, "expected integer, found 1.5"),
        ("max_length", float("inf"), "expected integer"),
        ("max_length", [1], "expected integer"),
        ("packing", "maybe", "expected true | false"),
        ("packing", 2, "expected true | false"),
        ("model", False, "expected text, found False, which is what YAML makes of yes, no, on and off; quote it"),
        ("stop", "[stay, no]", "expected text, found False, which is what YAML makes of"),
        ("model", None, "expected text, found None"),
        ("model", ["a"], "expected text, found ['a']"),
        ("dtype", "fp23", "expected one of 'bf16', 'fp32', found 'fp23' (did you mean 'fp32'?)"),
        ("bits", True, "expected one of 4, 8"),
        ("betas", [0.9], "expected 2 values, found 1"),
        ("stop", [["a"]], "expected text"),
        ("techniques", "[nf4", "not a YAML list or mapping"),
        ("extra", [1], "expected mapping"),
        ("extra", {"a": "b"}, "expected integer, found 'b'"),
        ("target_modules", True, "expected text | list of text | none"),
    ],
)
def test_a_bad_value_names_the_file_the_key_and_what_was_expected(key: str, given: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        read(**{key: given})
    assert str(error.value).startswith(f"x.yaml: {key}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_keys_name_the_nearest() -> None:
    with pytest.raises(UserError, match=r"x.yaml: learning_rte: unknown key \(did you mean 'learning_rate'\?\)"):
        read(learning_rte=1)
    with pytest.raises(UserError, match="zzz: unknown key; known: model, learning_rate"):
        read(zzz=1)
    with pytest.raises(UserError, match="positional: unknown key"):
        read(positional="x")


def test_a_missing_key_is_named() -> None:
    with pytest.raises(UserError, match="x.yaml: 'model' is required"):
        from_mapping(Settings, {}, "x.yaml")
    with pytest.raises(UserError, match="^'model' is required"):
        read_config(Settings, None, {})


@pytest.mark.parametrize("alias", ["cutoff_len", "sequence_len", "cutoff-len", "max-length"])
def test_aliases(alias: str) -> None:
    assert read(**{alias: 7}).max_length == 7


def test_two_names_of_one_key_are_refused() -> None:
    with pytest.raises(UserError, match="cutoff_len: sets 'max_length' a second time"):
        read(max_length=1, cutoff_len=2)


def test_flags_override_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "model: a\nlearning_rate: 1e-3\nmax_length: 8\n")
    config = read_config(Settings, path, {"max_length": "16", "packing": True})
    assert (config.model, config.learning_rate, config.max_length, config.packing) == ("a", 1e-3, 16, True)
    with pytest.raises(UserError, match="^--max_length: expected integer"):
        read_config(Settings, path, {"max_length": "long"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\nb: 2\n", "x.yaml: line 2: not valid YAML"),
        ("- a\n", "expected 'key: value' lines, found a list"),
        ("a: 1\nb: 2\na: 3\n", "key 'a' is given twice"),
        ("a: !!python/object:os.system {}\n", "not valid YAML"),
    ],
)
def test_a_bad_file_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_yaml(write(tmp_path, text))
    assert message in str(error.value)


def test_a_missing_or_binary_file_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none.yaml: cannot be read: No such file"):
        load_yaml(tmp_path / "none.yaml")
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(UserError, match="cannot be read"):
        load_yaml(path)


def test_texts_may_name_environment_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("data: ${HERE}/a.jsonl\nrows: [{name: '${HERE}-${HERE}', price: $5}]\n")
    monkeypatch.setenv("HERE", "there")
    assert load_yaml(path) == {"data": "there/a.jsonl", "rows": [{"name": "there-there", "price": "$5"}]}
    monkeypatch.delenv("HERE")
    with pytest.raises(UserError, match=r"x.yaml: \$\{HERE\} is not set; export HERE="):
        load_yaml(path)


def test_an_empty_file_is_an_empty_mapping(tmp_path: Path) -> None:
    assert load_yaml(write(tmp_path, "# nothing\n")) == {}


def test_to_mapping_is_json_able_and_reads_back() -> None:
    config = read(betas=(0.8, 0.9), techniques=["nf4", {"lora": {"r": 8}}], output_dir="a", dtype="bf16")
    mapping = json.loads(json.dumps(to_mapping(config)))
    assert mapping["output_dir"] == "a"
    assert from_mapping(Settings, mapping, "x") == config
    assert to_mapping({"a": {2, 1}, "b": (Path("x"),)}) == {"a": [1, 2], "b": ["x"]}


@given(st.floats(allow_nan=False), st.integers(), st.booleans(), st.lists(st.text(), max_size=3))
def test_what_is_saved_reads_back_equal(rate: float, length: int, packing: bool, stop: list[str]) -> None:
    config = Settings("m", learning_rate=rate, max_length=length, packing=packing, stop=stop)
    assert from_mapping(Settings, to_mapping(config), "x") == config


@given(st.floats(allow_nan=False), st.integers())
def test_numbers_given_as_text_read_back_equal(rate: float, length: int) -> None:
    config = read_config(Settings, None, {"model": "m", "learning_rate": repr(rate), "max_length": str(length)})
    assert (config.learning_rate, config.max_length) == (rate, length)


def test_nearest() -> None:
    assert nearest("lroa", ["lora", "full"]) == " (did you mean 'lora'?)"
    assert nearest("xyz", ["lora", "full"]) == ""


def test_type_names_are_words() -> None:
    assert type_name(str | list[str] | None) == "text | list of text | none"
    assert type_name(Literal["a", "b"]) == "'a' | 'b'"
    assert type_name(tuple[float, ...]) == "list of number"
    assert type_name(Any) == "any value"
