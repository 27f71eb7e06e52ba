"""Soft prompts in PEFT's format: one tensor `prompt_embeddings`, and its sizes in `adapter_config.json`.

Prompt tuning, and P-tuning with nothing but pseudo tokens before the prompt, are PEFT's PROMPT_TUNING, (n, width);
prefix tuning and P-tuning v2 its PREFIX_TUNING, (n, layers * 2 * kv_heads * head_dim), layer by layer the keys and then
the values. PEFT's P_TUNING stores what its encoder gave, as burnish's does once it is finalized. PEFT puts prompts
before an encoder's first token, where burnish's prompt tuning leaves it first, and deals an encoder-decoder's prefix to
its layers in another order: those chains are saved in burnish's own format.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from burnish import chain as chains
from burnish.config import UserError
from burnish.model.bundle import Model
from burnish.model.transformer import Transformer
from burnish.store.tensors import Entry
from burnish.tune import p_tuning

KEY = "prompt_embeddings"
METHODS = {  # burnish's techniques and their tensor
    "prompt_tuning": "embedding",
    "p_tuning": "embedding.weight",
    "prefix_tuning": "embedding.weight",
    "p_tuning_v2": "embedding.weight",
}
KINDS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
DEEP = ("prefix_tuning", "p_tuning_v2")


def takes(model: Model, name: str) -> bool:
    """Whether the technique is a soft prompt that PEFT computes as burnish does."""
    spec = model.spec
    if name in DEEP:
        ungrouped = spec.fused_qkv == "heads" and spec.num_kv_heads != spec.num_heads  # Falcon's cache in transformers
        encodes = spec.paired or spec.mean_pool  # T5, whose encoder takes no cache in transformers
        return not encodes and not ungrouped and model.net.techniques[name].mlp is None
    native = isinstance(model.net, Transformer) or spec.causal
    if name == "prompt_tuning":
        return native and (spec.kind != "encoder" or spec.mean_pool)
    if name != "p_tuning" or p_tuning.state(model).kind != "embedding":
        return False
    (link,) = (link for link in model.chain if link.name == name)
    shape = [kind if kind != "field" else value for kind, value in p_tuning.parts(link.config.template)]
    return native and shape == ["soft", "prompt"]


def written(model: Model, name: str, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by PEFT's names, options) of a technique that `takes` accepts."""
    spec = model.spec
    (table,) = tensors.values()
    record: dict[str, Any] = {"num_virtual_tokens": len(table), "num_layers": spec.num_layers}
    record["num_transformer_submodules"] = 1
    if name in DEEP:
        width = spec.num_kv_heads * spec.head_dim
        record |= {"peft_type": "PREFIX_TUNING", "token_dim": width, "num_attention_heads": spec.num_kv_heads}
        return {KEY: table}, {**record, "prefix_projection": False, "encoder_hidden_size": width}
    record |= {"peft_type": "PROMPT_TUNING", "token_dim": table.shape[1], "num_attention_heads": spec.num_heads}
    return {KEY: table}, {**record, "prompt_tuning_init": "RANDOM"}


def holds(config: dict[str, Any]) -> bool:
    """Whether an adapter_config.json is of a method of virtual tokens that burnish has."""
    return config.get("peft_type") in KINDS


def read(config: dict[str, Any], tensors: dict[str, Entry], where: str) -> list[dict[str, Any]]:
    """The chain that stands for PEFT's config. Raises UserError for an adapter with more, or less, than a prompt."""
    if set(tensors) != {KEY}:
        found = ", ".join(sorted(set(tensors) - {KEY})[:3]) or "nothing"
        raise UserError(f"{where}: a {config['peft_type']} adapter holds '{KEY}' alone, and this one has {found}")
    count = config.get("num_virtual_tokens")
    if not isinstance(count, int) or not 0 < count <= tensors[KEY].shape[0]:
        raise UserError(f"{where}: num_virtual_tokens is {count}, the tensor has {tensors[KEY].shape[0]} rows")
    if config["peft_type"] == "PREFIX_TUNING":
        return [{"name": "prefix_tuning", "config": {"num_virtual_tokens": count, "prefix_projection": False}}]
    if config["peft_type"] == "PROMPT_TUNING":
        return [{"name": "prompt_tuning", "config": {"num_virtual_tokens": count}}]
    return [{"name": "p_tuning", "config": {"template": f"[P*{count}] {{prompt}}", "encoder": "embedding"}}]


def rebuild(model: Model, chain: list[dict[str, Any]], tensors: dict[str, Entry]) -> dict[str, Entry]:
    """Rebuild the chain on the model; returns the tensors by burnish's names. On encoders PEFT's prefix is P-tuning v2,
    and its prompt, which stands before the first token, P-tuning's. Raises UserError for an encoder-decoder's prefix.
    """
    spec, (link,) = model.spec, chain
    count = link["config"].get("num_virtual_tokens", 0)
    if spec.kind == "encoder" and link["name"] == "prefix_tuning":
        link |= {"name": "p_tuning_v2", "config": {"num_virtual_tokens": count}}
    elif spec.kind == "encoder" and not spec.mean_pool and link["name"] == "prompt_tuning":
        link |= {"name": "p_tuning", "config": {"template": f"[P*{count}] {{prompt}}", "encoder": "embedding"}}
    if spec.paired and link["name"] in DEEP:
        raise UserError(f"peft deals the prefix of a {spec.family} {spec.kind} to its layers otherwise; train one here")
    chains.rebuild(model, chain)
    entry, path = tensors[KEY], f"techniques.{link['name']}.{METHODS[link['name']]}"
    # for an encoder-decoder peft also trains rows that it does not use
    rows = min(len(model.net.get_parameter(path)), entry.shape[0])
    part = (rows, *entry.shape[1:])
    return {path: replace(entry, shape=part, end=entry.start + entry.nbytes // entry.shape[0] * rows)}
