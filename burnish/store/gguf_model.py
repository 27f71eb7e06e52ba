"""Whole models in GGUF files, both ways."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from burnish.compress.gguf import FORMATS, GGUF, Format, Table
from burnish.config import UserError
from burnish.model.bundle import Model
from burnish.model.families import read_spec
from burnish.model.linear import Dense, Linear, Weight
from burnish.model.network import Network
from burnish.model.norm import Norm
from burnish.store import gguf_tokenizer
from burnish.store.gguf import PLAIN_CODES, QUANTISED, File, Piece, read_gguf, write_gguf
from burnish.store.gguf_names import ROPE_FREQS, as_read, config_of, metadata_of, names, rotary_factors, rows
from burnish.store.tensors import Entry

TABLE = "embed_tokens.storage.blocks"
TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_k", "q5_k", "q6_k")  # that are written
FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, **{name: found.file_type for name, found in FORMATS.items()}}
CODES = {**PLAIN_CODES, **{name: found.code for name, found in FORMATS.items()}}
KNOWN = (Linear, Norm, nn.Embedding, Table)


@dataclass(frozen=True)
class Opened:
    """A file as a checkpoint: its config, its tensors by burnish's stored names, the formats of quantised matrices by
    their modules' paths."""

    file: File
    config: dict[str, Any]
    tensors: dict[str, Entry]
    formats: dict[str, Format]

    def without_head(self) -> Opened:
        """The same for a network with another head, or none."""
        tensors = {name: entry for name, entry in self.tensors.items() if not name.startswith("lm_head.")}
        return replace(self, tensors=tensors, formats={x: y for x, y in self.formats.items() if x != "lm_head"})

    def rebuild(self, net: Network, dtype: torch.dtype | None) -> None:
        """Put storage for the quantised matrices into the network; an embedding's rows are expanded to `dtype`, float32
        by default."""
        for path, found in self.formats.items():
            module = net.get_submodule(path)
            if path == "embed_tokens":
                storage = GGUF.empty(net.spec.vocab_size, net.spec.hidden_size, found.name)
                net.embed_tokens = Table(storage, dtype or torch.float32)  # type: ignore[assignment]
            elif isinstance(module, Linear):
                module.weight = GGUF.empty(module.out_features, module.in_features, found.name)
            else:
                raise UserError(f"{self.file.path}: {path} is quantised to {found.name}, where floats are needed")
        net.tie()

    @property
    def generation_config(self) -> dict[str, Any]:
        found = gguf_tokenizer.ends(self.file)
        return {"eos_token_id": found} if found else {}


def opened(path: Path) -> Opened:
    """The checkpoint in a GGUF file. Raises UserError, in one line, for a file that is not whole, lies, or holds what
    is not supported."""
    file = read_gguf(path)
    config = config_of(file)
    spec = read_spec(config, "lm")
    paths = {own: native for native, own in names(spec).items()}
    tensors: dict[str, Entry] = {}
    formats: dict[str, Format] = {}
    for name, stored in file.tensors.items():
        stem, _, leaf = name.rpartition(".")
        native = paths.get(stem, stem)
        key = f"{native}.{leaf}"
        if name == ROPE_FREQS:
            continue
        if stored.code in QUANTISED and stem in paths:
            formats[native] = QUANTISED[stored.code]
            key = TABLE if native == "embed_tokens" else f"{key}.blocks"
        tensors[key] = as_read(stored.entry, rows(spec, native))
    return Opened(file, config, tensors, formats)


def contents(model: Model, kind: str) -> tuple[dict[str, Any], dict[str, Piece], list[str]]:
    """The metadata, tokenizer included, and tensors of a model's file, matrices as `kind`, one of TYPES; notes for the
    reader. The model may be on the meta device, and without a tokenizer.

    Norms, biases and learned positions are float32. Rows that are no whole blocks of 256 take q8_0, and none of 32 f16.
    Raises UserError for what llama.cpp does not know, and for techniques that are not folded into the weights.
    """
    net, spec = model.net, model.spec
    metadata = metadata_of(spec)
    metadata |= {"general.name": Path(model.path).stem or "model", "general.file_type": FILE_TYPES[kind]}
    if kind in FORMATS:
        metadata["general.quantization_version"] = 2
    if model.tokenizer is not None:
        metadata |= gguf_tokenizer.written(model.tokenizer, spec.vocab_size)
    pieces: dict[str, Piece] = {}
    changed: Counter[str] = Counter()
    for native, name in names(spec).items():
        if native == "lm_head" and spec.tied and spec.family != "gpt_neox":  # whose head llama.cpp always reads
            continue
        module = net.get_submodule(native)
        if type(module) not in KNOWN or model.adapters is not None or len(net.techniques) or net.pattern is not None:
            on = ", ".join(link.name for link in model.chain) or "an adapter"
            raise UserError(f"gguf: {on} is not in the weights, all that a GGUF file holds; see burnish merge")
        weight: Any = module.storage if isinstance(module, Table) else module.weight
        fixed = native == "embed_positions" or len(weight.shape) < 2
        own = "f32" if fixed else fitting(kind, weight.shape[1])
        if own != kind and not fixed:
            changed[f"are {own}: their rows are no whole blocks of {kind}"] += 1
        if isinstance(weight, Weight) and not isinstance(weight, Dense) and stored_as(weight) != own:
            changed["were quantised otherwise, and are expanded first"] += 1
        order = rows(spec, native)
        give = partial(values, weight, own, order)
        pieces[f"{name}.weight"] = Piece(CODES[own], tuple(weight.shape), give)
        bias: Any = getattr(module, "bias", None)
        if bias is not None:
            pieces[f"{name}.bias"] = Piece(CODES["f32"], tuple(bias.shape), partial(values, bias, "f32", order))
    if dict(spec.rope_scaling).get("rope_type") == "llama3":
        factors = rotary_factors(spec)
        pieces[ROPE_FREQS] = Piece(CODES["f32"], tuple(factors.shape), factors.detach)
    notes = [f"{count} matrices {what}" for what, count in changed.items()]
    if spec.sliding_layers and spec.sliding_window < spec.max_positions:
        notes.append(f"its context is {spec.sliding_window} tokens, the model's window, which llama.cpp does not know")
    return metadata, pieces, notes


def write(model: Model, path: Path, kind: str) -> list[str]:
    """Write the model's file; notes for the reader. Raises UserError as `contents` does."""
    metadata, pieces, notes = contents(model, kind)
    write_gguf(path, metadata, pieces)
    return notes


def fitting(kind: str, columns: int) -> str:
    """The type for rows of `columns` weights."""
    choices = (kind, "q8_0", "f16")
    return next(name for name in choices if name not in FORMATS or columns % FORMATS[name].size == 0)


def stored_as(weight: Any) -> str:
    """The name of a GGUF weight's format, "" of anything else."""
    return weight.format.name if isinstance(weight, GGUF) else ""


def values(stored: Any, kind: str, order: Tensor | None) -> Tensor:
    """A weight or a bias in the file's order of rows: floats, or blocks."""
    if kind in FORMATS and stored_as(stored) == kind:
        return stored.blocks if order is None else stored.blocks[order]
    dense = (stored.dequantize() if isinstance(stored, Weight) else stored).detach()
    dense = dense if order is None else dense[order]
    return GGUF.quantize(dense, kind).blocks if kind in FORMATS else dense
