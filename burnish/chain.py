"""A model, and the techniques applied to it from outside in an ordered chain.

A technique is one module: a frozen dataclass `Config`, `apply(model, config, context) -> Config` that changes the
model in place and returns the resolved config (every choice that shaped the model), `rebuild(model, config)` that
makes the same structure without data, and any of the hooks in `HOOKS`. The registry below is the only other place
that knows it; a collection gives techniques under names of its own ("peft:ia3"). Nothing outside asks for a technique
by name: the loop and the engine call hooks in chain order.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from burnish.config import UserError, from_mapping, nearest, to_mapping
from burnish.model import soft
from burnish.model.bundle import Context, Link, Model
from burnish.model.cache import KVCache
from burnish.model.surgery import select

TECHNIQUES = {
    "full": "burnish.tune.full",
    "transfer": "burnish.tune.transfer",
    "adapters": "burnish.tune.adapters",
    "lora": "burnish.tune.lora",
    "ia3": "burnish.tune.ia3",
    "choice_loss": "burnish.tune.choice_loss",
    "prompt_tuning": "burnish.tune.prompt_tuning",
    "p_tuning": "burnish.tune.p_tuning",
    "prefix_tuning": "burnish.tune.prefix_tuning",
    "p_tuning_v2": "burnish.tune.p_tuning_v2",
    "int8": "burnish.compress.int8",
    "nf4": "burnish.compress.nf4",
    "fp4": "burnish.compress.fp4",
    "fp8": "burnish.compress.fp8",
    "int_groups": "burnish.compress.int_groups",
    "gptq": "burnish.compress.gptq",
    "awq": "burnish.compress.awq",
    "smoothquant": "burnish.compress.smoothquant",
    "qat": "burnish.compress.qat",
    "magnitude": "burnish.compress.magnitude",
    "sparse_attention": "burnish.context.sparse_attention",
}
COLLECTIONS = {"peft": "burnish.tune.peft_method"}  # "peft:ia3": its module's method("ia3")

HOOKS = {
    "encode": "encode(model, config, example) -> example: rewrite an example before padding",
    "embed": "embed(model, config, embeds, slots) -> embeds: fill pseudo tokens, (B, T, H) and (B, T)",
    "initial_cache": "initial_cache(model, config, batch) -> Prefix: learnt keys and values before each row",
    "loss": "loss(model, config, batch, hidden) -> (sum, count): replaces the default loss; hidden (B, T, H)",
    "teacher": "teacher(model, config) -> context in which the model is the one to learn from, or None",
    "parameter_groups": "parameter_groups(model, config, learning_rate, weight_decay) -> optimiser groups",
    "after_step": "after_step(model, config, step, total): after each optimiser step",
    "finalize": "finalize(model, config) -> config: drop what only training needs",
    "merge": "merge(model, config) -> note: fold into the base weights and leave the chain",
}


def technique(name: str) -> Any:
    """The module of a registered technique, or what stands for one. Raises UserError naming the nearest."""
    collection, colon, member = name.partition(":")
    if colon and collection in COLLECTIONS:
        return importlib.import_module(COLLECTIONS[collection]).method(member)
    if name not in TECHNIQUES:
        raise UserError(f"technique '{name}' is unknown{nearest(name, TECHNIQUES)}; known: {', '.join(TECHNIQUES)}")
    return importlib.import_module(TECHNIQUES[name])


TechniqueSpec = str | Mapping[str, Any]


def parse_chain(techniques: Sequence[TechniqueSpec] | TechniqueSpec) -> list[tuple[str, Any]]:
    """["nf4", {"lora": {"r": 8}}] -> [(name, Config)]. Raises UserError on unknown names or keys, or a repeat."""
    if isinstance(techniques, (str, Mapping)):
        techniques = [techniques]
    parsed: list[tuple[str, Any]] = []
    for item in techniques:
        entries = {item: {}} if isinstance(item, str) else dict(item)
        for name, options in entries.items():
            parsed.append((name, from_mapping(technique(name).Config, options or {}, f"technique '{name}'")))
    names = [name for name, _ in parsed]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"techniques: '{name}' stands twice in {names}; a chain applies each once")
    return parsed


def exchanges_head(techniques: Sequence[TechniqueSpec] | TechniqueSpec) -> bool:
    """Whether one of the techniques puts a new head on (`NEW_HEAD`), so that the old one need not be read."""
    return any(getattr(technique(name), "NEW_HEAD", False) for name, _ in parse_chain(techniques))


def compares(techniques: Sequence[TechniqueSpec] | TechniqueSpec) -> str:
    """The name of the technique that needs rows with `choices` to train on (`COMPARES`), "" where none does."""
    return next((name for name, _ in parse_chain(techniques) if getattr(technique(name), "COMPARES", False)), "")


def stored_anew(model: Model, techniques: Sequence[TechniqueSpec] | TechniqueSpec) -> set[str]:
    """Paths of the projections whose weights a technique takes once to store them in another form (`STORES_ANEW`),
    before any other that needs them all in memory, so that they need not be read together."""
    for name, config in parse_chain(techniques):
        if getattr(technique(name), "STORES_ANEW", False):
            return {path for path, _ in select(model.net, config.target_modules)}
        if not (getattr(technique(name), "NEW_HEAD", False) or getattr(technique(name), "TAKES_UNREAD", False)):
            break
    return set()


def apply(model: Model, techniques: Sequence[TechniqueSpec] | TechniqueSpec, context: Context | None = None) -> Model:
    """Freeze the model (on the first call), then apply the techniques in order. Changes and returns `model`.

    A folder that `full` wrote is a plain checkpoint (`Model.whole`): its chain is over, and all of it is frozen too.
    """
    if model.whole:
        model.chain, model.whole = [], False
    if not model.chain:
        model.net.requires_grad_(False)
    links = parse_chain(techniques)
    for place, (name, config) in enumerate(links, 1):
        if model.net.fixed:
            raise UserError(f"technique '{name}': {model.net.fixed}")
        if any(link.name == name for link in model.chain):
            raise UserError(
                f"techniques: '{name}' is already applied to this model; fold it in first (burnish merge), or begin "
                "from its base"
            )
        following = [later for _, later in links[place:]]
        resolved = technique(name).apply(model, config, replace(context or Context(), following=following))
        model.chain.append(Link(name, resolved))
    return model


def rebuild(model: Model, chain: Sequence[Mapping[str, Any]]) -> Model:
    """Repeat the structure of a stored chain ([{"name", "config"}]) without data; weights are loaded afterwards."""
    if not model.chain:
        model.net.requires_grad_(False)
    for entry in chain:
        config = from_mapping(technique(entry["name"]).Config, entry["config"], f"technique '{entry['name']}'")
        technique(entry["name"]).rebuild(model, config)
        model.chain.append(Link(entry["name"], config))
    return model


def changes_base(model: Model) -> bool:
    """Whether the base's weights are others now: `CHANGES_BASE` of a technique, or `changes_base` of its config."""
    return any(
        getattr(link.config, "changes_base", getattr(technique(link.name), "CHANGES_BASE", False))
        for link in model.chain
    )


def leaves_plain(model: Model) -> bool:
    """Whether nothing of the chain is left in a saved model but weights and config.json (`PLAIN`)."""
    return bool(model.chain) and all(getattr(technique(link.name), "PLAIN", False) for link in model.chain)


def repeated(chain: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The links of a stored chain that only round weights (`FROM_BASE`), as `apply` takes them."""
    return [{link["name"]: link["config"]} for link in chain if getattr(technique(link["name"]), "FROM_BASE", False)]


def describe(model: Model) -> list[dict[str, Any]]:
    """The chain as plain data, the inverse of `rebuild`'s argument."""
    return [{"name": link.name, "config": to_mapping(link.config)} for link in model.chain]


def hooks(model: Model, name: str) -> list[Callable[..., Any]]:
    """The hooks called `name` of the applied techniques, in chain order, bound to the model and their config."""
    found = [(getattr(technique(link.name), name, None), link) for link in model.chain]
    return [partial(hook, model, link.config) for hook, link in found if hook is not None]


def finalize(model: Model) -> Model:
    """Drop what only training needed (prompt encoders, reparametrisations)."""
    for link in model.chain:
        hook = getattr(technique(link.name), "finalize", None)
        if hook is not None:
            link.config = hook(model, link.config)
    return model


def merge(model: Model, keep: bool = False) -> list[str]:
    """Fold every technique that can be folded into the base weights; returns one note per merged technique.

    With `keep` the weights that it changes are copied first, so that `unmerge` can give them back. Raises UserError
    where a technique is a collection's, which changes a state of its own in merging.
    """
    if model.net.runs_only:
        raise UserError(f"merge: {model.net.runs_only}")
    foreign = [link.name for link in model.chain if ":" in link.name]
    if keep and foreign:
        raise UserError(f"merge: '{foreign[0]}' cannot be taken out again; leave keep away")
    before = Unmerged(model) if keep else None
    notes = []
    for link in list(model.chain):
        hook = getattr(technique(link.name), "merge", None)
        if hook is not None:
            notes.append(hook(model, link.config))
            model.chain.remove(link)
    model.merged = (before, list(model.chain)) if before is not None else None
    return notes


def unmerge(model: Model) -> Model:
    """Undo `merge(model, keep=True)`, to the last bit. Changes and returns `model`.

    Raises UserError where nothing was kept, and for a chain that was changed since.
    """
    if model.merged is None:
        raise UserError("unmerge: nothing was kept to go back to; merge with keep=True")
    before, after = model.merged
    if model.chain != after:
        raise UserError("unmerge: techniques were applied since the merge; undo it before them")
    before.restore(model)
    model.merged = None
    return model


class Unmerged:
    """A model as it is: its modules, its chain, and copies of the weights that wrappers stand around."""

    def __init__(self, model: Model):
        modules = dict(model.net.named_modules())
        self.modules = [(module, dict(module._modules)) for module in modules.values()]
        bases = [module for path, module in modules.items() if path.endswith(".base")]
        changing = {p for base in bases for p in base.parameters() if p.is_floating_point()}
        self.weights = [(parameter, parameter.detach().clone()) for parameter in changing]
        self.trains = [(parameter, parameter.requires_grad) for parameter in model.net.parameters()]
        self.chain, self.identity = [Link(link.name, link.config) for link in model.chain], model.identity

    @torch.no_grad()
    def restore(self, model: Model) -> None:
        for module, children in self.modules:
            module._modules.clear()
            module._modules.update(children)
        for parameter, weight in self.weights:
            parameter.copy_(weight)
        for parameter, trains in self.trains:
            parameter.requires_grad_(trains)
        model.chain, model.identity = self.chain, self.identity


def forward(model: Model, batch: Mapping[str, Tensor], cache: KVCache | None = None) -> Tensor:
    """Hidden states (B, T, H) of a collated batch, with the chain's `embed` and `initial_cache` hooks.

    With an empty cache the prefix is loaded into it; with a filled one the batch continues it. Pseudo tokens that all
    rows begin with are computed once, where no cache is filled. Of a batch with sources the states are the targets'.
    Where adapters are loaded under names, each row goes through its own: `adapter_ids` (B,), or the active one.
    """
    if model.adapters is None:
        return _states(model, batch, cache)
    with model.adapters.routed(batch):
        return _states(model, batch, cache)


def _states(model: Model, batch: Mapping[str, Tensor], cache: KVCache | None) -> Tensor:
    net = model.net

    def embedded(side: str) -> Tensor:
        embeds = net.embed(batch[f"{side}input_ids"])
        if f"{side}slots" in batch:
            for embed in hooks(model, "embed"):
                embeds = embed(embeds, batch[f"{side}slots"])
        return embeds

    source: dict[str, Any] = {}
    if "source_input_ids" in batch:
        source = {"source_embeds": embedded("source_"), "source_mask": batch["source_attention_mask"]}
    prefix = None
    if cache is None or cache.length == 0:
        for initial_cache in hooks(model, "initial_cache"):
            prefix = net.own(initial_cache(batch))
    if source and prefix is not None and prefix.source is not None:
        source["source_prefix"] = prefix.source
    if cache is not None and prefix is not None:
        cache.load(prefix)
        prefix = None
    segments = batch.get("segment_ids")
    packed = segments is not None and bool((segments > 1).any())
    positions = batch.get("position_ids") if cache is None else None
    inputs: dict[str, Any] = {
        "attention_mask": batch.get("attention_mask"),
        "position_ids": positions,
        "segment_ids": segments if packed else None,
        "token_type_ids": batch.get("token_type_ids"),
    }
    embeds = embedded("")
    alike = "slots" in batch and len(embeds) > 1 and model.adapters is None
    shared = soft.leading(batch["slots"]) if alike else 0
    if shared and cache is None and prefix is None and not packed:
        recorded = net.record(embeds[:1, :shared])
        if recorded is not None:  # computed once for all rows
            first, prefix = recorded
            inputs = {name: None if x is None else x[:, shared:] for name, x in inputs.items()}
            if positions is not None:
                inputs["position_ids"] = (positions[:, shared:] - shared).clamp(min=0)  # padding's are 0
            rest = net(inputs_embeds=embeds[:, shared:], **inputs, prefix=prefix)
            return torch.cat((first.expand(len(rest), -1, -1), rest), dim=1)
    return net(inputs_embeds=embeds, **inputs, **source, cache=cache, prefix=prefix)
