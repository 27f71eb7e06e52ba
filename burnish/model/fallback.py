"""Models without a native family, through transformers' own modelling code.

`Foreign` holds a transformers model and shows it as a `Network`. Module paths are the transformers model's own; the
projections of its layers are replaced in place by burnish's `Linear`, on which the techniques work unchanged. The body
runs as transformers wrote it; `logits` runs transformers' own head on given hidden states, with the body left out.

Limits: a projection whose weight its layer reads directly stays transformers' own. Code that a checkpoint brings is
never run. Documents are packed, and attention patterns obeyed, only where a short trial shows that the model's tokens
mix in attention alone, which takes the masks that it is given: through transformers' registry (`model/registry.py`)
where every layer asks it, else as 4-D masks, which go without patterns.
"""

from __future__ import annotations

import copy
import inspect
import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from burnish.config import UserError
from burnish.model.attention import Frame, narrow, visibility
from burnish.model.cache import Prefix
from burnish.model.fallback_cache import Cache
from burnish.model.foreign import CLASSES, LORA_TARGETS, Given, construct, read_config, rejections, replace_projections
from burnish.model.linear import Linear
from burnish.model.network import Layout, Network
from burnish.model.patterns import Pattern
from burnish.model.registry import registered, showing
from burnish.model.spec import Spec

HALF = (torch.bfloat16, torch.float16)


class Foreign(Network):
    """A transformers model as a Network. It has the model's own children, so that paths are the model's.

    `hf` is the model, `root` the path of its body and `stacks` those of the lists of layers in it (there may be none);
    `accepts` are the names that the body's forward takes, `registered` tells whether transformers' registry gives every
    layer its attention.
    """

    hf: Any
    root: str
    stacks: tuple[str, ...]
    accepts: set[str]

    def __init__(self, spec: Spec, hf_config: dict[str, Any]):
        super().__init__()
        self.compute_dtype = None
        self.gradient_checkpointing = self.checkpoints = False
        self.apart: bool | None = None  # whether packed documents stay apart, once it was tried
        hf = construct(read_config(hf_config), spec.head)
        self.names = set(hf.base_model.state_dict())  # of the body, before it is changed
        self.stacks = self.find_stacks(hf.base_model, spec)
        self.transposed = replace_projections(hf.base_model, tuple(f"{path}." for path in self.stacks) or ("",))
        self.adopt(hf, spec, nn.ModuleDict())
        if "inputs_embeds" not in self.accepts or "state" in self.accepts:
            raise UserError(f"config.json: a {spec.family} model takes its inputs or states in a way of its own")

    @staticmethod
    def find_stacks(base: nn.Module, spec: Spec) -> tuple[str, ...]:
        """The paths of the lists of layers in a body."""
        lists = {path: m for path, m in base.named_modules() if isinstance(m, nn.ModuleList)}
        return tuple(path for path, layers in lists.items() if len(layers) == spec.num_layers)[:1]

    def adopt(self, hf: Any, spec: Spec, techniques: nn.ModuleDict) -> None:
        """Become the network around `hf`."""
        self.spec = spec
        body = hf.base_model_prefix
        if body in hf._modules:  # first, so that what a head shares with it goes by its name in the body
            hf.__dict__["_modules"] = {body: hf._modules[body], **hf._modules}
        shared = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")
        self.__dict__.update({"hf": hf, **{name: hf.__dict__[name] for name in shared}})
        self.techniques = techniques
        if hf.config.pad_token_id is None:
            hf.config.pad_token_id = 0  # heads ask for one; what is padding, the mask tells
        self.root = "" if hf.base_model is hf else f"{hf.base_model_prefix}."
        self.body = tuple(f"{self.root}{path}." for path in self.stacks) or (self.root,)
        self.accepts = set(inspect.signature(hf.base_model.forward).parameters)
        self.stateful = "cache_params" in self.accepts
        self.registered = registered(self.all_layers)
        self.head_names = [f"{path}.{name}" for path, m in self.head_paths() for name in m.state_dict()]  # unchanged
        tables = (m for path, m in hf.base_model.named_modules() if "position" in path and isinstance(m, nn.Embedding))
        self.offset = max((m.padding_idx + 1 for m in tables if m.padding_idx is not None), default=0)
        self.tie()

    @property
    def embed_tokens(self) -> nn.Embedding:  # type: ignore[override]
        return self.hf.get_input_embeddings()

    @property
    def layers(self) -> nn.ModuleList:  # type: ignore[override]
        return self.hf.base_model.get_submodule(self.stacks[0]) if self.stacks else nn.ModuleList()

    @property
    def layout(self) -> Layout:
        own = {name for name in (*self.hf._parameters, *self.hf._buffers) if self.root}
        names = {*(self.root + name for name in self.names), *self.head_names, *own}
        prefix = f"{self.hf.base_model_prefix}."
        shown = {name: name if self.root else prefix + name for name in names}
        leaves = {path.rpartition(".")[2] for path, m in self.named_modules() if isinstance(m, Linear) and path}
        leaves |= {path.split(".")[-2] for path, m in self.named_modules() if path.endswith(".base")}
        chosen = next((group for group in LORA_TARGETS if leaves.issuperset(group)), tuple(sorted(leaves - {"base"})))
        return Layout(
            {name.rpartition(".")[0]: other.rpartition(".")[0] for name, other in shown.items()},
            shown,
            prefix,
            type(self.hf).__name__,
            chosen,
            frozenset(self.root + name for name in self.transposed),
            frozenset(self.ties),
            (
                *(self.hf._keys_to_ignore_on_load_unexpected or ()),
                *(() if self.root else (f"^(?!{re.escape(prefix)})",)),
            ),
            self.ties,
        )

    def head_paths(self) -> list[tuple[str, nn.Module]]:
        """The model's children beside its body, and the body's pooler, by path."""
        if not self.root:
            return []
        apart = ("techniques", self.hf.base_model_prefix)
        found = [(name, child) for name, child in self.hf.named_children() if name not in apart]
        pooler = getattr(self.hf.base_model, "pooler", None)
        return [*found, (f"{self.root}pooler", pooler)] if isinstance(pooler, nn.Module) else found

    def head_modules(self) -> list[nn.Module]:
        return [module for _, module in self.head_paths()]

    def set_head(self, spec: Spec) -> None:
        from transformers.models.auto import modeling_auto

        if self.spec.paired or spec.family not in getattr(modeling_auto, CLASSES[spec.head][1]):
            what = "classifier" if spec.head == "classification" else "language-model head"
            raise UserError(f"transformers has no {what} of this kind: {spec.family} models get no new head")
        changes: dict[str, Any] = {"tie_word_embeddings": spec.tied}
        if spec.head == "classification":
            changes |= {"id2label": {str(i): f"LABEL_{i}" for i in range(spec.num_labels)}, "label2id": None}
        new = construct(read_config({**self.hf.config.to_dict(), **changes}), spec.head)
        techniques, old = self.techniques, self.hf.base_model
        del self.techniques
        fresh = getattr(new.base_model, "pooler", None)
        setattr(new, new.base_model_prefix, old)
        if isinstance(fresh, nn.Module) and getattr(old, "pooler", None) is None:
            old.pooler = fresh
        self.adopt(new, spec, techniques)
        device = self.embed_tokens.weight.device
        for module in self.head_modules() if device.type != "meta" else ():
            for part in module.modules():
                for name, parameter in part.named_parameters(recurse=False):
                    if parameter.is_meta:
                        value = torch.full(parameter.shape, float(name != "bias"), device=device)
                        setattr(part, name, nn.Parameter(value))

    @property
    def converts(self) -> bool:
        """Whether transformers stores the model's tensors in another layout than it runs them (experts, mostly)."""
        from transformers.conversion_mapping import get_model_conversion_mapping

        return bool(get_model_conversion_mapping(self.hf, add_legacy=False))

    def read_converted(self, folder: Path) -> dict[str, Tensor] | None:
        if not self.converts:
            return None
        with rejections():
            model, found = type(self.hf).from_pretrained(
                folder, dtype="auto", trust_remote_code=False, output_loading_info=True
            )
        problems = [
            f"{kind.removesuffix('_keys')} {key}" for kind, keys in found.items() for key in sorted(map(str, keys))
        ]
        if problems:
            raise UserError(f"{folder}: the weights do not fit config.json: {'; '.join(problems)}")
        return model.state_dict()

    def converted(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        return revert_weight_conversion(self.hf, tensors) if self.converts else tensors

    @property
    def ties(self) -> dict[str, str]:
        """Parameters that are others: copy -> original."""
        return {copy: name for copy, name in (self.hf.all_tied_weights_keys or {}).items() if copy != name}

    def tie(self) -> None:
        for path, name in self.ties.items():
            module, _, leaf = path.rpartition(".")
            setattr(self.get_submodule(module), leaf, self.get_parameter(name))

    def new_cache(self, rows: int, capacity: int) -> Cache:
        if not self.accepts & {"past_key_values", "cache_params"}:
            raise UserError(f"transformers keeps no cache for {self.spec.family} models, which generation needs")
        return Cache(self, rows, capacity)

    def new_states(self) -> Any:
        """transformers' own empty cache."""
        from transformers import DynamicCache

        return DynamicCache(config=self.hf.config)

    def obey(self, pattern: Pattern) -> None:
        if not self.registered:
            raise UserError(
                f"a {self.spec.family} model, run by transformers, does not take its attention from transformers' "
                "registry; no pattern reaches it"
            )
        super().obey(pattern)

    def train(self, mode: bool = True) -> Foreign:
        self.hf.training = mode  # it is no child: its children are
        return super().train(mode)  # type: ignore[return-value]

    def precision(self) -> AbstractContextManager[Any]:
        """Mixed precision, where the activations' dtype was chosen."""
        half = self.compute_dtype in HALF
        return torch.autocast(self.embed_tokens.weight.device.type, self.compute_dtype) if half else nullcontext()

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        cache: Cache | None = None,
        prefix: Prefix | None = None,
        source: Any = None,
    ) -> Tensor:
        """Hidden states (B, T, hidden) of T new tokens; arguments as the native network's."""
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds.to(self.dtype)  # type: ignore[arg-type]
        batch, length, _ = x.shape
        valid = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()
        positions = self.positions(batch, length, valid, position_ids, cache, prefix, x.device)
        self.check_padding(valid)
        if prefix is not None:
            cache = self.new_cache(batch, prefix.size + length)
            cache.load(prefix)
        if cache is not None:
            cache.reserve(valid, positions)
        mask = valid
        if cache is not None and not self.stateful:
            mask = cache.valid[:, : cache.length] if cache.holes else None
        shown = self.shown(self.spec.decoder, positions, valid, segment_ids, cache, prefix)
        if shown is not None:
            mask = None
            if not self.registered:
                mask = torch.zeros_like(shown, dtype=x.dtype).masked_fill_(~shown, torch.finfo(x.dtype).min)
                shown = None
        with showing(self.hf.config, shown, self.spec.decoder.causal):
            return self.run(x, mask, positions, token_type_ids, cache, source)

    def shown(
        self,
        spec: Spec,
        positions: Tensor,
        valid: Tensor | None,
        segments: Tensor | None = None,
        cache: Cache | None = None,
        prefix: Prefix | None = None,
    ) -> Tensor | None:
        """What packed documents and a pattern let be seen, padding included: bool (B, 1, T, S), None without them.

        Raises UserError for a model that takes no masks, or whose tokens mix elsewhere too.
        """
        if segments is None and self.pattern is None:
            return None
        if not self.keeps_apart():
            problem = "mixes tokens in a way that takes no mask; no pattern reaches it"
            if segments is not None:
                problem = "does not keep packed documents apart; set packing: false"
            raise UserError(f"this {spec.family} model, run by transformers, {problem}")
        cache, prefix = (cache, None) if segments is None else (None, prefix)  # the cache, too, holds the prefix
        mask, causal = visibility(spec, positions, valid, segments, cache, prefix, self.dtype)
        batch, length = positions.shape
        frame = Frame(batch, length, mask, causal, None, cache, prefix)
        return (frame if self.pattern is None else narrow(self.pattern, spec, frame, positions)).mask

    def check_padding(self, valid: Tensor | None) -> None:
        """Raise UserError for rows that begin with padding (B, T) in a model that counts positions by itself."""
        fixed = self.spec.positions == "learned" and "position_ids" not in self.accepts
        if fixed and valid is not None and not bool(valid[:, 0].all()):
            raise UserError(f"a {self.spec.family} model takes no positions, so that rows cannot be padded on the left")

    def run(
        self,
        x: Tensor,
        mask: Tensor | None,
        positions: Tensor,
        types: Tensor | None = None,
        cache: Cache | None = None,
        source: Any = None,
    ) -> Tensor:
        """The body's hidden states. mask: (B, S) bool, or (B, 1, T, S) added to the scores."""
        if self.gradient_checkpointing != self.checkpoints:
            self.set_checkpointing(self.gradient_checkpointing)
        if cache is not None and self.checkpoints and self.training:
            raise UserError("gradient_checkpointing: transformers drops a prefix under it; set it to false")
        states = None if cache is None else cache.states
        given: dict[str, Any] = {
            "inputs_embeds": x,
            "attention_mask": mask.long() if mask is not None and mask.dim() == 2 else mask,
            "position_ids": positions + self.offset,
            "token_type_ids": types if self.spec.token_types > 1 else None,
            "past_key_values": states,
            "cache_params": states,
            "use_cache": states is not None,
        }
        if source is not None:
            given = {
                **{f"decoder_{name}": given[name] for name in ("inputs_embeds", "attention_mask")},
                "attention_mask": None if source.mask is None else source.mask[:, 0, 0].long(),
                "encoder_outputs": (source.states,),
                "past_key_values": states,
                "use_cache": states is not None,
            }
        accepted = {name: value for name, value in given.items() if name in self.accepts and value is not None}
        with self.precision():
            return self.hf.base_model(**accepted)[0]

    def set_checkpointing(self, wanted: bool) -> None:
        if wanted and not self.hf.supports_gradient_checkpointing:
            raise UserError(
                f"gradient_checkpointing: {self.spec.family} models have none in transformers; set it to false"
            )
        verb = "enable" if wanted else "disable"
        new, old = f"activation_checkpointing_{verb}", f"gradient_checkpointing_{verb}"  # the old name until 5.20
        switch = getattr(self.hf, new if hasattr(self.hf, new) else old)
        switch(*([{"use_reentrant": False}] if wanted else []))
        self.checkpoints = wanted

    @torch.no_grad()
    def keeps_apart(self) -> bool:
        """Whether masks keep tokens apart, so that what they should not see changes nothing; tried once."""
        if self.apart is not None:
            return self.apart
        slides = getattr(self.hf.config, "sliding_window", None) is not None
        self.apart = not self.stateful and (self.registered or not slides)
        if not self.apart:
            return False
        training, pattern = self.training, self.pattern
        try:
            self.eval()
            got, want = self.trial()
            rounding = 0.02 if self.dtype in HALF else 1e-3
            self.apart = bool((got - want).norm() <= rounding * want.norm())
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AssertionError):
            self.apart = False
        finally:
            self.train(training)
            self.pattern = pattern
        return self.apart

    def trial(self) -> tuple[Tensor, Tensor]:
        """What two short documents give in one row, and what each alone gives."""
        places = torch.arange(8, device=self.embed_tokens.weight.device)[None]
        x = self.embed(places)  # (1, 8, width)
        packed = self(inputs_embeds=x, position_ids=places % 4, segment_ids=places // 4)
        return packed, self(inputs_embeds=x.view(2, 4, -1)).view_as(packed)

    def logits(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, 1, hidden.shape[-1])
        parameter = next((p for module in self.head_modules() for p in module.parameters()), None)
        if parameter is None:
            raise ValueError("this network has no head: it gives hidden states only")
        half = self.compute_dtype in HALF
        with self.precision():
            flat = flat if half else flat.to(parameter.dtype)
            given = Given(flat, getattr(self.hf.base_model, "pooler", None))
            head = copy.copy(self.hf)
            head.__dict__["_modules"] = {**self.hf._modules, self.hf.base_model_prefix: given}
            ids = torch.zeros(len(flat), 1, dtype=torch.long, device=flat.device)
            return head(input_ids=ids).logits.view(*hidden.shape[:-1], -1)
