"""Settings: flat YAML and command-line flags <-> frozen dataclasses.

A config class is a frozen dataclass. Its fields are the YAML keys and the flags alike, so the two cannot
drift apart. An unknown key fails and names the nearest known one; a value of the wrong type fails and names
its key. A field's `metadata={"help": ...}` is its help text.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import types
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, NewType, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

ALIASES = {"cutoff_len": "max_length", "sequence_len": "max_length"}
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
VARIABLE = re.compile(r"\$\{(\w+)\}")
LIST_TEXT = re.compile(r"\s*[\[{]|[\w.*/-]+(,[\w.*/-]+)+$")  # `[a, b]` or `a,b`, not a sentence
Bytes = NewType("Bytes", int)  # given as a number, or with a unit: 64MB, 1.5GiB
UNITS = {"": 1, "B": 1} | {f"{x}B": 1000**n for n, x in enumerate("KMGT", 1)}
UNITS |= {f"{x}iB": 1024**n for n, x in enumerate("KMGT", 1)}
TYPE_NAMES: dict[Any, str] = {
    Bytes: "bytes, as 64MB",
    int: "integer",
    float: "number",
    bool: "true | false",
    str: "text",
    Path: "path",
    dict: "mapping",
    list: "list",
    tuple: "list",
}


class UserError(Exception):
    """The user's input is wrong. The message is one line: what, where, what to do."""


class DataclassType(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]


C = TypeVar("C", bound=DataclassType)


def option(default: Any, text: str) -> Any:
    """A field with its help text; each object gets a list or a mapping of its own."""
    metadata = {"help": text}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def nearest(word: str, choices: Iterable[str]) -> str:
    """ " (did you mean 'x'?)", or "" where no choice is near."""
    found = difflib.get_close_matches(word, list(choices), n=1)
    return f" (did you mean '{found[0]}'?)" if found else ""


@cache
def field_types(cls: type) -> dict[str, Any]:
    """Field name -> resolved type, in declaration order, for the fields a user may set."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def from_mapping(cls: type[C], mapping: Mapping[str, Any], where: str) -> C:
    """`cls` built from a flat mapping.

    Raises UserError, its message starting with `where`, for an unknown or missing key or a bad value.
    """
    return _build(cls, _values(cls, mapping, f"{where}: "), f"{where}: ")


def read_config(cls: type[C], path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> C:
    """`cls` from a YAML file (or none) with `overrides` (flag name -> text or value) on top."""
    prefix = f"{path}: " if path else ""
    values = _values(cls, load_yaml(path), prefix) if path else {}
    return _build(cls, values | _values(cls, overrides or {}, "--"), prefix)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; {} for an empty one. In texts ${NAME} stands for an environment variable.

    Raises UserError where there is no such file, or no such variable.
    """
    import yaml

    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        loaded = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        raise UserError(f"{path}:{line} not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: expected 'key: value' lines, found a {type(loaded).__name__}")
    keys = [key.value for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"{path}: key '{key}' is given twice; remove one")
    return {key: _expanded(value, str(path)) for key, value in loaded.items()}


def _expanded(value: Any, where: str) -> Any:
    """The value with ${NAME} in its texts replaced by environment variables."""
    if isinstance(value, list):
        return [_expanded(item, where) for item in value]
    if isinstance(value, dict):
        return {key: _expanded(item, where) for key, item in value.items()}
    for name in VARIABLE.findall(value) if isinstance(value, str) else ():
        if name not in os.environ:
            raise UserError(f"{where}: ${{{name}}} is not set; export {name}=...")
        value = value.replace(f"${{{name}}}", os.environ[name])
    return value


def make_folder(folder: Path) -> None:
    """Make an output_dir that may be there. Raises UserError where it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir: {folder} cannot be made: {error.strerror}; choose another") from None


def to_mapping(obj: Any) -> Any:
    """A dataclass as a JSON-able dict: paths and other objects become text, tuples and sets lists."""
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {field.name: to_mapping(getattr(obj, field.name)) for field in dataclasses.fields(obj)}
    if isinstance(obj, Mapping):
        return {str(key): to_mapping(value) for key, value in obj.items()}
    if isinstance(obj, (set, frozenset)):
        return [to_mapping(value) for value in sorted(obj)]
    if isinstance(obj, (list, tuple)):
        return [to_mapping(value) for value in obj]
    return obj if obj is None or isinstance(obj, (bool, int, float, str)) else str(obj)


def type_name(kind: Any) -> str:
    """A field's type in a user's words: "integer", "list of text", "'a' | 'b'"."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " | ".join("none" if arg is type(None) else type_name(arg) for arg in args)
    if origin is Literal:
        return " | ".join(repr(arg) for arg in args)
    if origin in (list, tuple) and args:
        return f"list of {type_name(args[0])}"
    return TYPE_NAMES.get(origin or kind, "any value")


def coerce(value: Any, kind: Any, where: str) -> Any:
    """`value`, from YAML or a flag's text, as type `kind`. Raises UserError if it cannot be."""
    try:
        return _coerce(value, kind)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _build(cls: type[C], values: dict[str, Any], prefix: str) -> C:
    for field in dataclasses.fields(cls):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if field.init and required and field.name not in values:
            raise UserError(f"{prefix}'{field.name}' is required")
    return cls(**values)


def _values(cls: type, mapping: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    hints = field_types(cls)
    values: dict[str, Any] = {}
    for given, value in mapping.items():
        key = str(given).replace("-", "_")
        if key not in hints:
            key = ALIASES.get(key, key)
        if key not in hints:
            known = nearest(key, hints) or f"; known: {', '.join(hints) or 'none'}"
            raise UserError(f"{prefix}{given}: unknown key{known}")
        if key in values:
            raise UserError(f"{prefix}{given}: sets '{key}' a second time; remove one")
        values[key] = coerce(value, hints[key], f"{prefix}{given}")
    return values


def _coerce(value: Any, kind: Any) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _coerce_union(value, kind)
    if origin is Literal:
        return _coerce_literal(value, kind)
    base = origin or kind
    if base in (list, tuple):
        return _coerce_items(value, base, args)
    if base is dict:
        mapping = _parse(value) if isinstance(value, str) else value
        if not isinstance(mapping, Mapping):
            raise _expected(kind, value)
        key_kind, value_kind = args or (Any, Any)
        return {_coerce(key, key_kind): _coerce(item, value_kind) for key, item in mapping.items()}
    if base is bool:
        word = str(value).lower()
        if word not in TRUE + FALSE:
            raise _expected(kind, value)
        return word in TRUE
    if kind is Bytes:
        return _coerce_bytes(value)
    if base in (int, float):
        return _coerce_number(value, base)
    if base is Path and isinstance(value, (str, Path)):
        return Path(value).expanduser()
    if base is str and value is not None and not isinstance(value, (bool, list, dict)):
        return str(value)
    if base is str and isinstance(value, bool):
        raise ValueError(f"expected text, found {value}, which is what YAML makes of yes, no, on and off; quote it")
    raise _expected(kind, value)


def _coerce_number(value: Any, kind: type) -> int | float:
    try:
        number = float("x" if isinstance(value, bool) else value)
    except (TypeError, ValueError):
        raise _expected(kind, value) from None
    if number != number or (kind is int and not number.is_integer()):
        raise _expected(kind, value)
    if kind is float:
        return number
    return int(value) if isinstance(value, int) or str(value).lstrip("+-").isdigit() else int(number)


def _coerce_bytes(value: Any) -> int:
    number, unit = re.fullmatch(r"(?s)(.*?)\s*([KMGT]i?B|B|)\s*", str(value)).groups()  # type: ignore[union-attr]
    try:
        return int(float(number) * UNITS[unit])
    except (ValueError, OverflowError):
        raise _expected(Bytes, value) from None


def _coerce_literal(value: Any, kind: Any) -> Any:
    choices = get_args(kind)
    for choice in choices:
        if type(choice) is type(value) and choice == value or isinstance(value, str) and str(choice) == value:
            return choice
    near = nearest(str(value), map(str, choices))
    raise ValueError(f"expected one of {', '.join(map(repr, choices))}, found {value!r}{near}")


def _coerce_items(value: Any, base: type, args: tuple[Any, ...]) -> Any:
    if isinstance(value, str):
        text = value.strip()
        value = _parse(text) if text.startswith(("[", "{")) else [part.strip() for part in text.split(",")]
    if isinstance(value, (Mapping, int, float, Path)):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise _expected(base, value)
    if base is tuple and args and args[-1] is not Ellipsis:
        if len(value) != len(args):
            raise ValueError(f"expected {len(args)} values, found {len(value)}")
        return tuple(_coerce(item, kind) for item, kind in zip(value, args, strict=True))
    return base(_coerce(item, args[0]) for item in value) if args else base(value)


def _coerce_union(value: Any, kind: Any) -> Any:
    members = [arg for arg in get_args(kind) if arg is not type(None)]
    if len(members) < len(get_args(kind)) and (value is None or str(value).lower() in ("none", "null")):
        return None
    listed = isinstance(value, str) and LIST_TEXT.match(value)

    def unlikely(member: Any) -> bool:
        base = get_origin(member) or member
        return base not in (list, tuple, dict) if listed else base is not type(value)

    for member in sorted(members, key=unlikely):
        try:
            return _coerce(value, member)
        except ValueError as error:
            failure = error
    raise failure if len(members) == 1 else _expected(kind, value)


def _parse(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"not a YAML list or mapping: {text!r}") from None


def _expected(kind: Any, value: Any) -> ValueError:
    return ValueError(f"expected {type_name(kind)}, found {value!r}")
