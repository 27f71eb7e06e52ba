from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

from burnish import cli
from burnish.config import UserError


@dataclass(frozen=True)
class Settings:
    positional: ClassVar[str] = "model"
    model: str = field(default="pebble", metadata={"help": "folder or hub id"})
    max_length: int = 512
    packing: bool = False
    compile: bool | None = None
    techniques: list[Any] = field(default_factory=list)
    json: bool = False


@dataclass(frozen=True)
class Bare:
    seed: int = 0


def run_settings(config: Settings) -> int:
    print(config)
    return 0


FAULTS: dict[str, BaseException] = {
    "bug": ZeroDivisionError("by\nzero"),
    "user": UserError("model: bad\nname"),
    "stop": KeyboardInterrupt(),
}


def fail(config: Settings) -> int:
    raise FAULTS[config.model]


@pytest.fixture
def verbs(monkeypatch: pytest.MonkeyPatch) -> None:
    here = sys.modules[__name__]
    monkeypatch.setitem(sys.modules, "stub", here)
    monkeypatch.setattr(
        cli,
        "VERBS",
        {
            "show": cli.Verb("stub:run_settings", "stub:Settings", "shows", "burnish show pebble"),
            "data show": cli.Verb("stub:run_settings", "stub:Settings", "shows", "burnish data show"),
            "fail": cli.Verb("stub:fail", "stub:Settings", "fails", "burnish fail bug"),
            "gone": cli.Verb("burnish.gone:run", "burnish.gone:Config", "is not there", "burnish gone"),
        },
    )


def parse(text: str, cls: type = Settings) -> tuple[str | None, dict[str, Any]]:
    return cli.parse(cls, shlex.split(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", (None, {})),
        ("x.yaml", ("x.yaml", {})),
        ("pebble x.yml --max_length=1", ("x.yml", {"model": "pebble", "max_length": "1"})),
        ("--max-length -1", (None, {"max_length": "-1"})),
        ("--cutoff_len 4", (None, {"max_length": "4"})),
        ("--packing m", (None, {"packing": True, "model": "m"})),
        ("--packing false m", (None, {"packing": "false", "model": "m"})),
        ("--packing no m --compile on", (None, {"packing": "no", "model": "m", "compile": "on"})),
        ("--packing=no --compile", (None, {"packing": "no", "compile": True})),
        ("--no-packing --no_compile", (None, {"packing": False, "compile": False})),
        ("--techniques '[nf4, {lora: {r: 8}}]'", (None, {"techniques": "[nf4, {lora: {r: 8}}]"})),
        ("--model=--odd", (None, {"model": "--odd"})),
        ("--json", (None, {"json": True})),
        ("-", (None, {"model": "-"})),
    ],
)
def test_parse(text: str, expected: tuple[str | None, dict[str, Any]]) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--max_lenght 4", "unknown flag '--max_lenght' (did you mean '--max_length'?)"),
        ("--zzz=4", "unknown flag '--zzz'; see --help"),
        ("-m 4", "unknown flag '-m'"),
        ("--no-max_length", "unknown flag '--no-max_length'"),
        ("--max_length", "--max_length needs a value: --max_length=INTEGER"),
        ("--max_length --packing", "--max_length needs a value"),
        ("one two", "unexpected argument 'two'; settings are given as --name value"),
        ("one --packing maybe", "--packing: expected true or false, found 'maybe'"),
        ("--packing one two", "unexpected argument 'two'"),
        ("one --packing true two", "unexpected argument 'two'"),
        ("one.yaml two three.yaml", "unexpected argument 'three.yaml'"),
    ],
)
def test_parse_refuses(text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(text)
    assert message in str(error.value)


def test_json_is_accepted_by_every_verb() -> None:
    assert parse("--json --seed 1", Bare) == (None, {"seed": "1"})
    with pytest.raises(UserError, match="unexpected argument 'x'"):
        parse("x", Bare)


def test_file_and_flags_reach_the_verb(verbs: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("model: a\nmax_length: 8\n")
    assert cli.main(["data", "show", str(path), "--max_length", "16", "--techniques", "nf4,lora"]) == 0
    assert "model='a', max_length=16" in (out := capsys.readouterr().out)
    assert "techniques=['nf4', 'lora']" in out


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ("fail user", 2, "burnish fail: model: bad name\n"),
        ("fail stop", 130, "burnish fail: interrupted\n"),
        ("show --max_length x", 2, "burnish show: --max_length: expected integer, found 'x'\n"),
        ("show none.yaml", 2, "burnish show: none.yaml: cannot be read: No such file or directory\n"),
        ("shwo", 2, "burnish: unknown verb 'shwo' (did you mean 'show'?)\n"),
        ("data", 2, "burnish: unknown verb 'data' (did you mean 'data show'?)\n"),
        ("zzz", 2, "burnish: unknown verb 'zzz'; see burnish --help\n"),
    ],
)
def test_errors_are_one_line_and_a_status(
    verbs: None, capsys: pytest.CaptureFixture[str], words: str, status: int, message: str
) -> None:
    assert cli.main(words.split()) == status
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", message)


def test_an_own_fault_hides_its_traceback_until_asked(
    verbs: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BURNISH_DEBUG", raising=False)
    assert cli.main(["fail", "bug"]) == 1
    line = "burnish fail: internal error: ZeroDivisionError: by zero"
    assert capsys.readouterr().err == f"{line}; rerun with BURNISH_DEBUG=1 for the traceback\n"
    monkeypatch.setenv("BURNISH_DEBUG", "1")
    assert cli.main(["fail", "bug"]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback") and printed.endswith(f"{line}\n")


def test_a_verb_that_cannot_be_imported_leaves_the_overview_alone(
    verbs: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["gone"]) == 1
    assert "internal error" in capsys.readouterr().err
    for words in ([], ["--help"], ["-h"]):
        assert cli.main(words) == 0
        assert "is not there" in capsys.readouterr().out


def test_verb_help_lists_every_field_and_the_example(verbs: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", "--max_length", "1", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "usage: burnish show [MODEL] [config.yaml]" in printed
    assert "--model text" in printed and "folder or hub id (default: pebble)" in printed
    assert "--compile true | false | none" in printed and "(default: none)" in printed
    assert "--positional" not in printed
    assert printed.endswith("example:\n  burnish show pebble\n")


@pytest.mark.parametrize("name", cli.VERBS)
def test_every_verb_exists_and_its_example_is_valid(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    verb = cli.VERBS[name]
    assert callable(cli._load(verb.target))
    assert cli.main([*name.split(), "--help"]) == 0
    assert verb.example in capsys.readouterr().out
    words = shlex.split(verb.example)
    assert words[: 1 + len(name.split())] == ["burnish", *name.split()]
    cli.parse(cli._load(verb.config), words[1 + len(name.split()) :])


def test_public_names_resolve() -> None:
    import burnish

    for name in burnish.PUBLIC:
        assert callable(getattr(burnish, name)), name
    import burnish.plan  # noqa: F401  # the submodule does not hide the function

    assert callable(burnish.plan)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = burnish.lode


def burnish(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "burnish", *words], capture_output=True, text=True)


def test_help_answers_at_once_and_loads_no_library() -> None:
    code = (
        "import sys; from burnish.cli import main; main(['--help']); "
        "print(sorted({'torch', 'transformers', 'numpy', 'rich', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    seconds = []
    for _ in range(5):
        start = os.times()
        assert burnish("--help").returncode == 0
        end = os.times()
        own = end.children_user + end.children_system - start.children_user - start.children_system
        seconds.append(own)  # of the processor, which others may be using too
    assert min(seconds) < 0.3


def test_the_command_line_end_to_end() -> None:
    done = burnish("env", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["python"]
    assert burnish("--version").stdout.strip() == "0.1.0"


def test_a_closed_pipe_is_quiet() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "burnish", "--help"], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")
