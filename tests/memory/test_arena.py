"""Addresses: nothing that lives together overlaps, small problems are solved like brute force, bounds are bounds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from gossamer.memory.arena import place
from gossamer.memory.liveness import Life, peak, profile


def random_lives(seed: int, n: int, *, alike: bool = False) -> list[Life]:
    rng = np.random.default_rng(seed)
    first = rng.integers(-1, n, n)
    last = np.minimum(first + rng.integers(0, max(2, n // 3), n), n)
    sizes = 64 * (rng.integers(1, 4, n) if alike else rng.integers(1, 200, n))
    return [Life(str(i), (i,), int(s), int(a), int(b)) for i, (s, a, b) in enumerate(zip(sizes, first, last, strict=True))]


def overlaps(lives: list[Life], offsets: tuple[int, ...]) -> list[tuple[str, str]]:
    """Pairs that share a moment and a byte, by going over all moments and bytes' intervals."""
    found = []
    for moment in range(-1, 1 + max(x.last for x in lives)):
        here = sorted((o, o + x.size, x.name) for x, o in zip(lives, offsets, strict=True) if x.first <= moment <= x.last)
        found += [(a[2], b[2]) for a, b in itertools.pairwise(here) if a[1] > b[0]]
    return found


@pytest.mark.parametrize("seed", range(40))
def test_nothing_that_lives_together_overlaps(seed):
    lives = random_lives(seed, 4 + 3 * seed, alike=seed % 2 == 0)
    bound = peak(lives, 4 + 3 * seed)
    placed = place(lives, bound)
    assert overlaps(lives, placed.offsets) == []
    assert placed.size == max(o + x.size for x, o in zip(lives, placed.offsets, strict=True)) >= bound
    assert all(o % 64 == 0 for o in placed.offsets)
    assert not placed.optimal or placed.method == "integer program" or placed.size == bound


def brute_force(lives: list[Life]) -> int:
    """The smallest arena: every order of placing, each as low as it goes, contains an optimum."""
    best = 10**9
    for order in itertools.permutations(range(len(lives))):
        offsets: dict[int, int] = {}
        for i in order:
            near = [j for j in offsets if lives[j].first <= lives[i].last and lives[i].first <= lives[j].last]
            spots = sorted({0, *(offsets[j] + lives[j].size for j in near)})
            offsets[i] = next(s for s in spots if all(s + lives[i].size <= offsets[j] or s >= offsets[j] + lives[j].size for j in near))
        best = min(best, max(o + lives[i].size for i, o in offsets.items()))
    return best


@pytest.mark.parametrize("seed", range(25))
def test_small_problems_are_solved_like_brute_force(seed):
    lives = random_lives(1000 + seed, 6, alike=seed % 3 == 0)
    placed = place(lives, peak(lives, 6))
    assert placed.size == brute_force(lives)
    assert placed.optimal


def test_an_arena_above_the_bound_is_proved_to_be_the_smallest():
    # the classic gap: whoever lies lowest, a hole of two units is left in two pieces at some moment
    spans = [(0, 0, 1), (0, 1, 1), (0, 3, 2), (1, 4, 1), (2, 2, 1), (3, 6, 1), (4, 5, 2), (5, 6, 1), (6, 6, 2)]
    lives = [Life(str(i), (i,), 64 * s, a, b) for i, (a, b, s) in enumerate(spans)]
    placed = place(lives, peak(lives, 7))
    assert overlaps(lives, placed.offsets) == []
    assert placed.optimal


def test_the_same_seed_gives_the_same_addresses():
    lives = random_lives(5, 30)
    assert place(lives, peak(lives, 30)).offsets == place(lives, peak(lives, 30)).offsets


def test_live_bytes_against_numpy():
    lives = random_lives(3, 25)
    table = np.zeros(27, dtype=int)
    for x in lives:
        table[x.first + 1 : x.last + 2] += x.size
    assert profile(lives, 25) == table.tolist()


def test_no_lives_take_nothing():
    assert place([], 0).size == 0
