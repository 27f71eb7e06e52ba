"""The model families, each a declaration: how its config.json reads, how its tensors are called and laid out.

`modules` pairs burnish's module paths (in Llama's Hugging Face words) with the family's own; `{i}` is the layer.
The pairs are used by `store` to read and write checkpoints, and to resolve `target_modules`. `{j}` is the layer of an
encoder-decoder's decoder.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace

from burnish.config import UserError
from burnish.model.families.bert import BERT
from burnish.model.families.declare import Config, Family, rope, rotary_share
from burnish.model.families.gpt import BLOOM, FALCON, GPT2, GPT_NEOX, MPT, OPT
from burnish.model.families.llama import GEMMA2, GEMMA3, LLAMA, MISTRAL, QWEN2, QWEN3
from burnish.model.families.t5 import MT5, T5
from burnish.model.network import Layout
from burnish.model.ngram import ngram_spec
from burnish.model.positions import inverse_frequencies
from burnish.model.spec import Head, Spec

__all__ = ["FAMILIES", "Family", "layout", "read_spec", "tensor_names"]

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, BLOOM, GPT2, OPT, GPT_NEOX, FALCON, MPT, BERT, T5, MT5)
}


def read_spec(config: Config, head: Head | None = None, stored: Collection[str] | None = None) -> Spec:
    """The Spec of a Hugging Face config. Raises UserError for an unknown architecture or a missing field.

    `head` overrides what `architectures` names; without a language-model head an encoder-decoder is its encoder alone.
    `stored` are the names of the checkpoint's tensors, which tell what configs leave open: whether an encoder has a
    pooler, and T5 a head of its own.
    """
    name = str(config.get("model_type", ""))
    family = FAMILIES.get(name)
    if name == "ngram":
        return ngram_spec(config)
    if family is None:
        from burnish.model.foreign import foreign_spec

        return foreign_spec(config, head, FAMILIES)
    reason = family.refuse(config) or _unread_rotary(family, config)
    if reason:
        raise UserError(f"config.json: {reason}")
    values: Config = dict(family.constants)
    for target, source in family.fields.items():
        keys = (source,) if isinstance(source, str) else source
        try:
            values[target] = source(config) if callable(source) else next(config[key] for key in keys if key in config)
        except (KeyError, StopIteration) as error:
            raise UserError(
                f"config.json: a {name} config needs '{error.args[0] if error.args else keys[0]}'"
            ) from None
    heads = {name.lower(): key for key, name in family.architectures.items()}  # mpt-7b says MPTFor...
    heads |= {name.lower(): key for name, key in family.former.items()}
    declared = (config.get("architectures") or [next(iter(family.architectures.values()))])[0]
    if head is None and declared.lower() not in heads:
        known = family.architectures.values()
        raise UserError(f"config.json: architecture '{declared}' is not supported; supported: {', '.join(known)}")
    values["head"] = head or heads[declared.lower()]
    if values["head"] == "classification":
        values["num_labels"] = len(config.get("id2label") or {}) or config.get("num_labels", 2)
    if values["kind"] == "seq2seq" and values["head"] != "lm":
        values["kind"] = "encoder"
    pooler = dict(family.modules).get("pooler", "")
    values["pooler"] = bool(pooler) and values["head"] in ("classification", "none")
    spec = Spec(family=name, **values)
    if stored is not None:
        pooled = any("pooler" in name or pooler in name for name in stored)
        spec = family.stored(replace(spec, pooler=spec.pooler and pooled), stored)
    if spec.positions == "rotary":
        inverse_frequencies(spec)  # refuses a scaling that is not known
    return spec


def _unread_rotary(family: Family, config: Config) -> str | None:
    """Rotary parameters that transformers may write and this family does not read."""
    if "rope_theta" not in family.fields:
        return None
    if "rotary_share" not in family.fields and rotary_share(1.0)(config) != 1:
        return f"partial_rotary_factor: {rotary_share(1.0)(config)} is not supported"
    local = rope(config, "sliding_attention")
    if "rope_local_theta" not in family.fields and local != rope(config):
        return "rope_parameters: parameters of their own for sliding_attention are not supported"
    return None


def tensor_names(spec: Spec) -> dict[str, str]:
    """Module path in burnish -> module path in the family's checkpoint, layers expanded."""
    names: dict[str, str] = {}
    family = FAMILIES[spec.family]
    for native, foreign in family.modules + family.variant(spec):
        if "{" in native:
            count = spec.decoder_layers if "{j}" in native else spec.num_layers
            names |= {native.format(i=i, j=i): foreign.format(i=i, j=i) for i in range(count)}
        else:
            names[native] = foreign
    return names


def layout(spec: Spec, parts: Collection[str]) -> Layout:
    """The Layout of a native network that has these parts."""
    family, modules = FAMILIES[spec.family], tensor_names(spec)
    tensors: dict[str, str] = {}
    spare: set[str] = set()
    for native, foreign in modules.items():
        for leaf in ("weight", "bias"):
            name, plain = f"{native}.{leaf}", f"{foreign}.{leaf}"
            tensors[name] = family.tensors.get(name, plain)
            if native == "lm_head" and not spec.tied and tensors[name] != plain:  # BERT's bias is then the decoder's
                spare.add(tensors[name])
                tensors[name] = plain
            copied = native == "lm_head" and (spec.tied if leaf == "weight" else tensors[name] != plain)
            if native.split(".")[0] not in parts:
                spare |= {plain, tensors[name]}
            elif copied:
                spare.add(plain)
    matrices = [name for name in tensors if name.endswith(".weight")]
    return Layout(
        modules,
        tensors,
        family.prefix,
        family.architectures[spec.head],
        family.lora_targets,
        frozenset(name for name in matrices if name.split(".")[-2] in family.transposed),
        frozenset({*spare, *dict(family.copies)}),
        tuple(map(re.escape, family.ignored)),
        dict(family.copies),
        aliases=family.aliases,
        spare_tokens=family.spare_tokens,
    )
