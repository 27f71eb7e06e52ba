"""Any method of the peft library (https://github.com/huggingface/peft) as a technique: `peft:<method>`.

The options are the fields of peft's own config class, and peft does the work: it changes a skeleton of the
transformers model that holds the network's own modules (`peft_layers`), so that it trains, and saves under the same
names, what it would on the transformers model itself. The source of a method stands in peft's documentation of it.

Limits: methods of virtual tokens (burnish has its own), methods that need peft's own training loop or forward pass,
and options that change the base weights or let them train are refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, field, fields, make_dataclass, replace
from functools import cache
from typing import Any, get_type_hints

import torch
from torch import Tensor

from burnish.config import UserError, nearest, to_mapping, type_name
from burnish.model.bundle import Context, Model
from burnish.model.linear import Dense, Linear
from burnish.model.surgery import expression
from burnish.model.surgery import replace as put
from burnish.tune.folding import folded

PREFIX = "peft:"
RECORD = {  # what peft's config classes hold besides options
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config"),
}
OWN = ("prompt_tuning", "p_tuning", "prefix_tuning")  # burnish's own words for methods of virtual tokens
LOOP = "it changes its ranks in peft's own training loop"
BASE = "it splits the base weights, and its file does not hold the parts"
REFUSED = {
    "adalora": LOOP,
    "adamss": LOOP,
    "adaption_prompt": "it replaces whole attention layers",
    "frod": BASE,
    "glora": "it takes nothing but torch's own Linear",
    "osf": BASE,
    "poly": "its forward pass asks for task numbers",
    "psoft": BASE,
    "shadow": "it is a network beside the model",
    "xlora": "it mixes adapters that are trained already",
}
NAMED = ("target_modules", "feedforward_modules")  # options that name modules
# options that change the base, let it train, or are not stored whole, with the values that do not
OFF: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
    "save_only_topk_weights": (False,),
}


@contextmanager
def rejections(name: str) -> Iterator[None]:
    """Turn what peft raises over options into a UserError of one line, and keep its warnings for itself."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"technique '{name}': peft rejects it: {reason}") from error


@cache
def method(kind: str) -> Method:
    """The technique `peft:<kind>`. Raises UserError for an unknown method, or one that cannot run here."""
    name = PREFIX + kind
    try:
        import peft
    except ImportError:
        raise UserError(f"technique '{name}': peft is not installed; pip install peft") from None
    known = {PREFIX + key.value.lower(): config for key, config in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if name not in known:
        raise UserError(f"technique '{name}' is unknown{nearest(name, known)}; known: {', '.join(known)}")
    if issubclass(known[name], peft.PromptLearningConfig):
        own = f"use '{kind}', burnish's own" if kind in OWN else f"burnish's own are {', '.join(OWN)}"
        raise UserError(f"technique '{name}': it is a method of virtual tokens, which does not run here; {own}")
    if kind in REFUSED:
        raise UserError(f"technique '{name}': it does not run here: {REFUSED[kind]}")
    return Method(name, known[name])


class Method:
    """One method of peft, with what a technique's module has."""

    def __init__(self, name: str, kind: Any):
        self.name, self.kind = name, kind
        hints = get_type_hints(kind)
        columns = []
        for option in fields(kind):
            if option.init and option.name not in RECORD:
                hint = Any if "any value" in type_name(hints[option.name]) else hints[option.name]
                filled = option.default_factory is not MISSING
                default = field(default_factory=option.default_factory) if filled else field(default=option.default)
                columns.append((option.name, hint, default))
        namespace = {"__post_init__": lambda config: self.check(config)}
        self.Config: Any = make_dataclass(kind.__name__, columns, frozen=True, namespace=namespace)

    def check(self, config: Any) -> None:
        """Raise UserError where peft rejects the options, or the base would not stay as it is."""
        self.options(config)
        for option, allowed in OFF.items():
            value = getattr(config, option, allowed[0])
            if value not in allowed:
                where = f"technique '{self.name}': {option}"
                raise UserError(f"{where}: {value} is not supported; leave it at {allowed[0]}")

    def options(self, config: Any) -> Any:
        """The options as peft's config object."""
        with rejections(self.name):
            return self.kind(**{option.name: getattr(config, option.name) for option in fields(config)})

    def apply(self, model: Model, config: Any, context: Context) -> Any:
        """Inject the method's layers; the resolved config names their modules in Hugging Face's words."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(context.seed)
            return self.inject(model, config)

    def rebuild(self, model: Model, config: Any) -> None:
        self.inject(model, config)

    def inject(self, model: Model, config: Any) -> Any:
        from burnish.tune.peft_layers import install, peft_model, skeleton

        net = model.net
        trains = [(parameter, parameter.requires_grad) for parameter in net.parameters()]
        hf, paths = skeleton(model)
        given = {option: getattr(config, option) for option in NAMED if hasattr(config, option)}
        names = {option: targets(value, paths, self.name) for option, value in given.items()}
        with rejections(self.name), torch.device("cpu"):
            changed = peft_model(hf, self.options(replace(config, **names)), self.name)
        for parameter, before in trains:
            parameter.requires_grad_(before)
        install(net, changed, paths)
        found = changed.peft_config["default"]
        return replace(config, **{option: to_mapping(getattr(found, option)) for option in names})

    @torch.no_grad()
    def merge(self, model: Model, config: Any) -> str:
        """Fold the method into the weights as peft does it. Raises UserError where peft cannot."""
        expanded, adapted = [], adapted_modules(model, self.name)
        for path, module in adapted.items():
            with rejections(self.name):
                merged = module.merged()
            base = module.base
            if not isinstance(base, Linear):
                put(model.net, path, lambda _, merged=merged: merged.requires_grad_(False))  # type: ignore[misc]
                continue
            if (merged.bias is None) != (base.bias is None):
                raise UserError(f"technique '{self.name}': merging needs a bias that '{path}' does not have")
            put(model.net, path, lambda _, base=base: base)  # type: ignore[misc]
            if not isinstance(base.weight, Dense):
                expanded.append(path)
                base.weight = Dense(torch.empty(base.weight.shape, dtype=torch.bfloat16, device=merged.weight.device))
                base.weight.requires_grad_(False)
            base.weight.dense.copy_(merged.weight if isinstance(merged, torch.nn.Linear) else merged.weight.t())
            if base.bias is not None:
                base.bias.copy_(merged.bias)
        return folded(model, self.name, f"{len(adapted)} modules", expanded)


def targets(given: Any, paths: dict[str, str], name: str) -> Any:
    """Names of modules in burnish's or Hugging Face's words, in the latter. paths: Hugging Face's -> burnish's.

    Raises UserError for a name that stands for no module.
    """
    if given is None or given == "all-linear":
        return given
    if isinstance(given, str):
        whole = expression(given, f"technique '{name}'")
        if any(whole.fullmatch(path) for path in paths):
            return given
        given = [path for path, native in paths.items() if whole.fullmatch(native)] or [given]
    found: list[str] = []
    for target in given:
        if any(path == target or path.endswith(f".{target}") for path in paths):
            found.append(target)
            continue
        natives = [path for path, own in paths.items() if own == target or own.endswith(f".{target}")]
        if not natives:
            leaves = sorted({path.split(".")[-1] for pair in paths.items() for path in pair} - {"weight"})
            near = nearest(target, leaves)
            raise UserError(f"technique '{name}': '{target}' matches no module{near}; there are: {', '.join(leaves)}")
        found += natives
    return found


def adapted_modules(model: Model, name: str) -> dict[str, Any]:
    """The `Adapted` modules of a method, by path."""
    from burnish.tune.peft_layers import Adapted

    found = {path: module for path, module in model.net.named_modules() if isinstance(module, Adapted)}
    return {path: module for path, module in found.items() if module.owner.technique == name}


def tensors(model: Model, name: str) -> dict[str, Tensor]:
    """The tensors of a method under peft's names, as its file holds them; the network's own where it stores them."""
    from peft import get_peft_model_state_dict

    owner = next(iter(adapted_modules(model, name).values())).owner
    with rejections(name):
        state = owner.state_dict(keep_vars=True)
        return get_peft_model_state_dict(owner, state_dict=state, save_embedding_layers=False)


def record(model: Model, name: str) -> dict[str, Any]:
    """adapter_config.json of a method that was applied, without what names the base."""
    owner = next(iter(adapted_modules(model, name).values())).owner
    return to_mapping(owner.peft_config["default"].to_dict())


def link(record: dict[str, Any], where: str) -> dict[str, Any]:
    """The link of a chain that stands for an adapter_config.json of peft. Raises UserError for an unknown method.

    Options that this peft does not know are left away where they are off.
    """
    name = PREFIX + str(record.get("peft_type")).lower()
    try:
        known = {option.name for option in fields(method(name.removeprefix(PREFIX)).Config)}
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    options = {key: value for key, value in record.items() if key not in RECORD}
    return {"name": name, "config": {key: value for key, value in options.items() if key in known or value}}
