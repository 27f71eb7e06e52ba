"""A network with everything that belongs to it, and what a technique is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from burnish.model.example import Example
from burnish.model.families import FAMILIES
from burnish.model.linear import Weight
from burnish.model.network import Network
from burnish.model.ngram import NGram
from burnish.model.seq2seq import Seq2Seq
from burnish.model.spec import Spec
from burnish.model.transformer import Transformer


def build(spec: Spec, hf_config: dict[str, Any]) -> Network:
    """The network of a spec that `read_spec` gave: the native one, or transformers' own."""
    if spec.family in FAMILIES:
        return Seq2Seq(spec) if spec.paired else Transformer(spec)
    if spec.family == "ngram":
        return NGram(spec, hf_config["entries"])
    from burnish.model.fallback import Foreign
    from burnish.model.fallback_pair import ForeignPair

    return (ForeignPair if spec.paired else Foreign)(spec, hf_config)


@dataclass
class Link:
    """One applied technique with its resolved config."""

    name: str
    config: Any


@dataclass
class Context:
    """What `apply` may use: batches for calibration, a seed, the examples to train on as the data gave them, and who is
    told how far it is, in numbers; with `errors` what rounding cost each projection too, though it must be expanded.
    `following` are the configs of the techniques behind the one that is applied."""

    batches: Sequence[dict[str, Tensor]] = ()
    seed: int = 0
    examples: Sequence[Example] = ()
    report: Callable[[dict[str, Any]], None] = lambda record: None
    errors: bool = False
    following: Sequence[Any] = ()


@dataclass
class Model:
    """A network with its tokenizer, its Hugging Face configs, where it came from and what was applied to it.

    `path` names the base so that it can be found again: a hub id, "pebble", or an absolute folder.

    `identity` is the SHA-256 of the base checkpoint's weights, "" for a model that was never on disk. `merged` is what
    undoes a merge, where it was kept, `adapters` what was loaded onto the base under names. `whole`: a plain checkpoint
    as it was loaded, whatever chain led to it, so that the next techniques begin a chain of their own. `plain` tells
    that `path` holds dense weights without any of the chain, which were read as `dtype` (None: as they are stored), so
    that the chain can be repeated on them.
    """

    net: Network
    tokenizer: Any
    hf_config: dict[str, Any]
    path: str = ""
    identity: str = ""
    generation_config: dict[str, Any] = field(default_factory=dict)
    chain: list[Link] = field(default_factory=list)
    merged: Any = None
    adapters: Any = None
    whole: bool = False
    plain: bool = False
    dtype: torch.dtype | None = None

    @property
    def spec(self) -> Spec:
        return self.net.spec

    @property
    def device(self) -> torch.device:
        return self.net.embed_tokens.weight.device

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Parameters that train, by name."""
        return {name: p for name, p in self.net.named_parameters() if p.requires_grad}

    def parameter_count(self) -> int:
        """Logical weights of the network: a quantised matrix counts its (out, in) elements."""
        stored = {id(p) for m in self.net.modules() if isinstance(m, Weight) for p in m.parameters()}
        plain = sum(p.numel() for p in self.net.parameters() if id(p) not in stored)
        weights = {id(next(m.parameters())): m for m in self.net.modules() if isinstance(m, Weight)}
        return plain + sum(m.shape[0] * m.shape[1] for m in weights.values())
