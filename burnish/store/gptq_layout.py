"""Checkpoints in GPTQ's layout, as transformers, vLLM and gptqmodel read and write them.

A projection X (in, out) has X.qweight, codes packed along the inputs into int32 words, 32 codes in `bits` of them;
X.qzeros, zero points packed along the outputs, less one where `checkpoint_format` is "gptq" and not "gptq_v2"; X.scales
(groups, out); and X.g_idx, the group of each input. config.json tells all else under `quantization_config`, where
`dynamic` has other bits for some projections, as gptqmodel writes them: "+:" and a regular expression over names.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from burnish.compress.grouped import BITS, Form, Grouped, pack, unpack
from burnish.config import UserError
from burnish.model.linear import Dense, Weight
from burnish.model.network import Network
from burnish.model.surgery import linears
from burnish.store.tensors import Entry, Held, Later

WORD = 32  # codes in a whole number of words
ROWS = 32  # of a projection that are repacked together
SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)  # of groups, that gptqmodel 7.7.0 takes
TENSORS = ("qweight", "qzeros", "scales", "g_idx")
Stored = Mapping[str, Entry | Held]


def places(bits: int) -> Iterator[tuple[int, int, int]]:
    """(code, word, shift) of `WORD` codes, one after the other in their words."""
    for code in range(WORD):
        yield code, *divmod(code * bits, 32)


def to_words(codes: Tensor, bits: int) -> Tensor:
    """codes (n, m) uint8 -> (n / 32 * bits, m) int32; n a multiple of 32."""
    parts = codes.reshape(-1, WORD, codes.shape[1])
    words = torch.zeros(len(parts), bits, codes.shape[1], dtype=torch.int64)
    for code, word, shift in places(bits):
        words[:, word] |= parts[:, code].long() << shift
        if shift + bits > 32:
            words[:, word + 1] |= parts[:, code].long() >> (32 - shift)
    return words.to(torch.int32).view(-1, codes.shape[1])


def from_words(words: Tensor, bits: int) -> Tensor:
    """The inverse of `to_words`."""
    parts = words.reshape(-1, bits, words.shape[1]).long() & 0xFFFFFFFF
    codes = torch.empty(len(parts), WORD, words.shape[1], dtype=torch.uint8)
    for code, word, shift in places(bits):
        value = parts[:, word] >> shift
        if shift + bits > 32:
            value |= parts[:, word + 1] << (32 - shift)
        codes[:, code] = value & (2**bits - 1)
    return codes.view(-1, words.shape[1])


def by_bytes(form: Form) -> bool:
    """Whether burnish's bytes (`pack`) are the words' own but for the places in each: three bits are stored in planes,
    and ordered groups move inputs."""
    return form.bits != 3 and not form.ordered


def swapped(packed: Tensor, bits: int) -> Tensor:
    """(rows, bytes) uint8 with neighbouring codes of 2 or 4 bits exchanged; its own inverse. Of two codes in a byte the
    first is the lower one in the words of this layout, and the upper one in burnish's bytes."""
    if bits == 4:
        return (packed >> 4) | (packed << 4)
    return ((packed >> 2) & 0x33) | ((packed & 0x33) << 2) if bits == 2 else packed


def moved(words: Tensor, bits: int, by: int) -> Tensor:
    """Words of codes that are more by `by`. Of 2, 4 and 8 bits a code below 0 borrows from the next, as gptqmodel's."""
    if WORD % bits:
        return to_words((from_words(words, bits).int() + by).remainder(2**bits).to(torch.uint8), bits)
    return words + by * to_words(torch.ones(WORD, 1, dtype=torch.uint8), bits)[0]


def fits(net: Network) -> dict[str, Grouped]:
    """The projections by path, where all of the body's are grouped in a way that the layout can hold, alike but for
    their bits; else none."""
    found = {path: linear.weight for path, linear in linears(net)}
    grouped = {path: weight for path, weight in found.items() if isinstance(weight, Grouped)}
    own = set(grouped.values())
    others = [part for part in net.modules() if isinstance(part, Weight) and part not in own]
    whole = len(grouped) == len(found) and all(isinstance(part, Dense) for part in others)
    alike = len({replace(weight.form, bits=0) for weight in grouped.values()}) == 1
    sized = all(weight.form.group_size in SIZES for weight in grouped.values())
    divides = all(not rows % WORD and not columns % WORD for rows, columns in (w.shape for w in grouped.values()))
    known = all(f"{path}.weight" in net.layout.tensors for path in grouped)
    return grouped if whole and alike and sized and divides and known else {}


def quantization_config(forms: Mapping[str, Form]) -> dict[str, Any]:
    """Of projections by their family's names. What most have is said once, other bits by name."""
    counts = Counter(forms.values())
    form = counts.most_common(1)[0][0]
    others = {f"+:^{re.escape(name)}$": {"bits": x.bits} for name, x in forms.items() if x != form}
    return {
        "quant_method": "gptq",
        "bits": form.bits,
        "group_size": form.group_size,
        "sym": form.sym,
        "desc_act": form.ordered,
        "checkpoint_format": "gptq" if form.sym else "gptq_v2",
        "lm_head": False,
        **({"dynamic": others} if others else {}),
    }


def written(name: str, weight: Grouped) -> dict[str, Later]:
    """A projection's tensors under its family's name, each made when it is written."""
    (rows, columns), bits, groups = weight.shape, weight.form.bits, weight.scale.shape[1]
    made = {
        "qweight": Later((columns // WORD * bits, rows), torch.int32, lambda: qweight(weight)),
        "qzeros": Later((groups, rows // WORD * bits), torch.int32, lambda: qzeros(weight)),
        "scales": Later((groups, rows), torch.float16, lambda: weight.scale.t()),
        "g_idx": Later((columns,), torch.int32, lambda: group_of(weight)),
    }
    return {f"{name}.{key}": tensor for key, tensor in made.items()}


def nbytes(weight: Grouped) -> int:
    """Bytes of a projection's tensors."""
    return sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in written("", weight).values())


def qweight(weight: Grouped) -> Tensor:
    (rows, columns), bits = weight.shape, weight.form.bits
    words = torch.empty(columns // WORD * bits, rows, dtype=torch.int32)
    for packed, out in zip(weight.packed.split(ROWS), words.split(ROWS, 1), strict=True):
        if by_bytes(weight.form):
            out.copy_(swapped(packed.cpu(), bits).view(torch.int32).t())
            continue
        codes = unpack(packed, bits, columns).cpu()
        if weight.form.ordered:
            codes = codes[:, weight.get_parameter("order").cpu().argsort()]
        out.copy_(to_words(codes.t(), bits))
    return words


def qzeros(weight: Grouped) -> Tensor:
    words = to_words(weight.zeros().cpu(), weight.form.bits)
    return (moved(words, weight.form.bits, -1) if weight.form.sym else words).t()


def group_of(weight: Grouped) -> Tensor:
    """(in,) the group of each input."""
    groups = (torch.arange(weight.shape[1]) // weight.size).int()
    return groups[weight.get_parameter("order").cpu().argsort()] if weight.form.ordered else groups


@dataclass(frozen=True)
class Quantised:
    """What `quantization_config` says, of each projection by its native path, and the tensors (path -> name of its
    tensor -> entry)."""

    forms: dict[str, Form]
    less_one: bool
    tensors: dict[str, dict[str, Entry | Held]]

    def links(self, chain: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The storage as the beginning of a chain, where `chain` does not have it already."""
        if any(entry["config"].keys() >= {"bits", "group_size", "sym"} for entry in chain):
            return []
        form = next(iter(self.forms.values()))
        config: dict[str, Any] = {
            "bits": form.bits,
            "group_size": form.group_size,
            "sym": form.sym,
            "ordered": form.ordered,
        }
        others = {path: other.bits for path, other in self.forms.items() if other != form}
        config |= {"target_modules": list(self.forms), "bits_pattern": others}
        return [{"name": "int_groups", "config": config}]

    def parts(self) -> dict[str, Part]:
        """The storage's tensors by burnish's names."""
        found = {}
        for path, own in self.tensors.items():
            rows, columns = own["scales"].shape[1], own["g_idx"].shape[0]
            with torch.device("meta"):
                empty = Grouped.empty(self.forms[path], rows, columns).tensors()
            for name, tensor in empty.items():
                found[f"{path}.weight.{name}"] = Part(
                    tuple(tensor.shape), tensor.dtype, self.forms[path], self.less_one, own, name
                )
        return found


def read(
    config: Mapping[str, Any], net: Network, stored: Stored, where: str
) -> tuple[Quantised, dict[str, Entry | Held]]:
    """The quantised projections of a checkpoint, and its other tensors, all under their family's full names.

    Raises UserError for other layouts, and for options of this one that burnish does not compute.
    """

    def refuse(what: str) -> UserError:
        return UserError(
            f"{where}: quantization_config: {what}; take the 16-bit checkpoint, and quantise it with burnish"
        )

    if config.get("quant_method") != "gptq":
        raise refuse(f"quant_method '{config.get('quant_method')}' is not read, 'gptq' is")
    layout = config.get("checkpoint_format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        raise refuse(f"checkpoint_format '{layout}' is not read, 'gptq' and 'gptq_v2' are")
    dynamic = config.get("dynamic") or {}
    for key, other in dynamic.items():
        if key.startswith("-:") or set(other) != {"bits"}:
            raise refuse(f"dynamic: {key}: other settings than bits for some modules are not read")
    others = {key.removeprefix("+:"): other["bits"] for key, other in dynamic.items()}
    for bits in (config.get("bits"), *others.values()):
        if bits not in BITS:
            raise refuse(f"bits {bits} are not read, {', '.join(map(str, BITS))} are")
    names = {
        foreign.removesuffix(".weight"): path.removesuffix(".weight") for path, foreign in net.layout.tensors.items()
    }
    own_biases = {f"{path}.bias" for path, linear in linears(net) if linear.bias is not None}
    tensors: dict[str, dict[str, Entry | Held]] = {}
    rest: dict[str, Entry | Held] = {}
    for name, entry in stored.items():
        base, _, leaf = name.rpartition(".")
        path = names.get(base, "")
        if leaf in TENSORS and path:
            tensors.setdefault(path, {})[leaf] = entry
        elif f"{base}.qweight" not in stored or f"{path}.{leaf}" in own_biases or entry.read().any():
            rest[name] = entry  # all but the zeros that some write where a projection has no bias
    if not tensors:
        raise refuse("no projection is stored so")
    incomplete = [f"{path} ({key})" for path, own in tensors.items() for key in TENSORS if key not in own]
    if incomplete:
        raise UserError(f"{where}: quantised projections lack tensors: {', '.join(incomplete[:3])}; download it again")
    form = Form(config["bits"], config.get("group_size", 128), config.get("sym", True))
    orders = {path: own["g_idx"].read() for path, own in tensors.items()}
    ordered = [path for path, groups in orders.items() if bool((groups.diff() < 0).any())]
    for path, groups in orders.items():
        if not torch.equal(
            groups.sort().values, torch.arange(len(groups), dtype=groups.dtype) // form.size(len(groups))
        ):
            raise refuse(f"the groups of {path} are not of {form.group_size} inputs each")
    form, forms = replace(form, ordered=bool(ordered)), {}
    for path in tensors:
        full = net.layout.tensors[f"{path}.weight"].removesuffix(".weight")
        both = (full, full.removeprefix(net.layout.prefix))
        hits = (bits for pattern, bits in others.items() if any(re.match(pattern, name) for name in both))
        forms[path] = replace(form, bits=next(hits, form.bits))
    return Quantised(forms, layout == "gptq", tensors), rest


@dataclass(frozen=True, eq=False)
class Part:
    """One tensor of a projection's storage, made of the checkpoint's when it is read; in the role of an `Entry`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    form: Form
    less_one: bool
    own: Mapping[str, Entry | Held]
    name: str
    nbytes = 0  # of a buffer to read into

    def read(self, scratch: Tensor | None = None) -> Tensor:
        form, own = self.form, self.own
        order = own["g_idx"].read().argsort(stable=True)
        if self.name == "order":
            return order.int()
        if self.name == "scale":
            return own["scales"].read().t().half().contiguous()
        if self.name == "packed":
            packed = torch.empty(self.shape, dtype=torch.uint8)
            for words, out in zip(own["qweight"].read().split(ROWS, 1), packed.split(ROWS), strict=True):
                if by_bytes(form):
                    out.copy_(swapped(words.t().contiguous().view(torch.uint8), form.bits))
                    continue
                codes = from_words(words, form.bits).t()
                out.copy_(pack(codes[:, order] if form.ordered else codes, form.bits))
            return packed
        words = own["qzeros"].read().t()
        return from_words(moved(words, form.bits, 1) if self.less_one else words, form.bits)
