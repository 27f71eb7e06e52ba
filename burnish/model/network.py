"""What the engine, the techniques and the store ask of a network, whoever wrote its layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from burnish.model.cache import KVCache, Prefix
from burnish.model.patterns import Pattern
from burnish.model.spec import Spec


@dataclass(frozen=True)
class Layout:
    """How a network's modules and tensors are called and laid out in checkpoints of its family.

    `modules` and `tensors` lead from burnish's names to the checkpoint's; parameters that are not in `tensors` are a
    technique's. `transposed` are parameters stored as (in, out), `copies` stored copies of other stored tensors,
    `spare` stored tensors that may be left unread, `ignored` patterns of more of them. `prefix` is left away by
    checkpoints of the body alone, `aliases` are other beginnings of names. `spare_tokens` may lie beyond the embedding.
    """

    modules: Mapping[str, str]
    tensors: Mapping[str, str]
    prefix: str
    architecture: str
    lora_targets: tuple[str, ...]
    transposed: frozenset[str] = frozenset()
    spare: frozenset[str] = frozenset()
    ignored: tuple[str, ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict)
    aliases: tuple[tuple[str, str], ...] = ()
    spare_tokens: tuple[str, ...] = ()


class Network(nn.Module):
    """Hidden states by `forward`, logits by `logits`; techniques change it from outside.

    Each of `body` begins the paths of the layers' projections. `fixed` says why techniques do not apply, if so, and
    `runs_only` why nothing can be made of it but answers. `step(ids, cache)`, where a placement gives one, takes the
    last tokens (B, 1) of rows one step on, or gives None: see `place/graphed.py`.
    """

    spec: Spec
    body: tuple[str, ...]
    fixed = runs_only = ""
    techniques: nn.ModuleDict
    compute_dtype: torch.dtype | None
    gradient_checkpointing: bool
    pattern: Pattern | None = None
    step: Callable[[Tensor, KVCache], Any] | None = None
    if TYPE_CHECKING:
        embed_tokens: nn.Embedding
        layers: nn.ModuleList

    @property
    def all_layers(self) -> list[nn.Module]:
        """The layers, an encoder-decoder's decoder included."""
        return list(self.layers)

    @property
    def layout(self) -> Layout:
        raise NotImplementedError

    def read_converted(self, folder: Path) -> dict[str, Tensor] | None:
        """The tensors of a checkpoint that stores them in another layout, by `layout`'s names; else None."""
        return None

    def converted(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by `layout`'s names, as a checkpoint stores them."""
        return tensors

    def obey(self, pattern: Pattern) -> None:
        """Let every layer's self-attention see only what `pattern` shows."""
        self.pattern = pattern

    def set_head(self, spec: Spec) -> None:
        """Give the network the head that `spec` names; the body stays, and so does a pooler. New matrices are not
        filled."""
        raise NotImplementedError

    def head_modules(self) -> list[nn.Module]:
        """What stands on the body."""
        raise NotImplementedError

    def tie(self) -> None:
        """Share what the model shares: the embedding with the language-model head, mostly."""
        raise NotImplementedError

    def record(self, embeds: Tensor) -> tuple[Tensor, Prefix] | None:
        """Hidden states (1, n, hidden) of embeddings (1, n, width), and their keys and values to stand before rows
        that all begin with them; None where that would not be the same."""
        return None

    def levels(self) -> dict[str, int]:
        """How far up every parameter stands: 0 the embeddings, then the layers, an encoder's before a decoder's, and
        highest what stands on them, the final norm and the head. A tied head is the embedding."""
        depths = {id(p): depth for depth, layer in enumerate(self.all_layers, 1) for p in layer.parameters()}
        top, last = len(self.all_layers) + 1, 0
        heads = {id(p) for module in self.head_modules() for p in module.parameters()}
        heads -= {id(p) for p in self.embed_tokens.parameters()}
        found = {}
        for name, parameter in self.named_parameters():
            if id(parameter) in depths:
                found[name] = last = depths[id(parameter)]
            elif not name.startswith("techniques."):  # between stacks it belongs to the one before
                found[name] = top if id(parameter) in heads or last == top - 1 else last
        return found

    def own(self, prefix: Prefix) -> Prefix:
        """The part of a prefix that the heads here see."""
        return prefix

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        """An empty cache for `capacity` tokens a row."""
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., hidden) -> (..., vocab) for language models, (..., labels) for classifiers."""
        raise NotImplementedError

    def stored_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds: parameters, and the buffers that belong to it."""
        kept = {
            f"{path}.{name}" if path else name: buffer
            for path, module in self.named_modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name not in module._non_persistent_buffers_set
        }
        return {**dict(self.named_parameters()), **kept}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the activations."""
        return self.compute_dtype or self.embed_tokens.weight.dtype

    def embed(self, input_ids: Tensor) -> Tensor:
        """input_ids (B, T) -> token embeddings (B, T, width), without positions."""
        return self.embed_tokens(input_ids).to(self.dtype)

    def positions(
        self,
        batch: int,
        length: int,
        valid: Tensor | None,
        position_ids: Tensor | None,
        cache: KVCache | None,
        prefix: Prefix | None,
        device: torch.device,
    ) -> Tensor:
        """(B, T) positions of the new tokens; what the prefix or the cache holds comes before them."""
        if position_ids is not None:
            positions = position_ids.expand(batch, length)
        elif valid is not None:
            positions = (valid.long().cumsum(1) - 1).clamp(min=0)
        else:
            positions = torch.arange(length, device=device).expand(batch, length)
        if cache is not None and position_ids is None:
            positions = cache.after(positions)
        if prefix is not None:
            positions = positions + (prefix.size if prefix.lengths is None else prefix.lengths)
        return positions

    def pool(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T, hidden) -> (B, hidden): the first token of an encoder or the mean of its real ones, as the spec says;
        the last real token of a decoder."""
        if self.spec.mean_pool:
            share = attention_mask[..., None].to(hidden.dtype)
            return (hidden * share).sum(1) / share.sum(1)
        steps = torch.arange(hidden.shape[1], device=hidden.device)
        real = attention_mask.long()
        chosen = (real * steps if self.spec.causal else real).argmax(dim=1)
        return hidden[torch.arange(len(hidden), device=hidden.device), chosen]
