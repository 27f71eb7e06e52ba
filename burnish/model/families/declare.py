"""What a family's declaration is made of, and the readers of config.json that several families share."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from burnish.config import UserError
from burnish.model.spec import Head, Spec

Config = dict[str, Any]
Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Family:
    """One family. `fields` maps a Spec field to a config key, a tuple of keys (the first present), or a function.

    `modules` pairs burnish's module paths with the family's own, `variant` has the pairs that depend on the spec;
    `stored` changes a spec by the names of a checkpoint's tensors. `aliases` are other beginnings of names that
    checkpoints use, `copies` pairs names of the same tensor with the one that is read, `former` has earlier names of
    architectures. `spare_tokens` are tokens that may lie beyond the embedding.
    """

    name: str
    fields: dict[str, Any]
    modules: Pairs
    architectures: dict[Head, str]
    lora_targets: tuple[str, ...]
    constants: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)  # names that do not follow from `modules`
    prefix: str = ""
    variant: Callable[[Spec], Pairs] = lambda spec: ()
    stored: Callable[[Spec, Collection[str]], Spec] = lambda spec, names: spec
    aliases: Pairs = ()
    copies: Pairs = ()
    former: dict[str, Head] = field(default_factory=dict)
    transposed: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    spare_tokens: tuple[str, ...] = ()
    refuse: Callable[[Config], str | None] = lambda config: None


def decoder(name: str) -> dict[Head, str]:
    """The architectures of a decoder whose classes follow transformers' usual names."""
    return {"lm": f"{name}ForCausalLM", "classification": f"{name}ForSequenceClassification", "none": f"{name}Model"}


def unless(**supported: Any) -> Callable[[Config], str | None]:
    """A `refuse` that names the first key with another value than the supported one; null counts as absent."""

    def refuse(config: Config) -> str | None:
        for key, value in supported.items():
            if config.get(key, value) not in (None, value):
                return f"{key}: {json.dumps(config[key])} is not supported"
        return None

    return refuse


def optional(key: str, default: Any) -> Callable[[Config], Any]:
    """The value of `key`, the default where it is absent or null."""
    return lambda config: default if config.get(key) is None else config[key]


ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def activation(key: str, default: str) -> Callable[[Config], str]:
    def read(config: Config) -> str:
        name = config.get(key) or default
        if name not in ACTIVATION_NAMES:
            raise UserError(f"config.json: activation '{name}' is not supported; known: {sorted(ACTIVATION_NAMES)}")
        return ACTIVATION_NAMES[name]

    return read


def rope(config: Config, layer_type: str = "full_attention") -> Config:
    """The rotary parameters, of one layer type where the config tells them apart (transformers 5)."""
    found = config.get("rope_scaling") or config.get("rope_parameters") or {}
    found = (found.get(layer_type) or {}) if any(key.endswith("_attention") for key in found) else found
    return {("rope_type" if key == "type" else key): value for key, value in found.items()}


def rope_scaling(config: Config) -> tuple[tuple[str, Any], ...]:
    found, apart = rope(config), ("rope_theta", "partial_rotary_factor")
    if found.get("rope_type", "default") == "default":
        return ()
    return tuple(sorted((key, value) for key, value in found.items() if key not in apart))


def rope_theta(default: float = 10000.0, *keys: str) -> Callable[[Config], float]:
    """The rotary base: inside the rotary parameters, or at the top as `rope_theta` or another key."""

    def read(config: Config) -> float:
        found = [place.get("rope_theta") for place in (rope(config), config.get("rope_parameters") or {}, config)]
        return float(next((value for value in (*found, *map(config.get, keys)) if value), default))

    return read


def rotary_share(default: float, *keys: str) -> Callable[[Config], float]:
    """The share of each head's dimensions that is rotated."""

    def read(config: Config) -> float:
        found = (place.get("partial_rotary_factor") for place in (rope(config), config))
        return float(next((value for value in (*found, *map(config.get, keys)) if value is not None), default))

    return read


def window(config: Config) -> int:
    """How many tokens a sliding layer sees; 4096 where the key is absent, 0 for no window."""
    return int(config.get("sliding_window", 4096) or 0)


def sliding_layers(
    slides: Callable[[Config, int], bool], size: Callable[[Config], int] = window
) -> Callable[[Config], tuple[int, ...]]:
    """The layers that see a window only: those `layer_types` names, else those for which `slides` holds."""

    def read(config: Config) -> tuple[int, ...]:
        count = config["num_hidden_layers"]
        kinds = config.get("layer_types") or [
            "sliding_attention" if slides(config, layer) else "full_attention" for layer in range(count)
        ]
        unknown = set(kinds) - {"sliding_attention", "full_attention"}
        if unknown or len(kinds) != count:
            what = f"{min(unknown)!r} is not supported" if unknown else f"{len(kinds)} for {count} layers"
            raise UserError(f"config.json: layer_types: {what}")
        return tuple(layer for layer, kind in enumerate(kinds) if kind == "sliding_attention" and size(config))

    return read
