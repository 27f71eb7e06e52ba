"""Calibration data, and a model taken layer by layer: what a layer is given by the layers before it, as they are now.

Only one layer's weights need to be in memory: GPTQ (arXiv 2210.17323), section 3.3. The data's hidden states grow with
the text and not with the model: on a CPU they wait in a file without a name, and are read a batch at a time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from io import BufferedRandom
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from burnish import device, world
from burnish.config import UserError
from burnish.model.attention import Attention
from burnish.model.bundle import Context, Model
from burnish.model.linear import Linear, Unread
from burnish.model.network import Network
from burnish.model.transformer import MLP
from burnish.native.products import MULTIPLIES_BFLOAT16

TOKENS = 2048  # of a batch
LONGEST = 1 << 20  # of a built-in sample, in documents
KEPT = 1 << 28  # bytes of what one projection reads that may be kept
PIECE, ROWS = 1 << 19, 128  # weights that are worked on together, and at least so many rows
HELP = {"nsamples": "rows that calibrate", "max_length": "tokens of each of them"}


class Stop(Exception):
    """Ends a forward pass that has shown what it was run for."""


class Away:
    """A tensor that waits at the end of a file, or, where it is not on a CPU, in memory."""

    def __init__(self, tensor: Tensor, file: BufferedRandom):
        self.shape, self.file = tensor.shape, file
        self.start, self.held = file.seek(0, 2), tensor
        if tensor.device.type == "cpu":
            self.held = tensor.new_empty(0)
            try:
                file.write(as_bytes(tensor.contiguous()))
            except OSError as error:
                folder, nbytes = tempfile.gettempdir(), tensor.nbytes
                raise UserError(
                    f"{folder}: {nbytes} bytes of calibration states cannot be written: {error.strerror}; name a "
                    "folder with more room in TMPDIR, or take less text"
                ) from None

    def back(self) -> Tensor:
        """In memory of its own, where it was in the file."""
        if self.held.shape == self.shape:
            return self.held
        tensor = self.held.new_empty(self.shape)
        self.file.seek(self.start)
        self.file.readinto(as_bytes(tensor))
        return tensor


def scratch() -> BufferedRandom:
    """A file without a name, which takes no room once nothing refers to it."""
    return tempfile.TemporaryFile()  # type: ignore[return-value]  # noqa: SIM115  closed with its last reader


def as_bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


@dataclass
class Call:
    """What a layer is called with for one batch: hidden states, and all else.

    `kept` has what the last projection of an attention or feed-forward reads, so that it is not computed again. Both
    wait in `file`.
    """

    away: Away
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    file: BufferedRandom
    kept: dict[nn.Module, Away] = field(default_factory=dict)

    @property
    def x(self) -> Tensor:
        return self.away.back()

    def run(self, layer: nn.Module) -> Tensor:
        """The layer's hidden states."""
        found = [(part, last(part)) for part in layer.modules()]
        parts = [(part, end) for part, end in found if end is not None and end in self.kept]
        for part, end in parts:
            part.forward = partial(self.end, end)
        try:
            out = layer(self.x, *self.args, **self.kwargs)
        finally:
            for part, _ in parts:
                del part.forward
        return out[0] if isinstance(out, tuple) else out

    def end(self, linear: nn.Module, *given: Any) -> Tensor:
        return linear(self.kept[linear].back())


def last(part: nn.Module) -> nn.Module | None:
    """The last projection of an attention or feed-forward of a native network."""
    if isinstance(part, Attention):
        return part.o_proj
    return part.down_proj if isinstance(part, MLP) else None


def batches(model: Model, context: Context, nsamples: int, max_length: int, technique: str) -> list[dict[str, Tensor]]:
    """The context's batches; or rows of at most `max_length` tokens of its examples, joined, or else of the built-in
    sample. Raises UserError where that is no row."""
    if context.batches:
        return list(context.batches)
    if nsamples < 1 or max_length < 2:
        raise UserError(f"technique '{technique}': nsamples must be at least 1, and max_length at least 2 tokens")
    length = min(max_length, model.spec.max_positions or max_length)
    wanted = nsamples * length
    if context.examples:
        ids = list(islice((token for example in context.examples for token in example.ids), wanted))
    else:
        ids = sample(model.tokenizer, wanted)
    rows = len(ids) // length
    if not rows:
        raise UserError(
            f"technique '{technique}': the calibration text has {len(ids)} tokens, fewer than one row of {length}; "
            "give more text, or a lower max_length"
        )
    together = torch.tensor(ids[: rows * length], device=model.device).view(rows, length)
    return [as_batch(model, part) for part in together.split(max(1, TOKENS // length))]


def as_batch(model: Model, ids: Tensor) -> dict[str, Tensor]:
    """Rows of tokens (B, T) as the network takes them; of an encoder-decoder they are source and target."""
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids, dtype=torch.bool)}
    if model.spec.paired:
        batch |= {f"source_{name}": tensor for name, tensor in batch.items()}
    return batch


def sample(tokenizer: Any, wanted: int) -> list[int]:
    """Tokens of the made-up world's corpus."""
    ids: list[int] = []
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    for document in islice(world.documents(), LONGEST):
        texts = [document["text"]] if "text" in document else [turn["content"] for turn in document["messages"]]
        for text in texts:
            ids += [*tokenizer(text, add_special_tokens=False)["input_ids"], *end]
        if len(ids) >= wanted:
            break
    return ids[:wanted]


@contextmanager
def computing(net: Network) -> Iterator[None]:
    """The block computes without gradients, and in float32 where the processor has no instructions for bfloat16."""
    kind = net.compute_dtype
    if net.embed_tokens.weight.device.type == "cpu" and net.dtype == torch.bfloat16 and not MULTIPLIES_BFLOAT16:
        net.compute_dtype = torch.float32
    try:
        with torch.no_grad():
            yield
    finally:
        net.compute_dtype = kind


def feed(net: Network, batch: dict[str, Tensor]) -> Tensor:
    """The network's hidden states of a batch."""
    source = {}
    if "source_input_ids" in batch:
        source = {
            "source_embeds": net.embed(batch["source_input_ids"]),
            "source_mask": batch["source_attention_mask"],
        }
    return net(batch["input_ids"], attention_mask=batch.get("attention_mask"), **source)


def in_turn(model: Model, data: Sequence[dict[str, Tensor]], technique: str) -> Iterator[tuple[nn.Module, list[Call]]]:
    """Every layer with its calls; when it is asked for the next one, those are run through the layer as it is then.

    Weights that are still in their files are in memory for their layer's turn; those that have not been stored in
    another form by its end are left again.
    """
    device.return_large_blocks()
    net, first = model.net, list(model.net.layers)
    for stack in (first, [layer for layer in net.all_layers if layer not in first]):
        if not stack:
            continue
        rest = net.all_layers if stack == first else stack
        states, given, file = [], [], scratch()
        for batch in data:
            x, others = record(net, batch, stack, rest, technique)
            states.append(Away(x, file))
            given.append(others)
        for index, layer in enumerate(stack):
            hold(layer)
            file = scratch()  # the one before is gone when nothing waits in it
            calls = [Call(x, *others[index], file) for x, others in zip(states, given, strict=True)]
            yield layer, calls
            for call in calls:
                call.away = Away(call.run(layer), file)
            states = [call.away for call in calls]
            release(layer)
            device.return_freed_memory()


def hold(layer: nn.Module) -> None:
    """Bring the weights of a layer in that are in their files. No frame that stays refers to them: what is stored in
    another form must be gone at once."""
    for module in layer.modules():
        if isinstance(module, Unread):
            module.hold()


def release(layer: nn.Module) -> None:
    """Leave the weights of a layer again that `hold` brought in, and that are still what they were."""
    for module in layer.modules():
        if isinstance(module, Unread):
            module.release()


def pieces(dense: Tensor) -> Iterator[Tensor]:
    """dense (out, in) some rows at a time, in float32, so that what is made of them is small beside the matrix."""
    return (part.float() for part in dense.detach().split(max(ROWS, PIECE // dense.shape[1])))


def record(
    net: Network, batch: dict[str, Tensor], stack: Sequence[nn.Module], rest: Sequence[nn.Module], technique: str
) -> tuple[Tensor, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """The states before the layers of `stack`, and with what else each is called, where layers of `rest` give back what
    they are given."""
    calls: dict[nn.Module, tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = {}

    def shows(layer: nn.Module, as_tuple: bool) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            x = args[0] if args else kwargs.pop("hidden_states")
            calls[layer] = x, args[1:], kwargs
            return (x, None, None) if as_tuple else x

        return forward

    for as_tuple in (False, True):  # transformers' layers may give their states with others
        calls.clear()
        for layer in rest:
            layer.forward = shows(layer, as_tuple)
        try:
            feed(net, batch)
        except (ValueError, TypeError, IndexError, RuntimeError, AttributeError):
            if as_tuple or not net.spec.family or not hasattr(net, "hf"):
                raise
            continue
        finally:
            for layer in rest:
                del layer.forward
        if len({x.shape for x, _, _ in calls.values()}) == 1 and all(layer in calls for layer in stack):
            return calls[stack[0]][0], [calls[layer][1:] for layer in stack]
    raise UserError(
        f"technique '{technique}': the layers of this {net.spec.family} model do not follow each other plainly, so "
        "that they cannot be calibrated one by one; use int_groups, int8 or nf4"
    )


def stages(layer: nn.Module, call: Call) -> list[list[tuple[str, Linear]]]:
    """The layer's projections as they run, those together that read the same activations one after the other."""
    found: list[list[tuple[str, Linear]]] = []
    last: list[Tensor] = []

    def see(name: str, linear: Linear, x: Tensor) -> None:
        if any(linear is known for stage in found for _, known in stage):
            return
        if last and last[0] is x:
            found[-1].append((name, linear))
        else:
            found.append([(name, linear)])
        last[:] = [x]

    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name, module=module: see(name, module, args[0]))
        for name, module in layer.named_modules()
        if isinstance(module, Linear)
    ]
    try:
        call.run(layer)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def inputs(layer: nn.Module, calls: Sequence[Call], linear: Linear) -> Iterator[Tensor]:
    """What a projection of the layer reads in each call, (tokens, in); the layer is run as far as that."""
    seen: list[Tensor] = []
    ends = any(last(part) is linear for part in layer.modules())
    size = sum(call.away.shape[:-1].numel() for call in calls) * linear.in_features * 4
    keep = ends and size <= KEPT

    def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0].reshape(-1, args[0].shape[-1]))
        raise Stop

    hook = linear.register_forward_pre_hook(stop)
    try:
        for call in calls:
            try:
                call.run(layer)
            except Stop:
                x = seen.pop()
                if keep:
                    call.kept[linear] = Away(x, call.file)
                yield x
    finally:
        hook.remove()
