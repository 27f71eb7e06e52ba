"""Masks of burnish in attention that transformers computes.

Models of transformers 5 take their attention function, and the function that makes its masks, from registries, by the
name that their config holds. For each of "sdpa" and "eager" a second name is registered: attention is the same, so that
soft caps, sinks, scaling and dropout stay the model's, and a mask shows what both the model's own (its triangle, its
sliding windows, padding) and burnish's show. The config holds that name only while a forward runs; activation
checkpointing keeps the masks, so that a layer may run again outside.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from typing import Any

from torch import Tensor, nn

SEEN: ContextVar[tuple[Tensor, bool]] = ContextVar("seen")


def registered(layers: Iterable[nn.Module]) -> bool:
    """Whether every layer has a module that asks transformers' registries."""
    found = [any(asks(type(part)) for part in layer.modules()) for layer in layers]  # type: ignore[arg-type]
    return bool(found) and all(found)


@cache
def asks(kind: type[nn.Module]) -> bool:
    """Whether a class takes its attention function from the registry, in a file that takes its masks from there."""
    forward = inspect.unwrap(kind.forward)
    if "ALL_ATTENTION_FUNCTIONS" not in getattr(getattr(forward, "__code__", None), "co_names", ()):
        return False
    return any(getattr(x, "__module__", "") == "transformers.masking_utils" for x in forward.__globals__.values())


@contextmanager
def showing(config: Any, seen: Tensor | None, causal: bool) -> Iterator[None]:
    """While it lasts, self-attention of `config`'s model sees no more than `seen` (B, 1, T, S) shows, a bool for the T
    last of S tokens; None shows all. causal: what is not is attention to a source, and left alone."""
    if seen is None:
        yield
        return
    own = config._attn_implementation
    token = SEEN.set((seen, causal))
    try:
        config._attn_implementation = register(own)
        yield
    finally:
        config._attn_implementation = own
        SEEN.reset(token)


@cache
def register(own: str) -> str:
    """The name of what is registered beside the attention called `own`."""
    from transformers import AttentionInterface, AttentionMaskInterface

    name = f"burnish_{own}"
    AttentionInterface.register(name, AttentionInterface().get(own, eager))
    AttentionMaskInterface.register(name, partial(both, AttentionMaskInterface()[own]))
    return name


def eager(module: nn.Module, *args: Any, **given: Any) -> Any:
    """The attention that the module's own file writes out."""
    return inspect.unwrap(type(module).forward).__globals__["eager_attention_forward"](module, *args, **given)


def both(make: Callable[..., Tensor], *args: Any, mask_function: Callable[..., Tensor], **given: Any) -> Tensor:
    """The mask that `make` makes of what both `mask_function` and burnish's mask show."""
    from transformers.masking_utils import and_masks, bidirectional_mask_function

    seen, causal = SEEN.get()
    if causal and mask_function is bidirectional_mask_function:
        return make(*args, mask_function=mask_function, **given)
    first = seen.shape[3] - seen.shape[2]  # the first query, counted as keys are
    shown = and_masks(mask_function, lambda row, head, query, key: seen[row, 0, query - first, key])
    given |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return make(*args, mask_function=shown, **given)
