"""The random keys are SplitMix64, and no two steps share one."""

from __future__ import annotations

import torch

from pyft.training.seeds import make_seeder, mix, splitmix64, step_seed


def test_splitmix_reference_values() -> None:
    """The first outputs of the reference C program for seed 1234567 (prng.di.unimi.it/splitmix64.c)."""
    golden, state, seen = 0x9E3779B97F4A7C15, 1234567, []
    for _ in range(5):
        seen.append(splitmix64(state))
        state = (state + golden) % 2**64
    wanted = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert seen == wanted


def test_no_two_steps_share_a_seed() -> None:
    seeds = {
        step_seed(mix(seed, stage, epoch), step)
        for seed in (0, 1, -1)
        for stage in range(3)
        for epoch in range(10)
        for step in range(100)
    }
    assert len(seeds) == 3 * 3 * 10 * 100
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert mix(1, 2) != mix(2, 1)


def test_the_seeder_seeds_torch() -> None:
    with torch.random.fork_rng(devices=[]):
        make_seeder(torch.device("cpu"))(2**63 - 1)
        first = torch.rand(3)
        torch.manual_seed(2**63 - 1)
        assert torch.equal(first, torch.rand(3))
