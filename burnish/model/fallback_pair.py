"""Encoder-decoders without a native family (BART, Pegasus, Marian, M2M100), through transformers' own modelling code.

What differs from `Foreign`: two stacks of layers, and a source that is encoded first. Limits: these models count
positions by themselves, so that rows are padded on the right and no prefix stands before them; both sides share one
embedding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from burnish.config import UserError
from burnish.model.fallback import Foreign
from burnish.model.patterns import Window
from burnish.model.registry import showing
from burnish.model.seq2seq import Source
from burnish.model.spec import Spec


class ForeignPair(Foreign):
    """A transformers encoder-decoder with a language-model head as a Network."""

    factor: float | None = None  # what its encoder multiplies embeddings by, once it was tried

    def __init__(self, spec: Spec, hf_config: dict[str, Any]):
        super().__init__(spec, hf_config)
        if len(self.stacks) != 2 or not self.root:
            raise UserError(f"config.json: a {spec.family} model keeps its encoder and decoder in a way of its own")
        tables: list[Any] = [part for part in self.modules() if hasattr(part, "create_weight")]
        for part in tables:  # sines and cosines, which checkpoints may leave away
            with torch.device("cpu"):
                table = part.create_weight()
            del part.weight
            part.register_buffer("weight", table)

    @staticmethod
    def find_stacks(base: nn.Module, spec: Spec) -> tuple[str, ...]:
        sides = {path: base.get_submodule(path) for path in ("encoder", "decoder") if path in base._modules}
        return tuple(
            f"{path}.{name}"
            for path, side in sides.items()
            for name, part in side.named_children()
            if isinstance(part, nn.ModuleList)
        )

    @property
    def all_layers(self) -> list[nn.Module]:
        return [layer for path in self.stacks for layer in self.hf.base_model.get_submodule(path).children()]

    def new_states(self) -> Any:
        from transformers import DynamicCache, EncoderDecoderCache

        return EncoderDecoderCache(DynamicCache(), DynamicCache())

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        *,
        source_embeds: Tensor | None = None,
        source_mask: Tensor | None = None,
        cache: Any = None,
        **given: Any,
    ) -> Tensor:
        """Hidden states (B, T, hidden) of T new target tokens; arguments as the native network's."""
        if source_embeds is None:
            source = cache.source
        else:
            source = self.read(source_embeds, source_mask, cache is not None)
            if cache is not None:
                cache.source = source
        return super().forward(input_ids, cache=cache, source=source, **given)

    def read(self, embeds: Tensor, mask: Tensor | None, kept: bool) -> Source:
        """The encoded source."""
        valid = None if mask is None or bool(mask.all()) else mask.bool()
        self.check_padding(valid)
        factor = self.embedding_factor() if self.factor is None else self.factor
        x = embeds.to(self.dtype) * factor
        positions = self.positions(len(x), x.shape[1], valid, None, None, None, x.device)
        with self.precision(), showing(self.hf.config, self.shown(self.spec, positions, valid), causal=False):
            states = self.hf.get_encoder()(inputs_embeds=x, attention_mask=None if valid is None else valid.long())[0]
        return Source(states, None if valid is None else valid[:, None, None], kept)

    @torch.no_grad()
    def embedding_factor(self) -> float:
        """What ids are multiplied by and embeddings not: nothing, or `embed_scale` (Pegasus).

        Tried once, on four tokens. Raises UserError where neither gives the logits that the model itself gives.
        """
        training, ids = self.training, torch.arange(4, device=self.embed_tokens.weight.device)[None]
        pattern, self.pattern = self.pattern, None
        ids = (ids + self.hf.config.pad_token_id + 1) % self.spec.vocab_size  # padding has no position
        scale = getattr(self.hf.get_encoder(), "embed_scale", 1.0)
        try:
            self.eval()
            with self.precision():
                want = self.hf(input_ids=ids, decoder_input_ids=ids).logits
            for self.factor in (scale, 1.0):
                got = self.logits(self(input_ids=ids, source_embeds=self.embed(ids)))
                if (got - want).norm() <= 0.02 * want.norm():
                    return self.factor
            self.factor = None
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
            self.factor = None
        finally:
            self.train(training)
            self.pattern = pattern
        raise UserError(f"a {self.spec.family} model computes in a way of its own: its logits cannot be reproduced")

    def trial(self) -> tuple[Tensor, Tensor]:
        """What a token that sees only itself gives, on both sides, beside two kinds of others."""
        self.pattern = Window(1)
        ids = torch.arange(8, device=self.embed_tokens.weight.device).view(2, 4)
        ids = (ids + self.hf.config.pad_token_id + 1) % self.spec.vocab_size
        ids[1, 3] = ids[0, 3]
        x = self.embed(ids)
        source = self.read(x, None, False)
        shared = Source(source.states[:1].expand_as(source.states), None)
        found = torch.cat((source.states, super().forward(inputs_embeds=x, source=shared)), dim=2)[:, 3]
        return found[0], found[1]
