"""Proof that a change of form broke nothing: what a model says of some texts before it is quantised, merged or
exported, and what is read back says of them afterwards.

    KL = sum_v p(v) log(p(v) / q(v)),  p before and q after, a mean over the tokens, in nats

with the share of tokens whose likeliest successor is the same, the perplexity of the texts themselves, and relative
errors, sqrt(sum (h' - h)^2 / sum h^2): of the texts' embeddings; of the states after every layer, and what that adds to
its predecessor's; and of the logits, less their mean, that the head gives for the states of before.
What is written goes under a name of its own, is read back, and gets its final name once it has been looked at.
"""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish import __version__, chain, device
from burnish.chain import Model
from burnish.config import UserError
from burnish.engine.order import collated, encode
from burnish.model.example import IGNORE, Example
from burnish.model.scoring import beside_labels
from burnish.store.checkpoint import load
from burnish.store.tensors import write_json

TEXTS = (
    "The river rises in the hills north of the town and runs for ninety miles before it reaches the sea. In spring,"
    " when the snow melts, it floods the meadows, and the farmers move their cattle to higher ground.",
    "Question: What does a thermometer measure? Answer: It measures temperature, usually in degrees.",
    "def area(width, height):\n    if width < 0 or height < 0:\n        raise ValueError('negative')\n"
    "    return width * height\n",
    "Dear Ms Ortega, thank you for your letter of 3 March. We have sent the missing parts today, and we expect them to"
    " arrive within five working days. Please let us know if anything else is wrong.",
    "A train leaves at 9:40 and arrives at 12:15. The journey takes 2 hours and 35 minutes, of which it stands still"
    " for 20 minutes, so it moves for 135 minutes.",
    "I did not like this film at all: the story is thin, the actors look bored, and the music never stops. Two hours of"
    " my life that I will not get back.",
    "The committee met on Tuesday to discuss the budget. After a long debate it voted seven to four in favour of the"
    " new library, which is to open in two years.",
    "Water boils at a lower temperature on a mountain, because the pressure of the air is lower there. That is why"
    " potatoes take longer to cook.",
)
MOST_TOKENS = 64  # of a text
PART = 32  # tokens whose logits are made again together
WORST, LEAST = 3, 0.0005  # parts that are named, and what each adds at least
EMBEDDINGS = "embeddings"


@dataclass(frozen=True)
class ProofOptions:
    """How what is written is looked at before it gets its name."""

    proof: bool = field(default=True, metadata={"help": "compare what is written with the model that it was made from"})
    prompt_file: Path | None = field(default=None, metadata={"help": "texts to compare on, one a line; else built-in"})
    max_kl: float = field(default=0.1, metadata={"help": "nats a token beyond which the proof warns"})
    strict: bool = field(
        default=False, metadata={"help": "write nothing where the proof warns, or where there is none"}
    )
    json: bool = field(default=False, metadata={"help": "print JSON objects, the last for the whole"})


@dataclass
class Made:
    """What was written: lines for people, figures for machines."""

    lines: list[str]
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass
class Report:
    """Before against after. `layers`: path -> (relative error, what it adds to what was before the layer); `embeddings`
    and `head`: their own relative errors."""

    kl: float
    worst_kl: float
    agreement: float
    perplexity: tuple[float, float]
    layers: dict[str, tuple[float, float]]
    embeddings: float
    head: float

    def lines(self) -> list[str]:
        """What is shown, without the warning."""
        before, after = self.perplexity
        return [f"proof: KL {self.kl:.2g} nats a token (worst {self.worst_kl:.2g}), same likeliest token "
                f"{self.agreement:.1%}, perplexity {before:.4g} -> {after:.4g}"]  # fmt: skip

    def warning(self, limit: float) -> str:
        """What is said where `limit` is passed, "" where it is not."""
        if self.kl <= limit:  # what is no number is beyond
            return ""
        named = ", ".join(f"{part} (+{added:.1%})" for part, added in self.worst()) or "none by itself"
        return f"warning: KL is beyond {limit:g}: the result differs from the model; worst parts: {named}"

    def worst(self) -> list[tuple[str, float]]:
        """The layers, embeddings or head that add most to the error, and how much; what is no number is most."""
        parts = {EMBEDDINGS: self.embeddings, **{path: added for path, (_, added) in self.layers.items()}}
        found = [(part, added) for part, added in {**parts, "head": self.head}.items() if not added < LEAST]
        return sorted(found, key=lambda item: -math.inf if math.isnan(item[1]) else -item[1])[:WORST]


@dataclass
class Said:
    """Of every judged token: log-probabilities (tokens, V), the label, and the states (tokens, hidden) that the head
    read; and the embeddings and the states after each layer."""

    logs: Tensor
    labels: Tensor
    read: Tensor
    states: dict[str, Tensor] = field(default_factory=dict)


def said(model: Model, texts: Sequence[str], look: Callable[[str, Tensor], None] | None = None) -> Said:
    """What a model says of texts, in one forward. Of each the second half is judged. `look` is given the path and the
    states of every layer as it runs, and they are not kept; before them the embeddings."""
    net, paths = model.net, {module: path for path, module in model.net.named_modules()}
    paths[net.embed_tokens] = EMBEDDINGS
    listed = [model.tokenizer(text)["input_ids"][:MOST_TOKENS] for text in texts]
    examples = [Example(ids, [IGNORE] * (len(ids) // 2) + ids[len(ids) // 2 :]) for ids in listed if len(ids) > 1]
    if not examples:
        raise UserError("prompt_file: no line has two tokens; the first half of a line is read, the second judged")
    states: dict[str, Tensor] = {}

    def see(module: torch.nn.Module, _: Any, out: Any) -> None:
        (look or states.__setitem__)(paths[module], (out if isinstance(out, Tensor) else out[0]).detach().cpu())

    handles = [module.register_forward_hook(see) for module in (net.embed_tokens, *net.all_layers)]
    net.eval()
    try:
        with torch.inference_mode():
            batch = collated(model, list(encode(model, examples)))
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            hidden = chain.forward(model, batch)
            if model.spec.head == "classification":
                hidden = net.pool(hidden, batch["attention_mask"])
                logits = net.logits(hidden)
                labels = logits.argmax(-1)
            else:
                hidden, labels = beside_labels(net, hidden, batch["labels"])
                hidden, labels = hidden[labels != IGNORE], labels[labels != IGNORE]
                logits = net.logits(hidden)
            return Said(logs_of(logits), labels.cpu(), hidden.cpu(), states)
    finally:
        for handle in handles:
            handle.remove()


def logs_of(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1, dtype=torch.float32).cpu()


def relative(after: Tensor, before: Tensor) -> float:
    """The relative error of what is `before`."""
    return float((after.float() - before.float()).norm() / before.float().norm().clamp(min=1e-30))


@torch.inference_mode()
def head_error(before: Said, model: Model, kind: torch.dtype) -> float:
    """The relative error of the logits, less their mean, that the head computes in `kind` of the states of before."""
    lost = power = 0.0
    for states, logs in zip(before.read.split(PART), before.logs.split(PART), strict=True):
        wanted = logs - logs.mean(-1, keepdim=True)
        found = logs_of(model.net.logits(states.to(model.device, kind)))
        found -= found.mean(-1, keepdim=True)
        lost, power = lost + float((found - wanted).square().sum()), power + float(wanted.square().sum())
    return math.sqrt(lost / max(power, 1e-30))


def compared(before: Said, model: Model, texts: Sequence[str]) -> Report:
    """What was said before against what a model says of the same texts."""
    errors: dict[str, float] = {}

    def look(path: str, state: Tensor) -> None:
        known = before.states.get(path)
        if known is not None and known.shape == state.shape:
            errors[path] = relative(state, known)

    after = said(model, texts, look)
    head = head_error(before, model, after.read.dtype)
    kl = torch.stack([(p.exp() * (p - q)).sum() for p, q in zip(before.logs, after.logs, strict=True)])
    embeddings = last = errors.pop(EMBEDDINGS, 0.0)
    layers = {}
    for path, error in errors.items():
        layers[path] = error, error - last
        last = error
    known = before.labels < before.logs.shape[1]
    losses = [F.nll_loss(x.logs[known], before.labels[known]).item() for x in (before, after)]
    same = (before.logs.argmax(-1) == after.logs.argmax(-1)).float().mean()
    perplexity = math.exp(min(losses[0], 99)), math.exp(min(losses[1], 99))
    return Report(kl.mean().item(), kl.max().item(), same.item(), perplexity, layers, embeddings, head)


def proven(
    source: Callable[[], Model], write: Callable[[Model, Path], Made], output: Path, options: ProofOptions
) -> int:
    """Let `write` put what it makes of the model of `source` under a name beside `output`; read it back, compare, give
    it the name `output`, and print what `write` says and the proof, a warning on the error stream; 0.

    A folder gets figures and report as `proof.json`, all lines as a card, `README.md`. Raises UserError where `strict`
    is asked for and the proof warns, or there is none; then, and whenever something fails, nothing is left of what was
    written.
    """
    if options.strict and not options.proof:
        raise UserError("strict: goes by the proof, which 'proof: false' leaves away; leave one of the two away")
    for name in () if options.proof else ("prompt_file", "max_kl"):
        if getattr(options, name) != getattr(ProofOptions(), name):
            raise UserError(f"{name}: is the proof's, which 'proof: false' leaves away; leave one of the two away")
    if options.max_kl < 0:
        raise UserError(f"max_kl: a divergence is at least 0, this is {options.max_kl}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: is there already, and not empty; choose another name")
    above = next(folder for folder in output.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"{output}: {above} is no folder that can be written; choose another place")
    texts = TEXTS if options.prompt_file is None else lines_of(options.prompt_file)
    device.return_large_blocks()
    model, report, warning = source(), None, ""
    why_none = unprovable(model) if options.proof else ""
    if why_none and options.strict:
        raise UserError(f"strict: nothing is written; no proof: {why_none}")
    before = said(model, texts) if options.proof and not why_none else None
    device.return_freed_memory()
    name, identity = model.path, model.identity
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.{os.getpid()}{output.suffix}")
    try:
        made = write(model, partial)
        links = ", ".join(f"{link['name']} {brief(link['config'])}" for link in chain.describe(model)) or "nothing"
        del model  # before the result is read
        gc.collect()
        device.return_freed_memory()
        if why_none:
            made.lines.append(f"no proof: {why_none}")
            made.figures["no_proof"] = why_none
        if before is not None:
            result = load(partial)
            device.return_freed_memory()
            report = compared(before, result, texts)
            made.lines += report.lines()
            words = before.logs.shape[1]
            if options.prompt_file is None and report.perplexity[0] > words:
                note = (
                    f"a perplexity above the vocabulary's {words} tokens: the model knows nothing like the built-in "
                    "texts, and the proof says little; give texts of its own kind, one a line, with --prompt-file"
                )
                made.lines.append(f"note: {note}")
                made.figures["note"] = note
            warning = report.warning(options.max_kl)
            if options.strict and warning:
                raise UserError(f"strict: nothing is written; {warning}")
            if warning:
                made.figures["warning"] = warning
        if partial.is_dir():
            if options.proof:
                write_json({**made.figures, **(asdict(report) if report else {})}, partial / "proof.json")
            card = [f"# {output.name}", f"Made by burnish {__version__} of `{name}` ({identity}).", f"Applied: {links}"]
            (partial / "README.md").write_text(
                "\n\n".join([*card, *made.lines, *filter(None, [warning])]) + "\n", encoding="utf-8"
            )
        if output.is_dir():
            output.rmdir()
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        partial.unlink(missing_ok=True)
    if warning:
        print(warning, file=sys.stderr)
    if options.json:
        print(json.dumps({**made.figures, "output": str(output), "proof": report and asdict(report)}))
    else:
        print(*made.lines, f"saved to {output}", sep="\n")
    return 0


def unprovable(model: Model) -> str:
    """Why a model says nothing of a text that could be compared, "" where it does."""
    if model.tokenizer is None:
        return "the model has no tokenizer, so that it cannot be given texts"
    return "the model has no head, so that it gives no probabilities to compare" if model.spec.head == "none" else ""


def brief(config: dict[str, Any]) -> str:
    """A technique's config without its long lists, which are in burnish.json."""
    return json.dumps({name: value for name, value in config.items() if not isinstance(value, list | dict)})


def lines_of(path: Path) -> list[str]:
    """The texts of a file, one a line. Raises UserError where there are none."""
    try:
        found = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt_file: {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not found:
        raise UserError(f"prompt_file: {path} has no text")
    return found
