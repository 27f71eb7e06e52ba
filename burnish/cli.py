"""`burnish VERB [config.yaml] [--name value ...]`: a table of verbs, each imported on use.

A verb's flags are the fields of its frozen config dataclass, as are the keys of its YAML file; a flag
overrides the file. A class may name, as `positional: ClassVar[str]`, the field that the first bare argument
fills. Exit status: 0 done, 2 the user's input is wrong, 1 burnish's own fault, 130 interrupted, 141 nobody
reads the output any more.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from burnish.config import ALIASES, FALSE, TRUE, UserError, field_types, nearest, read_config, type_name

DEBUG = "BURNISH_DEBUG"


@dataclass(frozen=True)
class Verb:
    target: str  # "module:function", called with the config, returns the exit status
    config: str  # "module:Class"
    help: str
    example: str


VERBS = {
    "compare": Verb(
        "burnish.bench.compare:run",
        "burnish.bench.compare:CompareConfig",
        "every technique on one model and one task, under one budget: a table and a page",
        "burnish compare",
    ),
    "plan": Verb(
        "burnish.plan:run",
        "burnish.plan:PlanConfig",
        "memory and time, predicted before anything is loaded",
        "burnish plan pebble",
    ),
    "data preview": Verb(
        "burnish.store.preview:run",
        "burnish.store.preview:PreviewConfig",
        "the rows as the model will see them, with the tokens that carry loss in colour",
        "burnish data preview recipes/data/chat.jsonl",
    ),
    "pretrain": Verb(
        "burnish.engine.procedures.pretrain:run",
        "burnish.engine.procedures.pretrain:PretrainConfig",
        "train a new model from nothing",
        "burnish pretrain recipes/pebble.yaml",
    ),
    "tune": Verb(
        "burnish.engine.procedures.tune:run",
        "burnish.engine.procedures.tune:TuneConfig",
        "adapt a model to data: full, LoRA, adapters, prompts and more",
        "burnish tune recipes/lora.yaml",
    ),
    "merge": Verb(
        "burnish.engine.procedures.merge:run",
        "burnish.engine.procedures.merge:MergeConfig",
        "fold an adapter into its base model",
        "burnish merge runs/lora --output-dir runs/merged",
    ),
    "quantize": Verb(
        "burnish.engine.procedures.compress:run",
        "burnish.engine.procedures.compress:QuantizeConfig",
        "store a model's weights in fewer bits",
        "burnish quantize pebble --method nf4 --output-dir runs/pebble-nf4",
    ),
    "export": Verb(
        "burnish.engine.procedures.export:run",
        "burnish.engine.procedures.export:ExportConfig",
        "a model as one GGUF file, with its tokenizer, for llama.cpp",
        "burnish export pebble --type q8_0 --output runs/pebble-q8_0.gguf",
    ),
    "generate": Verb(
        "burnish.engine.text:run",
        "burnish.engine.text:GenerateConfig",
        "continue a prompt",
        "burnish generate pebble --prompt 'Question: Where was Maren Larquist born? Answer:'",
    ),
    "chat": Verb(
        "burnish.engine.text:run_chat",
        "burnish.engine.text:ChatConfig",
        "talk to a model in the terminal",
        "burnish chat pebble",
    ),
    "eval": Verb(
        "burnish.bench.measure:run",
        "burnish.bench.measure:EvalConfig",
        "a model's quality on built-in tasks or your own rows",
        "burnish eval pebble",
    ),
    "bench": Verb(
        "burnish.bench.strategies:run",
        "burnish.bench.strategies:BenchConfig",
        "how fast a model answers, by every way of running it, against the machine's limits",
        "burnish bench pebble",
    ),
    "env": Verb(
        "burnish.device:run_env",
        "burnish.device:EnvConfig",
        "this machine: versions, processor, memory, GPUs, compiler",
        "burnish env",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    name = next((verb for verb in VERBS if words[: len(verb.split())] == verb.split()), "")
    prefix = f"burnish {name}".strip()
    try:
        status = _run(name, words[len(name.split()) :])
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"{prefix}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prefix}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if os.environ.get(DEBUG) == "1":
            import traceback

            traceback.print_exc()
        what = " ".join(f"{type(error).__name__}: {error}".split())
        hint = "" if os.environ.get(DEBUG) == "1" else f"; rerun with {DEBUG}=1 for the traceback"
        print(f"{prefix}: internal error: {what}{hint}", file=sys.stderr)
        return 1


def _run(name: str, words: list[str]) -> int:
    if not name:
        return _top(words)
    verb = VERBS[name]
    cls = _load(verb.config)
    if "-h" in words or "--help" in words:
        print(verb_help(name, cls))
        return 0
    path, flags = parse(cls, words)
    config = read_config(cls, path, flags)
    return _load(verb.target)(config)


def _top(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if words[0] == "--version":
        from burnish import __version__

        print(__version__)
        return 0
    longer = [verb for verb in VERBS if verb.startswith(f"{words[0]} ")]
    near = nearest(words[0], VERBS) or (f" (did you mean '{longer[0]}'?)" if longer else "; see burnish --help")
    raise UserError(f"unknown verb '{words[0]}'{near}")


def _load(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def parse(cls: type, words: Sequence[str]) -> tuple[str | None, dict[str, Any]]:
    """(config file, flags) from a verb's arguments. Raises UserError for a flag that is no field of `cls`."""
    hints = field_types(cls)
    positional = getattr(cls, "positional", None)
    path: str | None = None
    flags: dict[str, Any] = {}
    rest = list(words)
    switch = ""  # the one before, if it was given without a value
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or word == "-":
            if word.endswith((".yaml", ".yml")) and path is None:
                path = word
            elif positional and positional not in flags:
                flags[positional] = word
            elif switch:
                raise UserError(f"{switch}: expected true or false, found '{word}'")
            else:
                raise UserError(f"unexpected argument '{word}'; settings are given as --name value")
            switch = ""
            continue
        switch = ""
        given, equals, text = word.removeprefix("--").partition("=")
        key = given.replace("-", "_")
        key = ALIASES.get(key, key) if key not in hints else key
        off = key.removeprefix("no_")
        if key in hints and equals:
            flags[key] = text
        elif key in hints and _is_switch(hints[key]):
            told = bool(rest) and rest[0].lower() in TRUE + FALSE
            flags[key] = rest.pop(0) if told else True
            switch = "" if told else word
        elif key in hints:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--{given} needs a value: --{given}={type_name(hints[key]).upper()}")
            flags[key] = rest.pop(0)
        elif off in hints and _is_switch(hints[off]) and not equals:
            flags[off] = False
        elif key != "json":
            near = nearest(f"--{key}", [f"--{field}" for field in hints]) or "; see --help"
            raise UserError(f"unknown flag '{word.partition('=')[0]}'{near}")
    return path, flags


def _is_switch(kind: Any) -> bool:
    return type_name(kind) in ("true | false", "true | false | none")


def overview() -> str:
    width = max(map(len, VERBS)) + 2
    lines = [f"  {name:<{width}}{verb.help}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "usage: burnish VERB [config.yaml] [--name value ...]",
            "",
            *lines,
            "",
            "`burnish VERB --help` lists a verb's settings: the keys of its YAML file and its flags alike.",
        ]
    )


def verb_help(name: str, cls: type) -> str:
    """Usage, one line per field with its type, help and default, and an example."""
    import textwrap

    verb = VERBS[name]
    hints = field_types(cls)
    positional = getattr(cls, "positional", None)
    bare = f" [{positional.upper()}]" if positional else ""
    lines = [f"usage: burnish {name}{bare} [config.yaml] [--name value ...]", "", verb.help, ""]
    for field in dataclasses.fields(cls):
        if field.name not in hints:
            continue
        left = f"  --{field.name} {type_name(hints[field.name])}"
        text = f"{field.metadata.get('help', '')} ({_default(field)})".strip()
        wrapped = textwrap.wrap(text, 66)
        if len(left) > 38:
            lines.append(left)
            left = ""
        lines += [f"{left:<40}{wrapped[0]}", *(" " * 40 + line for line in wrapped[1:])]
    return "\n".join([*lines, "", "example:", f"  {verb.example}"])


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return f"default: {field.default_factory()}"
    if field.default is dataclasses.MISSING:
        return "required"
    return "default: none" if field.default is None else f"default: {field.default}"
