"""Memory that kernels of one stream share, over a stand-in for CUDA."""

from __future__ import annotations

import types
from itertools import pairwise

import pytest
import torch

pytest.importorskip("triton")

from longctx_triton.launch import workspace as module

GPU = torch.device("cuda", 0)


class Cuda:
    """One GPU whose current stream and capture are set by hand; its memory is the CPU's."""

    def __init__(self):
        self.stream, self.capturing, self.waits = 7, False, 0

    def current_device(self):
        return 0

    def is_current_stream_capturing(self):
        return self.capturing

    def current_stream(self, _device):
        return types.SimpleNamespace(synchronize=self.wait)

    def wait(self):
        assert not self.capturing, "a stream that is captured cannot be waited for"
        self.waits += 1


@pytest.fixture
def cuda(monkeypatch):
    gpu = Cuda()
    fake = types.SimpleNamespace(
        cuda=gpu, int32=torch.int32, float32=torch.float32,
        zeros=lambda *size, device, **kind: torch.zeros(*size, **kind),
        empty=lambda *size, device, **kind: torch.empty(*size, **kind),
    )  # fmt: skip
    monkeypatch.setattr(module, "torch", fake)
    monkeypatch.setattr(module, "raw_stream", lambda _index: gpu.stream)
    monkeypatch.setattr(module, "_of_streams", {})
    module._store.cache_clear()
    yield gpu
    module._store.cache_clear()


def places(*workspaces):
    return [(w.counters.data_ptr(), len(w.counters)) for w in workspaces]


def apart(*workspaces):
    spans = sorted((begin, begin + 4 * count) for begin, count in places(*workspaces))
    return all(end <= begin for (_, end), (begin, _) in pairwise(spans))


def test_a_stream_keeps_its_memory_and_it_grows(cuda):
    first = module.workspace(8, 100, GPU)
    assert module.workspace(8, 90, GPU) is first
    larger = module.workspace(9, 1000, GPU)
    assert larger.counters is first.counters
    assert len(larger.numbers) == 1000
    most = module.workspace(5000, 10, GPU)
    assert len(most.counters) >= 5000
    assert len(most.numbers) == 1000
    assert module.workspace(5000, 1000, GPU) is most
    assert cuda.waits == 1


def test_streams_share_no_counters(cuda):
    found = []
    for cuda.stream in (7, 8, 9):
        found.append(module.workspace(3, 10, GPU))
    assert apart(*found)
    assert all(not w.counters.any() for w in found)
    assert cuda.waits == 1, "later streams take zeros that are there"


def test_every_captured_call_has_counters_of_its_own(cuda):
    eager = module.workspace(4, 10, GPU)
    cuda.capturing = True
    captured = [module.workspace(4, 10, GPU) for _ in range(3)]
    assert apart(eager, *captured)
    cuda.capturing = False
    assert module.workspace(4, 10, GPU) is eager


def test_a_capture_before_any_call_clears_its_own(cuda):
    cuda.capturing = True
    captured = module.workspace(5, 10, GPU)
    assert len(captured.counters) >= 5
    assert not captured.counters.any()
    cuda.capturing = False
    assert apart(captured, module.workspace(5, 10, GPU))


def test_counters_begin_at_multiples_of_16_bytes(cuda):
    for count in (1, 2, 3, 1025):
        cuda.stream += 1
        taken = module.workspace(count, 1, GPU).counters
        assert taken.data_ptr() % 16 == 0
        assert len(taken) >= count


def test_without_a_gpu_memory_is_fresh():
    one, other = (module.workspace(3, 4, torch.device("cpu")) for _ in range(2))
    assert one.counters.tolist() == [0, 0, 0]
    assert one.counters.data_ptr() != other.counters.data_ptr()
