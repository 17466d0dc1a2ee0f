"""How many heads' tiles persistent kernels take together, against programs counted one by one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as some

pytest.importorskip("triton")

from longctx_triton.launch import tile_order


def work(tiles, units, section, programs):
    """Return what each program does, tile after tile, as the kernels' ``_locate`` deals them."""
    done = [0.0] * programs
    for index in range(min(tiles * units, tile_order.MOST_ROUNDS * programs)):
        turn, slot = divmod(index, programs)
        program = slot if turn % 2 == 0 else programs - 1 - slot
        first = index // (section * tiles) * section
        tile = (index - first * tiles) // min(section, units - first)
        done[program] += tiles - tile + tile_order.TILE_COST
    return done


@given(
    tiles=some.integers(1, 40), units=some.integers(1, 24), section=some.integers(1, 24),
    programs=some.integers(1, 20),
)  # fmt: skip
def test_the_cost_is_that_of_the_busiest_program(tiles, units, section, programs):
    section = min(section, units)
    done = work(tiles, units, section, programs)
    wanted = max(done) / (sum(done) / programs)
    assert tile_order._cost(section, tiles, units, section, programs) == pytest.approx(wanted)


@given(
    tiles=some.integers(1, 600), units=some.integers(1, 64), group=some.sampled_from([1, 4, 8]),
    fitting=some.integers(1, 40),
)  # fmt: skip
def test_sections_are_whole_groups_or_everything(tiles, units, group, fitting):
    found = tile_order.causal_section(tiles, units * group, group, fitting, 132)
    assert 1 <= found <= units * group
    assert found % group == 0


@pytest.mark.parametrize(
    ("tiles", "units", "fitting"),
    [(96, 32, 2), (86, 64, 7), (64, 32, 7), (128, 32, 2)],
    ids=["12K", "16K of head size 64", "8K", "16K"],
)
def test_no_program_does_much_more_than_the_others(tiles, units, fitting):
    found = tile_order.causal_section(tiles, units, 1, fitting, 132)
    done = work(tiles, units, found, 132)
    assert max(done) < 1.08 * sum(done) / len(done)


@pytest.mark.parametrize(
    ("k_len", "window", "anchor", "keys"),
    [
        (65536, 4096, 0, 16384),
        (65536, 4000, 96, 16384),
        (32768, 4096, 0, 16384),
        (32767, 4096, 0, 32767),
        (4096, 0, 0, 4096),
    ],
)
def test_keys_that_the_cache_should_hold(k_len, window, anchor, keys):
    assert tile_order.keys_at_work(k_len, window, anchor) == keys


def test_heads_that_fit_the_cache_stay_together_where_that_costs_nothing():
    assert tile_order.causal_section(128, 32, 1, 3, 132) == 3
    assert tile_order.causal_section(512, 32, 1, 1, 132) == 1
    assert tile_order.causal_section(16, 8, 4, 40, 132) == 8
