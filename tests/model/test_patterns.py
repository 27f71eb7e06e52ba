"""Attention patterns against loops over pairs of positions."""

from __future__ import annotations

import pytest
import torch

from burnish.model.patterns import BigBird, Window, blocks

LENGTH, SIZE = 23, 3
BIRDS = [BigBird(SIZE, 1, 1, 1, 0, 8), BigBird(SIZE, 2, 3, 2, 5, 8), BigBird(SIZE, 0, 1, 0, 0, 8)]
BIRDS += [BigBird(SIZE, 3, 1, 1, 0, 2)]  # fewer blocks to draw from than are global


def square(pattern, causal: bool) -> torch.Tensor:
    at = torch.arange(LENGTH)
    return pattern(at[:, None], at[None, :], causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("size", [1, 4, 40])
def test_a_window(size, causal):
    seen = square(Window(size), causal)
    for i in range(LENGTH):
        for j in range(LENGTH):
            assert seen[i, j] == ((not causal or j <= i) and abs(i - j) < size)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bird", BIRDS)
def test_bigbird(bird, causal):
    seen, drawn = square(bird, causal), {}
    for i in range(LENGTH):
        for j in range(LENGTH):
            row, column = i // SIZE, j // SIZE
            near = abs(row - column) <= bird.window_blocks // 2
            known = near or row < bird.global_blocks or column < bird.global_blocks
            if causal and j > i:
                assert not seen[i, j]
            elif known:
                assert seen[i, j]
            elif seen[i, j]:
                drawn.setdefault(row, set()).add(column)
    for row in range(bird.global_blocks, -(-LENGTH // SIZE)):
        candidates = range(bird.global_blocks, row if causal else bird.reach)
        others = [column for column in candidates if abs(row - column) > bird.window_blocks // 2]
        assert len(drawn.get(row, ())) == min(bird.random_blocks, len(others))


def test_what_is_drawn_depends_on_the_seed_and_not_on_the_length():
    for causal in (True, False):
        assert torch.equal(blocks(BIRDS[0], 8, causal), blocks(BIRDS[0], 32, causal)[:8, :8])
    other = BigBird(SIZE, 1, 1, 1, 1, 8)
    assert not torch.equal(square(other, True), square(BIRDS[0], True))


@pytest.mark.parametrize("pattern", [Window(5), *BIRDS])
def test_what_covers_a_length_hides_nothing_of_it(pattern):
    at = torch.arange(LENGTH)
    assert not pattern.covers(LENGTH)
    for length in filter(pattern.covers, range(1, LENGTH)):
        for start in range(LENGTH):
            part = at[start : start + length]
            assert pattern(part[:, None], part[None, :], False).all()
