"""Models that transformers knows and burnish does not: reading their config, building them without storage, and putting
burnish's projections into them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from burnish.config import UserError, nearest
from burnish.model.linear import Linear
from burnish.model.spec import Head, Spec

CLASSES: dict[Head, tuple[str, str]] = {  # head -> (transformers' Auto class, its table of models)
    "lm": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "masked_lm": ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    "classification": ("AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"),
    "none": ("AutoModel", "MODEL_MAPPING_NAMES"),
}
PAIR = ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES")
LORA_TARGETS = (  # query and value where they have a name of their own (LoRA, section 4.2)
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("q_lin", "v_lin"),
    ("query_proj", "value_proj"),
    ("query_key_value",),
    ("qkv_proj",),
    ("Wqkv",),
    ("c_attn",),
)
READ_DIRECTLY = re.compile(r"^(?!.*\binit).*\bself\.(\w+)\.weight\b(?![.(])", re.MULTILINE)


def foreign_spec(config: dict[str, Any], head: Head | None, native: Iterable[str]) -> Spec:
    """The Spec of a config of a model type that only transformers knows. Raises UserError where it does not either,
    and for an architecture with another head."""
    from transformers.models.auto import configuration_auto, modeling_auto

    name = str(config.get("model_type", ""))
    known = configuration_auto.CONFIG_MAPPING_NAMES
    if name not in known:
        hint = nearest(name, {*native, *known})
        own = "; the code that a checkpoint brings is never run" if "auto_map" in config else ""
        raise UserError(f"config.json: model_type '{name}' is known neither to burnish nor to transformers{hint}{own}")
    read = read_config(config)
    if read.is_encoder_decoder:
        return pair_spec(name, config, read, head)
    tables = {kind: getattr(modeling_auto, table) for kind, (_, table) in CLASSES.items()}
    classes = {kind: table[name] for kind, table in tables.items() if isinstance(table.get(name), str)}
    declared = (config.get("architectures") or [next(iter(classes.values()), "")])[0]
    heads: dict[str, Head] = {architecture: kind for kind, architecture in classes.items()}
    if declared.endswith("ForPreTraining"):
        heads.setdefault(declared, "none")
    if (head or heads.get(declared)) not in classes:
        known_heads = ", ".join(classes.values()) or "none"
        raise UserError(f"config.json: architecture '{declared}' is not supported; supported: {known_heads}")
    head = head or heads[declared]
    if head == "lm" and "masked_lm" in classes and not getattr(read, "is_decoder", False):
        raise UserError(f"config.json: is_decoder is false; {classes['lm']} would see what follows: set it to true")
    encodes = "masked_lm" in classes and not getattr(read, "is_decoder", False)
    return Spec(
        family=name,
        kind="encoder" if head == "masked_lm" or (head != "lm" and encodes) else "decoder",
        head=head,
        num_labels=read.num_labels if head == "classification" else 0,
        **shape(read),
    )


def pair_spec(name: str, config: dict[str, Any], read: Any, head: Head | None) -> Spec:
    """The Spec of an encoder-decoder. Raises UserError for one without a language-model head or with two embeddings."""
    from transformers.models.auto import modeling_auto

    known = getattr(modeling_auto, PAIR[1]).get(name, "none")
    body = modeling_auto.MODEL_MAPPING_NAMES.get(name)  # whose head is its embedding
    declared = (config.get("architectures") or [known])[0]
    if declared not in (known, body) or known == "none":
        raise UserError(f"config.json: architecture '{declared}' is not supported; supported: {known}")
    if head not in (None, "lm"):
        raise UserError(f"config.json: transformers has no classifier of this kind: the encoder of '{name}' alone")
    ask = partial(getattr, read)
    start = ask("decoder_start_token_id", None)
    if not ask("share_encoder_decoder_embeddings", True) or not ask("tie_word_embeddings", True):
        raise UserError(f"config.json: a '{name}' with several embeddings is not supported")
    if not isinstance(start, int):
        raise UserError("config.json: decoder_start_token_id is missing; the decoder begins with it")
    try:
        layers = ask("decoder_layers", None) or read.num_decoder_layers
        found = {**shape(read), "num_kv_heads": 0}  # a prefix would shift positions that the model counts by itself
    except AttributeError as error:
        raise UserError(f"config.json: a '{name}' is described in a way of its own: {error}") from None
    return Spec(family=name, kind="seq2seq", decoder_layers=layers, decoder_start=start, **found)


def read_config(config: dict[str, Any]) -> Any:
    """The config as transformers' object. Raises UserError where transformers rejects it."""
    from transformers import CONFIG_MAPPING

    with rejections():
        kind = CONFIG_MAPPING[config["model_type"]]
        decode = getattr(kind, "_decode_special_floats", dict)  # JSON has no word for infinity
        return kind.from_dict(decode(config))


@contextmanager
def rejections() -> Iterator[None]:
    """Turn what transformers raises over a config into a UserError; each model checks in its own way."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"config.json: transformers rejects it: {reason}") from error


def shape(config: Any) -> dict[str, Any]:
    """The sizes that a transformers config tells, under burnish's names.

    A model that mixes attention with other layers, or whose keys and values differ in size, counts no key-value heads.
    """

    def ask(name: str, default: Any = None) -> Any:
        value = getattr(config, name, None)
        return default if value is None else value

    hidden, heads = config.hidden_size, ask("num_attention_heads", 0)
    layers = [*ask("layer_types", []), *ask("layers_block_type", [])]
    plain = all(kind.endswith("attention") and kind != "linear_attention" for kind in layers)
    plain = plain and bool(heads) and ask("kv_lora_rank") is None
    rotary = ask("rope_parameters") is not None or ask("max_position_embeddings") is None
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": hidden,
        "num_layers": config.num_hidden_layers,
        "num_heads": heads,
        "num_kv_heads": (1 if ask("multi_query") else ask("num_key_value_heads", heads)) if plain else 0,
        "head_dim": ask("head_dim", hidden // max(heads, 1)),
        "intermediate_size": ask("intermediate_size", ask("n_inner", 4 * hidden)),
        "max_positions": ask("max_position_embeddings", 0),
        "positions": "rotary" if rotary else "learned",
        "token_types": ask("type_vocab_size", 0),
        "tied": bool(ask("tie_word_embeddings", False)),
    }


class Matrices(TorchFunctionMode):
    """What `torch.empty` makes has no storage, so that a model is built from its buffers alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        return func(*args, **kwargs | {"device": "meta"} if func is torch.empty else kwargs)


def construct(config: Any, head: Head) -> Any:
    """A transformers model whose matrices are on the meta device and whose buffers hold what they should."""
    import transformers

    with rejections(), torch.device("cpu"), Matrices():
        kind = CLASSES[head][0]
        if config.is_encoder_decoder:
            kind = PAIR[0] if head == "lm" else "AutoModelForTextEncoding"
        return getattr(transformers, kind).from_config(config, dtype=torch.float32).eval()


def replace_projections(base: nn.Module, layers: tuple[str, ...]) -> set[str]:
    """Put burnish's Linear in the place of the projections whose paths begin with one of `layers`; returns the paths of
    the matrices that are stored as (in, out)."""
    from transformers.pytorch_utils import Conv1D

    transposed = set()
    for path, module in list(base.named_modules()):
        turned = isinstance(module, Conv1D)
        if not path.startswith(layers) or not (turned or type(module) is nn.Linear):
            continue
        parent, leaf = base.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
        if leaf in read_directly(type(parent)):  # type: ignore[arg-type]
            continue
        rows, columns = module.weight.shape[:: -1 if turned else 1]
        with torch.device("meta"):
            linear = Linear(columns, rows, module.bias is not None)
        linear.foreign = True
        setattr(parent, leaf, linear)
        if turned:
            transposed.add(f"{path}.weight")
    return transposed


class States(tuple):
    """A body's output as heads read it, by number or by name; what is not there is None."""

    last_hidden_state = property(lambda self: self[0])
    pooler_output = property(lambda self: self[1])

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class Given(nn.Module):
    """Stands where the body stood and gives hidden states (N, 1, hidden) that are known already."""

    def __init__(self, hidden: Tensor, pooler: nn.Module | None):
        super().__init__()
        self.states = States((hidden, None if pooler is None else pooler(hidden)))

    def forward(self, *args: Any, **kwargs: Any) -> States:
        return self.states


@cache
def read_directly(kind: type) -> frozenset[str]:
    """The children whose weight the code of a module's class takes without calling them."""
    return frozenset(READ_DIRECTLY.findall(inspect.getsource(kind)))
