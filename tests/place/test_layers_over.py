"""Which layers lie where, what moves between them, and in which order."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations, pairwise
from typing import Any

import placed_jobs
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from burnish import chain
from burnish.config import UserError
from burnish.model.attention import Frame
from burnish.place.choice import placed
from burnish.place.layer_parallel import OverDevices, OverRanks, balanced, fill_devices, over_devices
from burnish.place.ranks import Ranks
from burnish.store.checkpoint import load, save


def test_devices_are_filled_in_their_order():
    assert fill_devices([3, 3, 3, 3], 2, {"a": 8, "b": 3, "c": 100}) == ["a", "a", "b", "c"]
    assert fill_devices([3, 3], 0, {"a": 2, "b": 6}) == ["b", "b"]
    with pytest.raises(UserError, match="embedding and head take .* and a has"):
        fill_devices([3], 9, {"a": 8, "b": 100})
    with pytest.raises(UserError, match="a layer takes .* more than any device"):
        fill_devices([3, 9], 0, {"a": 8, "b": 8})
    with pytest.raises(UserError, match="room for 3 of 4 layers"):
        fill_devices([3, 3, 3, 3], 0, {"a": 7, "b": 5})


@given(st.lists(st.integers(1, 50), min_size=4, max_size=8), st.integers(1, 4), st.integers(0, 60), st.integers(0, 60))
def test_shares_are_as_even_as_can_be(sizes, world, first, last):
    def worst(shares) -> int:
        sums = [sum(sizes[start:end]) for start, end in shares]
        sums[0] += first
        sums[-1] += last
        return max(sums)

    count = len(sizes)
    found = balanced(sizes, world, first, last)
    assert [layer for share in found for layer in share] == list(range(count)) and all(found)
    every = (pairwise((0, *cuts, count)) for cuts in combinations(range(1, count), world - 1))
    assert worst([(share.start, share.stop) for share in found]) == min(worst(list(shares)) for shares in every)


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom", "t5", "bert"])
def test_layers_over_two_devices_give_what_one_gives(root, family):
    folder = tiny.folder(root, family)
    model = load(folder, unread=True)
    sizes = [sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in model.net.all_layers]
    rest = sum(p.numel() * p.element_size() for p in model.net.parameters()) - sum(sizes)
    devices = over_devices(model.net, {"cpu": rest + sizes[0], "cpu:1": sum(sizes)})
    assert devices == ["cpu", *["cpu:1"] * (len(sizes) - 1)]
    want, got = placed_jobs.results(load(folder)), placed_jobs.results(model)
    for name, part in want.items():
        torch.testing.assert_close(got[name], part, atol=0, rtol=0)


def test_states_masks_and_caches_move_to_the_layers_device(root):
    """The second layer is on the meta device, from which nothing can come back."""
    model = load(tiny.folder(root, "qwen2"))
    first, second = model.net.layers
    second.to("meta")
    model.net.run_layers = OverDevices([first, second], [torch.device("cpu"), torch.device("meta")])
    seen: list[Any] = []
    second.register_forward_pre_hook(lambda _, given: seen.extend(given))
    cache = model.net.new_cache(2, 4)
    batch = {"input_ids": torch.tensor([[6, 7, 8], [0, 9, 10]]), "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]])}
    with pytest.raises(NotImplementedError, match="meta"):
        chain.forward(model, batch, cache)
    states, frame = seen
    assert {states.device.type, frame.mask.device.type, frame.real.device.type} == {"meta"}
    assert [part.device.type for part in frame.rotary] == ["meta"] * 2
    assert [cache.keys[layer].device.type for layer in (0, 1)] == ["cpu", "meta"]
    assert cache.valid.device.type == "cpu" and cache.keys[0].any()


@dataclass(frozen=True)
class Told(Ranks):
    """Ranks whose exchanges are only written down."""

    events: list[str] = field(default_factory=list)

    def send(self, x):
        self.events.append(f"send {len(x)}")
        return "sent"

    def receive(self, x):
        self.events.append(f"receive {len(x)}")
        return len(x)

    def wait(self, begun):
        self.events.append(f"wait {begun}")

    def from_last(self, x):
        return x


@pytest.mark.parametrize(("batch", "length"), [(4, 16), (32, 1)], ids=["prefill", "decode"])
def test_a_rank_hands_a_part_on_before_it_computes_the_next(batch, length):
    def events(rank: int) -> list[str]:
        ranks = Told(rank, 2)

        class Layer(torch.nn.Module):
            index = rank

            def forward(self, x, frame):
                ranks.events.append(f"compute {len(x)}")
                assert (frame.batch, frame.length) == (batch // 2, length)
                return x + 1

        run = OverRanks([Layer()], ranks)  # type: ignore[list-item]
        frame = Frame(batch, length, None, True, None, None, None)
        run(torch.zeros(batch * length, 4), [frame, frame])
        return ranks.events

    half = batch * length // 2
    assert events(0) == [f"compute {half}", f"send {half}"] * 2 + ["wait sent"] * 2
    assert events(1) == [f"receive {half}"] * 2 + [f"wait {half}", f"compute {half}"] * 2


def test_a_placed_model_is_neither_changed_nor_saved(root, tmp_path):
    model = placed(load(tiny.folder(root, "llama"), unread=True), "layer_parallel", Ranks(), {"cpu": 10**9})
    with pytest.raises(UserError, match="the model is placed"):
        chain.apply(model, "lora")
    with pytest.raises(UserError, match="the model is placed"):
        save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
