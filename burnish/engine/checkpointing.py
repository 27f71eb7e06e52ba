"""Checkpoints of a training run: written whole or not at all, and resumed exactly.

`output_dir/checkpoint-<step>/` holds `trainable.safetensors` (what the run changes: trainable parameters and
persistent buffers), `optimizer.safetensors` (AdamW's moments, `<parameter>.exp_avg` and so on),
`best.safetensors` (trainable parameters at the lowest evaluation loss, where the run keeps them) and
`state.json` (counters, position in the data, random state, losses, and the fingerprint of the run). It is
written under a hidden name, synced, and then renamed: a folder with the final name is complete unless the
disk itself lost data, and `latest` checks that too. Resumed losses equal an uninterrupted run's bit for bit
where the device computes the same twice: on a CPU, at the same number of threads.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import threading
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from burnish.config import UserError, make_folder
from burnish.model.example import Example

log = logging.getLogger(__name__)
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass
class Progressed:
    """How far a run is: the JSON-able part of its state."""

    step: int = 0
    epoch: int = 0
    position: int = 0  # steps taken within the epoch
    tokens: int = 0
    seconds: float = 0.0
    window_loss: float = 0.0  # since the last logged step
    window_targets: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    eval_losses: list[tuple[int, float]] = field(default_factory=list)

    @property
    def evaluations_since_best(self) -> int:
        values = [loss for _, loss in self.eval_losses]
        return len(values) - 1 - values.index(min(values)) if values else 0


def data_digest(examples: Sequence[Example]) -> str:
    """SHA-256 over what the loss sees of every example, in order."""
    digest = hashlib.sha256()
    for example in (one for row in examples for one in (row, *(row.choices or ()))):
        for part in (example.ids, example.labels, example.slots, example.token_types):
            digest.update(b"-" if part is None else array("q", part).tobytes() + b";")
        digest.update(repr((example.label, example.virtual_tokens)).encode())
    return digest.hexdigest()


def changing_tensors(net: nn.Module) -> dict[str, Tensor]:
    """Name -> tensor of all that training may change: trainable parameters and persistent buffers."""
    persistent = net.state_dict(keep_vars=True)
    changing = {name: p for name, p in net.named_parameters() if p.requires_grad}
    return changing | {name: buffer for name, buffer in net.named_buffers() if name in persistent}


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """`<parameter>.<moment>` -> tensor, for the parameters that have had a gradient."""
    return {
        f"{name}.{moment}": optimizer.state[parameter][moment]
        for name, parameter in parameters.items()
        if parameter in optimizer.state
        for moment in MOMENTS
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """The inverse of `optimizer_tensors`."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    ordered = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    moments = {
        index: {moment: tensors[f"{name}.{moment}"] for moment in MOMENTS}
        for index, name in enumerate(ordered)
        if f"{name}.step" in tensors
    }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})


@torch.no_grad()
def copy_into(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into those of the same names. Raises UserError where names or shapes differ."""
    odd = sorted(set(targets) ^ set(tensors)) or [n for n in targets if targets[n].shape != tensors[n].shape]
    if odd:
        raise UserError(
            f"checkpoint: its tensors are not this model's, {odd[0]} first; use --overwrite or another output_dir"
        )
    for name, target in targets.items():
        target.copy_(tensors[name])


def random_state(device: torch.device) -> dict[str, str]:
    """torch's generators, as text."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {name: base64.b64encode(bytes(state.tolist())).decode() for name, state in states.items()}


def set_random_state(states: Mapping[str, str], device: torch.device) -> None:
    """The inverse of `random_state`."""
    decoded = {name: torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8) for name, text in states.items()}
    torch.set_rng_state(decoded["cpu"])
    if device.type == "cuda" and "cuda" in decoded:
        torch.cuda.set_rng_state(decoded["cuda"], device)


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint folder, newest first."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("checkpoint-*")]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def save(folder: Path, state: Mapping[str, Any], files: Mapping[str, Mapping[str, Tensor]], keep: int | None) -> Path:
    """Write `folder/checkpoint-<state["step"]>`, then delete all but the newest `keep`; returns its path.

    Raises OSError or SafetensorError if it cannot be written; older checkpoints are then as they were.
    """
    final = folder / f"checkpoint-{state['step']}"
    for leftover in folder.glob(".checkpoint-*.partial"):
        shutil.rmtree(leftover)
    partial = folder / f".{final.name}.partial"
    partial.mkdir(parents=True)
    try:
        for name, tensors in files.items():
            save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, partial / name)
        listing = {name: sorted(tensors) for name, tensors in files.items()}
        (partial / "state.json").write_text(json.dumps({**state, "files": listing}))
        for path in (*partial.iterdir(), partial):
            _sync(path)
    except (OSError, SafetensorError):
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _sync(folder)
    older = [path for step, path in checkpoints(folder) if step < state["step"]]
    for path in older[keep - 1 :] if keep else []:
        shutil.rmtree(path)
    return final


def latest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """(path, state) of the newest complete checkpoint; an incomplete one is passed over with a warning."""
    for _, path in checkpoints(folder):
        try:
            state = json.loads((path / "state.json").read_text())
            for name, keys in state["files"].items():
                with safe_open(path / name, framework="pt") as opened:
                    if sorted(opened.keys()) != keys:
                        raise ValueError(f"{name} lacks tensors")
            return path, state
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            log.warning("%s is incomplete (%s): passed over", path, error)
    return None


def read(path: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one file of a checkpoint."""
    return load_file(path / name)


def start(folder: Path, run: Mapping[str, Any], overwrite: bool) -> tuple[Path, dict[str, Any]] | None:
    """What to resume in `folder`, if anything. Raises UserError if it holds another run, or cannot be
    written.

    With `overwrite`, checkpoints there are deleted.
    """
    make_folder(folder)
    if overwrite:
        for _, path in checkpoints(folder):
            shutil.rmtree(path)
    found = latest(folder)
    if found:
        differs = difference(found[1]["run"], run)
        if differs:
            raise UserError(
                f"output_dir: {folder} holds another run: {differs}; choose another output_dir, "
                "or --overwrite to start anew"
            )
    return found


def difference(saved: Mapping[str, Any], run: Mapping[str, Any], prefix: str = "") -> str:
    """What differs between two nested mappings, in words; "" where nothing does."""
    parts = []
    for key in sorted({*saved, *run}):
        old, new = saved.get(key), run.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            parts.append(difference(old, new, f"{prefix}{key}."))
        elif old != new:
            brief = len(f"{old}{new}") < 100
            parts.append(f"{prefix}{key} was {old}, is {new}" if brief else f"{prefix}{key} differs")
    return ", ".join(filter(None, parts))


@contextmanager
def interrupts(active: bool) -> Iterator[Callable[[], bool]]:
    """Gives a function that tells whether SIGINT or SIGTERM came meanwhile; a second signal acts as it did
    before.
    """
    asked: list[int] = []
    if not active or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def ask(number: int, _: object) -> None:
        asked.append(number)
        restore()
        log.warning("finishing this step, then saving a checkpoint; once more to stop at once")

    previous = {number: signal.getsignal(number) or signal.SIG_DFL for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, ask)
    try:
        yield lambda: bool(asked)
    finally:
        restore()


def state_of(progressed: Progressed, run: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The contents of `state.json`."""
    return {**asdict(progressed), "random": random_state(device), "run": run}


def progressed_of(state: Mapping[str, Any]) -> Progressed:
    """The inverse of `state_of`, for the counters and histories."""
    values = {name: state[name] for name in Progressed.__dataclass_fields__}
    for history in ("losses", "eval_losses"):
        values[history] = [(step, loss) for step, loss in values[history]]
    return Progressed(**values)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
