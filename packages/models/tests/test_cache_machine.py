"""The KV caches against a model made of plain lists, over random histories."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor

from longctx.plans import RetentionPlan
from longctx.protocols.kv_cache import KVCache
from longctx_models.caches import ContiguousCache, PagedCache

LAYERS, BATCH, HEADS, SIZE, VALUES = 2, 2, 3, 2, 3
MAX_HELD = 60
WHICH = st.integers(0, 3)


@dataclass
class Plain:
    """What a cache should hold: a list of ``[B, Hkv, D]`` slots a layer."""

    slots: list[list[tuple[Tensor, Tensor]]]
    logical: int = 0
    evicted_at: int = 0
    auxiliary: dict[str, int] = field(default_factory=dict)
    marks: dict[int, dict[str, int]] = field(default_factory=dict)

    def copy(self) -> Plain:
        return Plain(
            [list(layer) for layer in self.slots],
            self.logical,
            self.evicted_at,
            dict(self.auxiliary),
            dict(self.marks),
        )


@dataclass(eq=False)
class Pair:
    cache: KVCache
    plain: Plain


class CacheMachine(RuleBasedStateMachine):
    """Runs the same history on a cache and on lists, and compares after every step."""

    counter = 0

    def make(self) -> KVCache:
        raise NotImplementedError

    def fresh(self, *shape: int) -> Tensor:
        first = self.counter
        self.counter += int(torch.tensor(shape).prod())
        return torch.arange(first, self.counter, dtype=torch.float32).view(shape)

    @initialize()
    def begin(self) -> None:
        self.pairs = [Pair(self.make(), Plain([[] for _ in range(LAYERS)]))]

    def pick(self, which: int) -> Pair:
        return self.pairs[which % len(self.pairs)]

    def add(self, pair: Pair) -> None:
        self.pairs = [*self.pairs[-3:], pair]

    @rule(which=WHICH, tokens=st.integers(0, 9))
    def append(self, which: int, tokens: int) -> None:
        pair = self.pick(which)
        if max(len(layer) for layer in pair.plain.slots) + tokens > MAX_HELD:
            return
        for layer in range(LAYERS):
            k = self.fresh(BATCH, tokens, HEADS, SIZE)
            v = self.fresh(BATCH, tokens, HEADS, VALUES)
            pair.cache.append(layer, k, v)
            pair.plain.slots[layer] += [(k[:, t], v[:, t]) for t in range(tokens)]
        pair.plain.logical += tokens

    @rule(which=WHICH)
    def write_state(self, which: int) -> None:
        pair = self.pick(which)
        state = pair.cache.auxiliary(1)
        value = self.counter = self.counter + 1
        if "state" in state:
            state["state"].fill_(value)
        else:
            state["state"] = torch.full((2,), value)
        pair.plain.auxiliary["state"] = value

    @rule(which=WHICH)
    def mark(self, which: int) -> None:
        pair = self.pick(which)
        assert pair.cache.mark() == pair.plain.logical
        pair.plain.marks[pair.plain.logical] = dict(pair.plain.auxiliary)

    @rule(which=WHICH, data=st.data())
    def rollback(self, which: int, data: st.DataObject) -> None:
        pair = self.pick(which)
        plain = pair.plain
        mark = data.draw(st.sampled_from(sorted({*plain.marks, plain.logical + 1, 0})))
        if mark not in plain.marks or not plain.evicted_at <= mark <= plain.logical:
            with pytest.raises(ValueError, match="mark"):
                pair.cache.rollback(mark)
        else:
            pair.cache.rollback(mark)
            for layer in plain.slots:
                del layer[len(layer) - (plain.logical - mark) :]
            plain.logical, plain.auxiliary = mark, dict(plain.marks[mark])
            plain.marks = {at: state for at, state in plain.marks.items() if at <= mark}

    @rule(which=WHICH, layer=st.integers(0, LAYERS - 1), seed=st.integers(0, 999))
    def retain(self, which: int, layer: int, seed: int) -> None:
        pair = self.pick(which)
        plain = pair.plain
        held = len(plain.slots[layer])
        draw = random.Random(seed)
        count = draw.randint(0, held)
        sets = [
            [sorted(draw.sample(range(held), count)) for _ in range(HEADS)] for _ in range(BATCH)
        ]
        indices = torch.tensor(sets, dtype=torch.int32).view(BATCH, HEADS, count)
        padded = torch.nn.functional.pad(indices, (0, 2), value=-1)
        counts = torch.full((BATCH, HEADS), count, dtype=torch.int32)
        pair.cache.retain(layer, RetentionPlan(padded, counts))
        if count == held:
            return
        old = plain.slots[layer]
        plain.slots[layer] = [
            tuple(  # type: ignore[misc]
                torch.stack(
                    [
                        torch.stack([old[sets[b][h][n]][part][b, h] for h in range(HEADS)])
                        for b in range(BATCH)
                    ]
                )
                for part in (0, 1)
            )
            for n in range(count)
        ]
        plain.evicted_at = plain.logical

    @rule(which=WHICH)
    def fork(self, which: int) -> None:
        pair = self.pick(which)
        self.add(Pair(pair.cache.fork(), pair.plain.copy()))

    @rule(which=WHICH)
    def save_and_load(self, which: int) -> None:
        pair = self.pick(which)
        with TemporaryDirectory() as folder:
            path = Path(folder) / "cache.safetensors"
            pair.cache.save(path)
            loaded = type(pair.cache).load(path)  # type: ignore[attr-defined]
        plain = pair.plain.copy()
        plain.marks = {}
        self.add(Pair(loaded, plain))

    @rule(which=WHICH)
    def offload(self, which: int) -> None:
        pair = self.pick(which)
        # the other device that every machine has holds no data: pretend, by way of the sizes
        pair.cache._adopt_moved(  # type: ignore[attr-defined]
            [pair.cache._moved(n, pair.cache.sizes) for n in range(LAYERS)]  # type: ignore[attr-defined]
        )

    @rule(which=WHICH)
    def drop(self, which: int) -> None:
        pair = self.pick(which)
        if len(self.pairs) > 1:
            self.pairs.remove(pair)

    @invariant()
    def all_hold_what_they_should(self) -> None:
        for pair in getattr(self, "pairs", ()):
            self.check(pair.cache, pair.plain)

    def check(self, cache: KVCache, plain: Plain) -> None:
        assert cache.logical_length() == plain.logical
        for layer, slots in enumerate(plain.slots):
            assert cache.physical_length(layer) == len(slots)
            k, v = cache.gather(layer)
            assert k.shape == (BATCH, len(slots), HEADS, SIZE)
            assert v.shape == (BATCH, len(slots), HEADS, VALUES)
            for n, (k_slot, v_slot) in enumerate(slots):
                assert torch.equal(k[:, n], k_slot)
                assert torch.equal(v[:, n], v_slot)
            self.check_view(cache, layer, k, v)
        state = {name: int(t[0]) for name, t in cache.auxiliary(1).items()}
        assert state == plain.auxiliary
        held = sum(len(slots) for slots in plain.slots) * BATCH * HEADS * (SIZE + VALUES) * 4
        assert cache.nbytes() >= held

    def check_view(self, cache: KVCache, layer: int, k: Tensor, v: Tensor) -> None:
        view = cache.view(layer)
        assert view.length == k.shape[1]
        assert view.seqlens.tolist() == [view.length] * BATCH
        assert view.seqlens.dtype == torch.int32
        for memory, whole in ((view.k, k), (view.v, v)):
            if view.page_table is not None:
                assert view.page_table.dtype == torch.int32
                memory = memory[view.page_table.long()].flatten(1, 2)
            assert torch.equal(memory[:, : view.length], whole)


class ContiguousMachine(CacheMachine):
    def make(self) -> KVCache:
        return ContiguousCache(LAYERS, BATCH, HEADS, SIZE, value_dim=VALUES, capacity=4)


class PagedMachine(CacheMachine):
    def make(self) -> KVCache:
        return PagedCache(LAYERS, BATCH, HEADS, SIZE, value_dim=VALUES, capacity=4, page_size=4)

    @invariant()
    def pages_are_counted(self) -> None:
        uses: dict[int, Counter[int]] = {}
        pools = {}
        for pair in getattr(self, "pairs", ()):
            assert isinstance(pair.cache, PagedCache)
            for pool, table in zip(pair.cache._pools, pair.cache._tables, strict=True):
                pools[id(pool)] = pool
                uses.setdefault(id(pool), Counter()).update(page for row in table for page in row)
        for number, pool in pools.items():
            assert {p: n for p, n in enumerate(pool.references) if n} == uses[number]
            assert sorted(pool.free) == [p for p, n in enumerate(pool.references) if not n]


_SETTINGS = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
ContiguousMachine.TestCase.settings = _SETTINGS
PagedMachine.TestCase.settings = _SETTINGS
TestContiguousHistories = ContiguousMachine.TestCase
TestPagedHistories = PagedMachine.TestCase
