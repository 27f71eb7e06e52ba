"""The fast path of decoding: steps of one token a row, on a GPU as one graph (`graphed.py`), on a CPU in C.

A step is bound by the bytes of the weights. Run as modules, a layer is a dozen calls with the machine idle between
them; fused, by `native/decode.c`, its norms, projections, rotation, attention, activation and residuals are one loop
of one team of threads. `fused` puts it before a network's layers and takes it away again; nothing of the network
changes. Layers that it does not know (a wrapped projection, a norm behind the sum, a hook) run as they are, between
those that it knows. A longer prompt takes the kernels of a training step between its products.

Over ranks that each have a part of every matrix, a layer is run in its two halves, with the sum over the ranks behind
each. Activations are float32 within a step, whatever dtype the network computes in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from burnish.kernels import training
from burnish.model.attention import Attention, Frame
from burnish.model.cache import KVCache
from burnish.model.linear import Linear
from burnish.model.network import Network
from burnish.model.norm import CentredNorm, Norm
from burnish.model.pages import Step
from burnish.model.spec import Spec
from burnish.model.transformer import MLP, Layer, Transformer
from burnish.native import decode, paged, products
from burnish.place.tensor_parallel import Summed

GRAPHED = ("cuda",)  # devices that take a step as one graph
MOST_ROWS = products.FEW_TOKENS
LONG = 64  # tokens of a prompt for which building the kernels pays


@contextmanager
def fused(net: Network, prompt: int = 0, steps: int = 0) -> Iterator[None]:
    """Run by the fast path inside the block, where there is one for this network, prompts of up to `prompt` tokens and
    about so many steps of a `KVCache`. Weights must not change in it."""
    if steps and net.embed_tokens.weight.device.type in GRAPHED:
        from burnish.place.graphed import graphed

        with graphed(net, steps):
            yield
    else:
        with stepping(net, stepper_of(net), prompt):
            yield


@contextmanager
def stepping(net: Network, stepper: Stepper | None, prompt: int = 0) -> Iterator[None]:
    """`fused` on a CPU by a stepper made before, since when weights must not have changed. None: the network has no
    steps of its own, and long prompts alone take their kernels."""
    long = prompt >= LONG and net.embed_tokens.weight.device.type == "cpu"
    with training.fused(net) if long else nullcontext():
        if stepper is None or stepper.net.run_layers is not None:
            yield
            return
        stepper.net.run_layers = stepper
        try:
            yield
        finally:
            stepper.net.run_layers = None


def stepper_of(net: Network) -> Stepper | None:
    """The fast path through a network as it is now; None where there is none."""
    if not isinstance(net, Transformer) or not products.usable(net.embed_tokens.weight.device, net.dtype):
        return None
    stepper = Stepper(net)
    return stepper if any(stepper.known) else None


class Stepper:
    """Goes through the layers for a step of one token a row; None for anything else."""

    def __init__(self, net: Transformer):
        self.net = net
        self.known = [describe(layer) for layer in net.layers]
        attention: Attention = net.layers[0].self_attn  # type: ignore[assignment, union-attr]
        inner = next((known[0]["gate"].shape[0] for known in self.known if known), 0)
        found = [known or ({}, {}, 1.0) for known in self.known]
        self.layers = decode.Layers(shape_of(attention.spec, inner), found)

    def __call__(self, x: Tensor, frames: Sequence[Frame]) -> Tensor | None:
        """x (rows, hidden) before the layers -> after them."""
        held = held_of(frames[0])
        if held is None or len(x) > MOST_ROWS or torch.is_grad_enabled():
            return None
        runs = groupby(range(len(self.known)), key=lambda index: (self.way(index), id(frames[index])))
        for (way, _), run in runs:
            indices = list(run)
            own = frames[indices[0]]
            rotary = None if own.rotary is None else tuple(part.reshape(len(x), -1) for part in own.rotary)
            mask = own.parts[0].mask if own.parts else own.mask
            if mask is not None:
                mask = mask[:, 0, 0] if mask.dtype == torch.bool else mask[:, :, 0]
            rest: dict[str, Any] = {"held": held, "rotary": rotary, "mask": mask}
            if way == "fused":
                x = self.layers.run(range(indices[0], indices[-1] + 1), x, **rest)
                continue
            for index in indices:
                x = self.net.layers[index](x, own) if way == "as it is" else self.in_halves(index, x, rest)
        return x

    def way(self, index: int) -> str:
        """How a layer is run."""
        if self.known[index] is None:
            return "as it is"
        return "in halves" if isinstance(self.net.layers[index].self_attn.o_proj, Summed) else "fused"  # type: ignore[union-attr]

    def in_halves(self, index: int, x: Tensor, rest: dict[str, Any]) -> Tensor:
        """A layer whose halves each end in a sum over ranks."""
        layer: Layer = self.net.layers[index]  # type: ignore[assignment]
        o, down = layer.self_attn.o_proj, layer.mlp.down_proj
        assert isinstance(o, Summed) and isinstance(down, Summed)
        wide, one = x.float(), range(index, index + 1)
        added = self.layers.run(one, x, **rest, part=decode.ATTENTION)
        if self.layers.shape.parallel:
            added = added + self.layers.run(one, x, **rest, part=decode.FEED_FORWARD)
            return (wide + o.total(added, down.bias)).to(x.dtype)
        wide = wide + o.total(added)
        x = wide.to(x.dtype)
        return (wide + down.total(self.layers.run(one, x, **rest, part=decode.FEED_FORWARD))).to(x.dtype)


def held_of(frame: Frame) -> decode.Held | None:
    """What the rows of a frame attend to; None where they have not one token each, or do not only know a cache."""
    cache = frame.cache
    if isinstance(cache, Step):
        view = cache.views[0]
        if len(cache.views) > 1 or view.new > 1:
            return None
        pages = view.pages
        scales = None if pages.scales is None else (pages.scales[0], pages.scales[1])
        return decode.Held(pages.stored[0], pages.stored[1], view.length, view.slots, scales)
    if type(cache) is not KVCache or frame.length != 1 or frame.prefix is not None or frame.real is not None:
        return None
    return decode.Held(cache.keys, cache.values, cache.length) if cache.keys[0].dtype in products.DTYPES else None


def shape_of(spec: Spec, inner: int) -> decode.Shape:
    rotated = int(spec.head_dim * spec.rotary_share) if spec.positions == "rotary" else 0
    sizes = (spec.hidden_size, spec.num_heads, spec.num_kv_heads, spec.head_dim, inner)
    return decode.Shape(*sizes, spec.fused_qkv, bool(spec.parallel_norms), spec.activation, rotated, spec.clip_qkv)


def describe(layer: nn.Module) -> tuple[dict[str, decode.Matrix], dict[str, decode.Norm], float] | None:
    """A layer's projections, norms and scale of scores; None where it is not all the network's own."""
    if type(layer) is not Layer:
        return None
    spec, attention, mlp = layer.spec, layer.self_attn, layer.mlp
    outs = [attention.o_proj, mlp.down_proj]
    split = all(isinstance(out, Summed) for out in outs)
    if any(part._forward_hooks or part._forward_pre_hooks for part in layer.modules()):
        return None
    known = (Attention, MLP, Linear, Norm, CentredNorm, *((Summed,) if split else ()))
    if any(type(part) not in known for parent in (layer, attention, mlp) for part in parent.children()):
        return None
    if spec.post_norm or spec.attention_softcap or (split and spec.sandwich_norm):
        return None
    if spec.head_dim > paged.MOST_SIZE:
        return None
    named: dict[str, Any] = {
        "q": attention.qkv_proj if spec.fused_qkv else attention.q_proj,
        "k": None if spec.fused_qkv else attention.k_proj,
        "v": None if spec.fused_qkv else attention.v_proj,
        "o": outs[0].base if split else outs[0],
        "gate": mlp.gate_proj or mlp.up_proj, "up": mlp.gate_proj and mlp.up_proj,
        "down": outs[1].base if split else outs[1],
    }  # fmt: skip
    matrices = {}
    for name, linear in named.items():
        if linear is None:
            continue
        stored = linear.weight.as_stored() if type(linear) is Linear else None
        if stored is None:
            return None
        bias = None if linear.bias is None else linear.bias.detach().float()
        matrices[name] = decode.Matrix(*stored, (linear.out_features, linear.in_features), bias)
    sandwich = spec.sandwich_norm
    norms = {
        "before_attention": layer.input_layernorm,
        "after_attention": layer.post_attention_layernorm if sandwich else None,
        "before_mlp": layer.pre_feedforward_layernorm if sandwich else getattr(layer, "post_attention_layernorm", None),
        "after_mlp": layer.post_feedforward_layernorm if sandwich else None,
        "q_norm": attention.q_norm, "k_norm": attention.k_norm,
    }  # fmt: skip
    written = {name: norm_of(norm) for name, norm in norms.items() if norm is not None}
    return matrices, written, attention.scale or spec.head_dim**-0.5


def norm_of(norm: Norm) -> decode.Norm:
    weight = norm.weight.detach().float()
    bias = None if norm.bias is None else norm.bias.detach().float()
    return decode.Norm(weight + 1 if isinstance(norm, CentredNorm) else weight, bias, not norm.rms, norm.eps)
