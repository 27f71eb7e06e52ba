"""`burnish plan`: memory predicted from a model's shape, before anything is loaded.

Per parameter: 4 bytes of float32 master, 4 of gradient and 8 of AdamW's two moments where it trains, its storage where
it is frozen. Activations are counted from what a layer keeps for its backward pass; they are an estimate.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from burnish import chain, device
from burnish.compress.grouped import BITS
from burnish.config import Bytes, UserError
from burnish.model.bundle import Model, build
from burnish.model.families import read_spec
from burnish.model.linear import Dense, Weight
from burnish.store import gguf_model
from burnish.store.checkpoint import contents, skeleton, tokenizer_of
from burnish.store.gguf import heading
from burnish.store.gguf_model import TYPES
from burnish.store.hub import resolve
from burnish.store.identity import weight_files
from burnish.store.matching import announce, match
from burnish.store.sources import has_tokenizer, read_json, sources
from burnish.store.tokenizer import load_tokenizer

MIB = 1 << 20
FORMATS: dict[str, list[Any]] = {
    "": [],
    "int8": ["int8"],
    "fp8": ["fp8"],
    "nf4": [{"nf4": {"double_quant": False}}],
    "nf4, double quantised": ["nf4"],
    "fp4, double quantised": ["fp4"],
    **{f"int_groups or gptq, {bits} bits": [{"int_groups": {"bits": bits}}] for bits in sorted(BITS, reverse=True)},
}


@dataclass(frozen=True)
class PlanConfig:
    """One model and one chain of techniques."""

    positional: ClassVar[str] = "model"
    model: str = field(default="pebble", metadata={"help": "checkpoint folder, hub id or 'pebble'"})
    techniques: list[Any] = field(default_factory=list, metadata={"help": "chain, as in '[nf4, {lora: {r: 8}}]'"})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "rows per step"})
    max_length: int = field(default=512, metadata={"help": "tokens per row"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "keep one activation per layer"})
    optim: Literal["adamw", "paged_adamw"] = field(default="adamw", metadata={"help": "the optimiser, as in tune"})
    optim_memory_limit: Bytes = field(default=Bytes(64_000_000), metadata={"help": "bytes of paged_adamw's pages"})
    formats: bool = field(
        default=False, metadata={"help": "instead: the model's size in every format that burnish writes"}
    )
    json: bool = field(default=False, metadata={"help": "print JSON"})


@dataclass(frozen=True)
class Plan:
    """Bytes that running and training a chain will take, and parameters."""

    parameters: int
    trainable: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    cache: int

    @property
    def inference(self) -> int:
        return self.weights + self.cache

    @property
    def training(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def shadow(source: str | Path) -> Model:
    """A checkpoint's model with its chain, without storage (torch's meta device), by its headers. A folder may have
    nothing but a config.json, whose `dtype` then tells float32 from 16 bits."""
    folder = resolve(source)
    known = [*weight_files(folder), *(folder / name for name in ("burnish.json", "adapter_config.json"))]
    if not any(path.exists() for path in known):
        config = read_json(folder / "config.json")
        kind = torch.float32 if (config.get("dtype") or config.get("torch_dtype")) == "float32" else torch.bfloat16
        with torch.device("meta"):
            net = build(read_spec(config), config).to(kind)
        return Model(net, load_tokenizer(folder) if has_tokenizer(folder) else None, config)
    found = sources(folder)
    if found.chain or found.adapter is not None or found.quantization is not None or found.gguf is not None:
        model, stored, others = skeleton(found, None, (), None)
        announce(model.net, match(model, stored, others, folder, None))
        if found.adapter is not None:
            chain.apply(model, chain.repeated(found.adapter.saved))
    else:
        itemsize = max((entry.dtype.itemsize for entry in found.entries.values()), default=2)
        with torch.device("meta"):
            net = build(read_spec(found.hf_config, stored=found.entries), found.hf_config)
        model = Model(net.to(torch.bfloat16 if itemsize == 2 else torch.float32), None, found.hf_config)
    model.tokenizer = tokenizer_of(found)
    return model


def plan(
    source: str | Path,
    techniques: Sequence[Any] = (),
    rows: int = 8,
    tokens: int = 512,
    gradient_checkpointing: bool = False,
    optimizer_limit: int | None = None,
) -> Plan:
    """Predict for the checkpoint `source` with a chain and batches of `rows` x `tokens`; of a paged optimiser's state
    at most `optimizer_limit` bytes are in memory.

    Only headers are read: the chain is applied to a network without storage.
    """
    model = chain.apply(shadow(source), list(techniques))
    spec, itemsize = model.spec, model.net.dtype.itemsize
    trainable = sum(p.numel() for p in model.trainable().values())
    stored = sum(p.numel() * p.element_size() for p in model.net.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.trainable().values())
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    layer = (18 if spec.sandwich_norm else 8) * spec.hidden_size + 4 * queries + 4 * spec.intermediate_size
    layer += 4 * (queries + keys) if spec.qk_norm else 0
    layers = spec.num_layers + spec.decoder_layers * spec.paired
    kept = spec.hidden_size if gradient_checkpointing else layer
    active = rows * tokens * itemsize * (layers * kept + 4 * spec.hidden_size) if trainable else 0
    if spec.attention_softcap and trainable:  # the scores themselves are kept: capped, and as float32 and cast weights
        scores = rows * spec.num_heads * tokens**2 * (2 * itemsize + 4)
        active += scores if gradient_checkpointing else spec.num_layers * scores
    cached = 2 * spec.decoder_layers if spec.paired else spec.num_layers  # a source of `tokens` and a target of as many
    cache = 2 * cached * keys * rows * tokens * itemsize
    return Plan(
        parameters=model.parameter_count(),
        trainable=trainable,
        weights=stored - trained + (4 * trainable if trainable else 0),
        gradients=4 * trainable,
        optimizer=8 * trainable if optimizer_limit is None else min(8 * trainable, optimizer_limit),
        activations=active,
        cache=cache if spec.kind != "encoder" else 0,
    )


@dataclass(frozen=True)
class Size:
    """A model in a format that burnish writes: bytes of its weights' file, of running it, and bits a weight."""

    format: str
    bytes: int
    memory: int
    bits_per_weight: float


def sizes(source: str | Path, rows: int = 1, tokens: int = 512) -> list[Size]:
    """The checkpoint `source` in every format, as the code that writes it makes it of a network without storage; a
    folder may have nothing but a config.json. Memory is of the weights, and of the cache of `rows` x `tokens`."""
    plain = plan(source, rows=rows, tokens=tokens)
    count, cache = plain.parameters, plain.cache
    unquantised = shadow(source)
    if any(isinstance(part, Weight) and not isinstance(part, Dense) for part in unquantised.net.modules()):
        raise UserError(f"{source}: is stored in fewer bits; give the model that it was made of for its formats")
    found: list[Size] = []
    for name, techniques in FORMATS.items():
        model = chain.apply(shadow(source), techniques)
        name = name or str(model.net.dtype).removeprefix("torch.")
        nbytes, weights = contents(model).nbytes, sum(p.numel() * p.element_size() for p in model.net.parameters())
        found.append(Size(name, nbytes, weights + cache, 8 * nbytes / count))
    with suppress(UserError):  # what GGUF cannot hold
        for kind in TYPES:
            metadata, pieces, _ = gguf_model.contents(unquantised, kind)
            nbytes, weights = heading(metadata, pieces)[1], sum(piece.nbytes for piece in pieces.values())
            found.append(Size(f"GGUF {kind}", nbytes, weights + cache, 8 * nbytes / count))
    return found


def check_memory(
    folder: Path, chains: Sequence[Sequence[Any]], rows: int = 1, tokens: int = 64, **options: Any
) -> None:
    """Raise UserError when this machine's free memory cannot hold the model with one of the chains; `options` are
    `plan`'s.

    A chain that does not fit the model is passed over: it says so itself when it is applied.
    """
    free = device.available_memory()
    for techniques in chains:
        try:
            needed = plan(folder, techniques, rows, tokens, **options)
        except UserError:
            continue
        most = max(needed.inference, needed.training)
        if most > free:
            raise UserError(
                f"{folder} with {list(techniques) or 'no technique'}: needs about {most // MIB} MiB, {free // MIB} MiB "
                "are free; choose a smaller model, nf4 with lora, or another machine"
            )


def run(config: PlanConfig) -> int:
    """Print the prediction beside the memory that is free."""
    if config.formats:
        return run_formats(config)
    found = plan(
        config.model,
        config.techniques,
        config.per_device_train_batch_size,
        config.max_length,
        config.gradient_checkpointing,
        config.optim_memory_limit if config.optim == "paged_adamw" else None,
    )
    free = device.available_memory()
    if config.json:
        print(json.dumps({**asdict(found), "inference": found.inference, "training": found.training, "free": free}))
        return 0
    print(f"parameters  {found.parameters:>14,}   trainable {found.trainable:,}")
    for name in ("weights", "gradients", "optimizer", "activations", "cache"):
        print(f"{name:<11} {getattr(found, name) / MIB:>10,.1f} MiB")
    for name, needed in (("inference", found.inference), ("training", found.training)):
        fits = "fits" if needed <= free else "does not fit"
        print(f"{name:<11} {needed / MIB:>10,.1f} MiB   {fits} in the {free / MIB:,.0f} MiB that are free")
    return 0


def run_formats(config: PlanConfig) -> int:
    """Print the size in every format beside the memory that is free."""
    if config.techniques:
        raise UserError("techniques: formats are of the plain model; leave one of both away")
    found = sizes(config.model, config.per_device_train_batch_size, config.max_length)
    free = device.available_memory()
    if config.json:
        print(json.dumps({"formats": [asdict(size) for size in found], "free": free}))
        return 0
    print(f"{'format':<26}{'file':>14}{'memory to run':>16}{'bits a weight':>16}")
    for size in found:
        fits = "" if size.memory <= free else "   does not fit"
        shown = f"{size.bytes / 1e6:>11,.1f} MB{size.memory / 1e6:>13,.1f} MB{size.bits_per_weight:>16.2f}"
        print(f"{size.format:<26}{shown}{fits}")
    tokens = f"{config.per_device_train_batch_size} x {config.max_length} tokens"
    print(f"memory: weights, and the cache of {tokens}; {free / 1e6:,.0f} MB are free")
    return 0
