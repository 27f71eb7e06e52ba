"""Models as GGUF describes them: the keys and names that llama.cpp gives each architecture, and the order of rows.

llama.cpp rotates neighbouring dimensions of Llama's and Mistral's heads where Hugging Face rotates halves, so that
files hold these rows of queries and keys interleaved; and it wants fused projections as all queries, all keys, all
values. Rows move whole, so that quantised ones do too. What a file does not tell (which GELU, a sliding window) is the
architecture's in llama.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from burnish.config import UserError
from burnish.model.families import FAMILIES, read_spec, tensor_names
from burnish.model.positions import inverse_frequencies
from burnish.model.spec import Spec
from burnish.store.gguf import File
from burnish.store.tensors import Entry

LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE_FREQS, ORIGINAL = "rope_freqs.weight", "rope.scaling.original_context_length"
NAMES = {
    "embed_tokens": "token_embd",
    "embed_positions": "position_embd",
    "embed_norm": "token_embd_norm",
    "norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TWO_NORMS = {"input_layernorm": "attn_norm_2", "post_attention_layernorm": "attn_norm"}  # Falcon's


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp calls a family, and how its config.json calls hidden size, layers, heads, positions, inner size
    and the norm's epsilon; `more` reads the rest of it from (get, names of tensors)."""

    name: str
    keys: tuple[str, ...]
    more: Callable[[Callable[..., Any], set[str]], dict[str, Any]]


HUGGING_FACE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
LLAMA_KEYS = (*HUGGING_FACE, "intermediate_size", "rms_norm_eps")


def _llama(get: Callable[..., Any], tensors: set[str]) -> dict[str, Any]:
    heads, width = get("attention.head_count"), get("embedding_length")
    size = get("attention.key_length", width // heads)
    if get("expert_count", 0) or get("rope.dimension_count", size) != size:
        raise UserError("experts and partly rotated heads are not supported")
    return {
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": size,
        "rope_theta": get("rope.freq_base", 10000.0),
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
    }


def _gpt_neox(get: Callable[..., Any], tensors: set[str]) -> dict[str, Any]:
    size = get("embedding_length") // get("attention.head_count")
    return {
        "rotary_pct": get("rope.dimension_count", size) / size,
        "rope_theta": get("rope.freq_base", 10000.0),
        "use_parallel_residual": get("use_parallel_residual", True),
    }


def _falcon(get: Callable[..., Any], tensors: set[str]) -> dict[str, Any]:
    heads, shared = get("attention.head_count"), get("attention.head_count_kv", 1)
    two = "blk.0.attn_norm_2.weight" in tensors
    return {
        "new_decoder_architecture": two or 1 < shared < heads,
        "num_ln_in_parallel_attn": 2 if two else 1,
        "num_kv_heads": shared,
        "multi_query": shared == 1,
        "rope_theta": get("rope.freq_base", 10000.0),
    }


def _mpt(get: Callable[..., Any], tensors: set[str]) -> dict[str, Any]:
    if get("attention.max_alibi_bias", 8.0) != 8:
        raise UserError("attention.max_alibi_bias other than 8 is not supported")
    return {
        "expansion_ratio": get("feed_forward_length") // get("embedding_length"),
        "attn_config": {"alibi": True, "clip_qkv": get("attention.clamp_kqv", 0.0) or None},
        "no_bias": True,
    }


ARCHITECTURES = {
    "llama": Architecture("llama", LLAMA_KEYS, _llama),
    "mistral": Architecture("llama", LLAMA_KEYS, _llama),
    "qwen2": Architecture("qwen2", LLAMA_KEYS, _llama),
    "qwen3": Architecture("qwen3", LLAMA_KEYS, _llama),
    "gpt2": Architecture(
        "gpt2", ("n_embd", "n_layer", "n_head", "n_positions", "n_inner", "layer_norm_epsilon"), lambda get, tensors: {}
    ),
    "gpt_neox": Architecture("gptneox", (*HUGGING_FACE, "intermediate_size", "layer_norm_eps"), _gpt_neox),
    "bloom": Architecture(
        "bloom", ("hidden_size", "n_layer", "n_head", "seq_length", "", "layer_norm_epsilon"), lambda get, tensors: {}
    ),
    "falcon": Architecture("falcon", (*HUGGING_FACE, "ffn_hidden_size", "layer_norm_epsilon"), _falcon),
    "mpt": Architecture("mpt", ("d_model", "n_layers", "n_heads", "max_seq_len", "", "layer_norm_epsilon"), _mpt),
}


def names(spec: Spec) -> dict[str, str]:
    """Module paths of burnish -> names in GGUF, each without its leaf."""
    known = {**NAMES, **(TWO_NORMS if spec.family == "falcon" and spec.parallel_norms == 2 else {})}
    found = {}
    for path in tensor_names(spec):
        layer = re.match(r"layers\.(\d+)\.(.+)", path)
        leaf = layer[2] if layer else path
        absent = spec.parallel_norms == 1 and leaf == "post_attention_layernorm"
        if leaf in known and not absent:
            found[path] = f"blk.{layer[1]}.{known[leaf]}" if layer else known[leaf]
    return found


def rows(spec: Spec, path: str) -> Tensor | None:
    """Which of burnish's rows stand where in a file, for the projection at `path`; None for the same order."""
    part, size, shared = path.split(".")[-1], spec.head_dim, spec.num_heads // spec.num_kv_heads
    if part in ("q_proj", "k_proj") and spec.family in ("llama", "mistral"):
        heads = spec.num_heads if part == "q_proj" else spec.num_kv_heads
        return torch.arange(heads * size).view(heads, 2, size // 2).transpose(1, 2).flatten()
    if part == "qkv_proj" and spec.fused_qkv == "heads":
        by_head = torch.arange(spec.num_kv_heads * (shared + 2) * size).view(spec.num_kv_heads, shared + 2, size)
        return torch.cat([part.flatten() for part in (by_head[:, :shared], by_head[:, shared], by_head[:, shared + 1])])
    return None


@dataclass(frozen=True)
class Rearranged(Entry):
    """A tensor whose rows stand in another order in the file; always read into memory of its own."""

    order: Tensor = field(default_factory=lambda: torch.empty(0), compare=False)  # of the file's rows

    def read(self, scratch: Tensor | None = None) -> Tensor:
        return super().read(scratch)[self.order]


def as_read(entry: Entry, order: Tensor | None) -> Entry:
    """The entry of a tensor whose file has burnish's rows in `order`."""
    if order is None or len(order) != entry.shape[0]:  # which is told where tensors meet the network
        return entry
    return Rearranged(entry.path, entry.dtype, entry.shape, entry.start, entry.end, order.argsort())


def config_of(file: File) -> dict[str, Any]:
    """The Hugging Face config of a file. Raises UserError for an architecture or an option that is not supported."""
    name = file.metadata.get("general.architecture")
    families = {found.name: family for family, found in reversed(ARCHITECTURES.items())}
    if not isinstance(name, str) or name not in families:
        raise UserError(
            f"{file.path}: architecture {name!r} is not supported; supported: {', '.join(sorted(families))}"
        )
    pieces = file.metadata.get("split.count")
    if isinstance(pieces, int) and pieces > 1:
        raise UserError(f"{file.path}: one of several files of a model; join them with llama.cpp's gguf-split --merge")
    family, tensors = families[name], set(file.tensors)
    table = file.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise UserError(f"{file.path}: no matrix token_embd.weight in it; convert the model again")
    most = max(entry.entry.end for entry in file.tensors.values())

    def get(key: str, default: Any = None) -> Any:
        value = file.metadata.get(f"{name}.{key}", default)
        kind = int if default is None or isinstance(default, bool | int) else float
        if isinstance(value, np.ndarray) and len(set(value.tolist())) == 1:
            value = value.tolist()[0]  # one for each layer
        value = float(str(np.float32(value))) if isinstance(value, float) else value  # 1e-06, not 9.999999974752427e-07
        sized = isinstance(value, int) and key not in ("context_length", ORIGINAL) and not 0 <= value <= most
        if not isinstance(value, (int, kind)) or sized:
            raise UserError(f"{name}.{key} is {value!r}" if value is not None else f"{name}.{key} is missing")
        return value

    found = ARCHITECTURES[family]
    epsilon = "attention.layer_norm_rms_epsilon" if "rms_norm_eps" in found.keys else "attention.layer_norm_epsilon"
    keys = ("embedding_length", "block_count", "attention.head_count", "context_length", "feed_forward_length")
    try:
        if not 0 < get("block_count") <= len(tensors) or min(map(get, keys)) < 1:
            raise UserError(f"{name}.block_count is {get('block_count')} with {len(tensors)} tensors")
        config = {key: get(own) for key, own in zip(found.keys, keys, strict=False) if key}
        config |= {found.keys[-1]: float(get(epsilon, 1e-5)), **found.more(get, tensors)}
        config |= {"model_type": family, "architectures": [FAMILIES[family].architectures["lm"]]}
        config |= {"vocab_size": table.shape[0], "tie_word_embeddings": "output.weight" not in tensors}
        scaling = scaling_of(file, get, config)
        config |= {"rope_scaling": scaling} if scaling else {}
        spec = read_spec(config, "lm")
        if spec.num_heads % spec.num_kv_heads or (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim > most:
            raise UserError(f"{spec.num_heads} heads of {spec.head_dim}, {spec.num_kv_heads} of keys, do not fit it")
        return config
    except (UserError, ArithmeticError) as error:
        raise UserError(f"{file.path}: {error}; it cannot be loaded") from None


def scaling_of(file: File, get: Callable[..., Any], config: dict[str, Any]) -> dict[str, Any]:
    """The rotary scaling of a file, as Hugging Face writes it; {} for none."""
    kind = file.metadata.get(f"{file.metadata['general.architecture']}.rope.scaling.type", "none")
    factor, original = get("rope.scaling.factor", 1.0), get(ORIGINAL, 8192)
    if ROPE_FREQS in file.tensors:
        factors = file.tensors[ROPE_FREQS].entry.read().float()
        scaling = {**LLAMA3, "factor": float(factors.max()), "original_max_position_embeddings": original}
        want = rotary_factors(read_spec({**config, "rope_scaling": scaling}))
        if want.shape != factors.shape or not torch.allclose(want, factors, rtol=1e-3):
            raise UserError(f"{ROPE_FREQS} is not Llama 3's scaling, the only one with factors that is supported")
        return scaling
    if not isinstance(kind, str) or kind not in ("none", "linear", "yarn") or min(factor, original) < 1:
        raise UserError(f"rope.scaling.type is {kind!r}; none, linear and yarn are supported")
    if kind == "none":
        return {}
    scaling = {"rope_type": kind, "factor": float(factor)}
    return {**scaling, "original_max_position_embeddings": original} if kind == "yarn" else scaling


def rotary_factors(spec: Spec) -> Tensor:
    """(rotated / 2,) what a scaling divides each frequency by."""
    return inverse_frequencies(replace(spec, rope_scaling=())) / inverse_frequencies(spec)


def metadata_of(spec: Spec) -> dict[str, Any]:
    """The keys that describe a model. Raises UserError, naming what llama.cpp does not know."""
    if spec.family not in ARCHITECTURES or spec.head != "lm":
        known = ", ".join(ARCHITECTURES)
        raise UserError(
            f"gguf: {spec.family} with head '{spec.head}' cannot be written; language models of {known} can"
        )
    lacks = {
        "bias, alibi or serial attention in Falcon": spec.family == "falcon"
        and (spec.qkv_bias or spec.positions != "rotary" or not spec.parallel_norms),
        f"the activation {spec.activation}": spec.activation == "relu" or spec.gated != (spec.activation == "silu"),
        "MPT's softmax_scale": spec.family == "mpt" and spec.attention_scale != 0,
    }
    scaling = dict(spec.rope_scaling)
    kind = str(scaling.pop("rope_type", "none"))
    taken = {"llama3": {*LLAMA3, "factor", "original_max_position_embeddings"}, "linear": {"factor"}}
    taken["yarn"] = {"factor", "original_max_position_embeddings"}
    other = sorted(key for key in scaling if key not in taken.get(kind, ()) and scaling[key] is not None)
    lacks[f"rotary scaling '{kind}' with {', '.join(other)}"] = bool(other) or kind not in ("none", *taken)
    for what, true in lacks.items():
        if true:
            raise UserError(f"gguf: llama.cpp does not know {what}; keep the model as a folder")
    name = ARCHITECTURES[spec.family].name
    reach = min(spec.max_positions, spec.sliding_window) if spec.sliding_layers else spec.max_positions
    keys: dict[str, Any] = {
        "context_length": reach,
        "embedding_length": spec.hidden_size,
        "block_count": spec.num_layers,
        "feed_forward_length": spec.intermediate_size,
        "attention.head_count": spec.num_heads,
        "attention.head_count_kv": spec.num_kv_heads,
        f"attention.layer_norm_{'rms_' if spec.norm == 'rms' else ''}epsilon": float(spec.norm_eps),
        "vocab_size": spec.vocab_size,
    }
    if spec.positions == "rotary":
        keys |= {"rope.dimension_count": int(spec.head_dim * spec.rotary_share), "rope.freq_base": spec.rope_theta}
    if spec.head_dim * spec.num_heads != spec.hidden_size or spec.family == "qwen3":
        keys |= {"attention.key_length": spec.head_dim, "attention.value_length": spec.head_dim}
    if spec.family == "gpt_neox":
        keys["use_parallel_residual"] = bool(spec.parallel_norms)
    if spec.family == "mpt":
        keys |= {"attention.max_alibi_bias": 8.0, "attention.clamp_kqv": float(spec.clip_qkv)}
    if kind != "none":
        keys |= {"rope.scaling.type": kind, "rope.scaling.factor": float(scaling["factor"])} if kind != "llama3" else {}
        if "original_max_position_embeddings" in scaling:
            keys[ORIGINAL] = int(scaling["original_max_position_embeddings"])
    return {"general.architecture": name, **{f"{name}.{key}": value for key, value in keys.items()}}
