"""`burnish generate` and `burnish chat`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from burnish.chain import Model
from burnish.config import Bytes, UserError, to_mapping
from burnish.device import parse_dtype
from burnish.engine.generate import Generation, GenerationConfig, Prompt, chat_prompt, generate, stream
from burnish.engine.guide import cut
from burnish.place.choice import Place, placed, ranks_of
from burnish.place.ranks import Ranks
from burnish.store.checkpoint import load
from burnish.store.mixed import load_adapters


@dataclass(frozen=True)
class ModelConfig:
    """Which model, in which precision, and where."""

    positional: ClassVar[str] = "model"
    model: str = field(default="pebble", metadata={"help": "folder, hub id, or pebble, the embedded model"})
    dtype: str | None = field(default=None, metadata={"help": "bf16, fp16 or fp32; none: as stored"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda or cuda:N"})
    memory_limit: Bytes | None = field(
        default=None, metadata={"help": "most memory of the process, or of the GPU: layers are read as they run"}
    )
    adapters: dict[str, str] = field(
        default_factory=dict, metadata={"help": "LoRA folders by name, as in '{fr: runs/fr, de: runs/de}'"}
    )
    adapter: str | None = field(default=None, metadata={"help": "the one of them to use; none: the bare model"})
    place: Place | None = field(default=None, metadata={"help": "spread the model over devices or torchrun's ranks"})
    max_memory: dict[str, Bytes] = field(
        default_factory=dict, metadata={"help": "layer_parallel's devices, as in '{cuda:0: 8GB, cpu: 20GB}'; none: all"}
    )

    def ranks(self) -> AbstractContextManager[Ranks]:
        """The processes that run the model, for as long as it runs."""
        if self.memory_limit is not None and self.place is not None:
            raise UserError("memory_limit: does not go with place; leave one away")
        return ranks_of(self.place, self.device, self.max_memory)

    def load(self, ranks: Ranks) -> Model:
        dtype, unread = parse_dtype(self.dtype), self.place is not None
        model = load(self.model, dtype, ranks.device, unread=unread, memory_limit=self.memory_limit)
        if self.adapter is not None and not self.adapters:
            raise UserError("adapter: no adapters are given; name them, as in --adapters '{fr: runs/fr}'")
        if self.adapters:
            load_adapters(model, self.adapters).adapters.active = self.adapter
        return placed(model, self.place, ranks, self.max_memory)


@dataclass(frozen=True)
class GenerateConfig(GenerationConfig, ModelConfig):
    prompt: str | None = field(default=None, metadata={"help": "text to continue; none: read from standard input"})
    prompt_file: Path | None = field(default=None, metadata={"help": "file with one prompt a line"})
    values: dict[str, str] = field(
        default_factory=dict, metadata={"help": "columns that the model's template names, as in '{subject: Maren}'"}
    )
    chat: bool = field(default=False, metadata={"help": "put the prompt in the chat template, as the user's turn"})
    json: bool = field(default=False, metadata={"help": "print a JSON object a line and prompt"})


@dataclass(frozen=True)
class ChatConfig(GenerationConfig, ModelConfig):
    max_new_tokens: int = field(default=256, metadata={"help": "most tokens of a reply"})
    system: str | None = field(default=None, metadata={"help": "system message that opens the conversation"})


def run(config: GenerateConfig) -> int:
    """`burnish generate`: prints what continues the prompt, as it comes; with several, each under its prompt; 0.

    Raises UserError where there is no prompt, and as `load` and `stream` do.
    """
    with config.ranks() as ranks:
        texts = ranks.share(_texts(config) if ranks.rank == 0 else [])
        _answer(config.load(ranks), texts, config, print if ranks.rank == 0 else _silent)
    return 0


def _answer(model: Model, texts: Sequence[str], config: GenerateConfig, say: Callable[..., None]) -> None:
    prompts: list[Prompt] = [[{"role": "user", "content": text}] if config.chat else text for text in texts]
    if config.values:
        prompts = [{**config.values, "prompt": text} for text in texts]
    if len(prompts) == 1 and not config.json:
        for piece in stream(model, prompts, config):
            say(piece.text, end="", flush=True)
        say()
        return _warn(piece.done, config, "", say)
    for number, (text, done) in enumerate(zip(texts, generate(model, prompts, config), strict=True), 1):
        if config.json:
            say(json.dumps({"prompt": text, **to_mapping(done)}, ensure_ascii=False))
        else:
            say(f"> {text}\n{done.text}\n")
        _warn(done, config, f"prompt {number}: ", say)


def _warn(done: Generation | None, config: GenerationConfig, name: str, say: Callable[..., None]) -> None:
    if done and (told := cut(done, config)):
        say(f"{name}{told}", file=sys.stderr)


def _silent(*values: object, **options: Any) -> None:
    """What ranks other than the first print."""


def run_chat(config: ChatConfig) -> int:
    """`burnish chat`: a conversation in the terminal, until /exit or the end of the input; 0.

    /reset forgets the conversation, Ctrl-C ends a reply. Raises UserError as `load` does, and for a model without a
    chat template.
    """
    with config.ranks() as ranks:
        if ranks.world > 1:
            raise UserError("chat: runs in one process; start it without torchrun, or use generate")
        return _converse(config.load(ranks), config)


def _converse(model: Model, config: ChatConfig) -> int:
    opening = [{"role": "system", "content": config.system}] if config.system is not None else []
    messages: list[dict[str, Any]] = list(opening)
    chat_prompt(model.tokenizer, [*opening, {"role": "user", "content": ""}])
    if sys.stdin.isatty():
        import readline  # noqa: F401  line editing for input()

        print("/reset starts anew, /exit or Ctrl-D ends")
    while True:
        try:
            asked = input("> ").strip()
        except EOFError:
            print()
            return 0
        if asked == "/exit":
            return 0
        if asked == "/reset":
            messages = list(opening)
        elif asked:
            turn = {"role": "user", "content": asked}
            reply = _reply(model, [*messages, turn], config)
            if reply is not None:
                messages += [turn, {"role": "assistant", "content": reply}]


def _texts(config: GenerateConfig) -> list[str]:
    """The prompts that were given: by flag, file or standard input; none beside `values`, which may be all there is."""
    if config.values and config.chat:
        raise UserError("values: they go into a template of prompts, not into a conversation; leave chat away")
    if config.values and config.prompt is None and config.prompt_file is None:
        return [config.values.get("prompt", "")]
    if config.prompt is not None and config.prompt_file is not None:
        raise UserError("prompt and prompt_file are both given; remove one")
    if config.prompt is not None:
        return [config.prompt]
    if config.prompt_file is not None:
        try:
            lines = config.prompt_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"prompt_file: {config.prompt_file} cannot be read: {reason}") from None
        found = [line for line in lines if line.strip()]
        if not found:
            raise UserError(f"prompt_file: {config.prompt_file} has no line with text")
        return found
    if sys.stdin.isatty():
        raise UserError("no prompt: give --prompt 'text' or --prompt_file, or pipe the text in")
    return [sys.stdin.read().removesuffix("\n")]


def _reply(model: Model, messages: Sequence[dict[str, Any]], config: ChatConfig) -> str | None:
    """Prints the reply as it comes; what was shown of it, None where there can be none."""
    shown: list[str] = []
    try:
        for piece in stream(model, [messages], config):
            shown.append(piece.text)
            print(piece.text, end="", flush=True)
    except UserError as error:
        print(f"{error}; /reset starts anew", file=sys.stderr)
        return None
    except KeyboardInterrupt:
        pass
    print()
    return "".join(shown)
