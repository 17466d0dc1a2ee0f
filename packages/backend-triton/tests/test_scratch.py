"""Memory between the kernels of a call, over a stand-in for CUDA."""

from __future__ import annotations

import threading
import types

import pytest
import torch

pytest.importorskip("triton")

from longctx_triton.launch import scratch as module

PIECES = ((5, torch.float32), (3, torch.float64), (0, torch.int32), (7, torch.float16))


class Like:
    """Stand for a tensor on the first GPU."""

    device = torch.device("cpu")

    @staticmethod
    def get_device():
        return 0


@pytest.fixture
def cuda(monkeypatch):
    """One GPU whose current stream and capture are set by hand; its memory is the CPU's."""
    gpu = types.SimpleNamespace(stream=7, capturing=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: gpu.capturing)
    monkeypatch.setattr(module, "raw_stream", lambda _index: gpu.stream)
    monkeypatch.setattr(module, "_allocated", module._memory)
    monkeypatch.setattr(module, "_kept", module._Kept())
    return gpu


def place(pieces):
    return pieces[0].untyped_storage().data_ptr()


def test_pieces_lie_apart_at_round_addresses(cuda):
    found = module.scratch(Like, PIECES)
    assert [(len(t), t.dtype) for t in found] == list(PIECES)
    assert all(t.data_ptr() % 16 == 0 for t in found if len(t))
    for i, piece in enumerate(found):
        piece.fill_(i)
    assert all(bool((t == i).all()) for i, t in enumerate(found))


def test_a_piece_may_come_in_two_dtypes(cuda):
    pieces = ((3, torch.float32), (6, torch.int32, torch.int64), (2, torch.float16))
    before, narrow, wide, behind = module.scratch(Like, pieces)
    assert [(len(t), t.dtype) for t in (narrow, wide)] == [(6, torch.int32), (3, torch.int64)]
    assert narrow.data_ptr() == wide.data_ptr()
    before.fill_(1)
    behind.fill_(1)
    wide.fill_(7 << 32 | 5)
    assert narrow.tolist() == [5, 7] * 3
    assert module.scratch(Like, pieces)[1] is narrow


def test_a_stream_keeps_its_memory_and_it_grows(cuda):
    first = module.scratch(Like, PIECES)
    assert module.scratch(Like, PIECES) is first
    assert place(module.scratch(Like, ((9, torch.float32),))) == place(first)
    large = ((module.LEAST_BYTES, torch.float32),)
    grown = module.scratch(Like, large)
    assert place(grown) != place(first)
    assert place(module.scratch(Like, PIECES)) == place(grown)
    most = ((module.MOST_BYTES, torch.float32),)
    assert module.scratch(Like, most) is not module.scratch(Like, most)


def test_streams_threads_and_captures_share_nothing(cuda):
    found = [module.scratch(Like, PIECES)]
    cuda.stream = 8
    found.append(module.scratch(Like, PIECES))
    thread = threading.Thread(target=lambda: found.append(module.scratch(Like, PIECES)))
    thread.start()
    thread.join()
    cuda.capturing = True
    found += [module.scratch(Like, PIECES) for _ in range(2)]
    assert len({place(pieces) for pieces in found}) == 5
    cuda.capturing = False
    assert module.scratch(Like, PIECES) is found[1]


def test_without_a_gpu_memory_is_fresh():
    x = torch.zeros(1)
    assert place(module.scratch(x, PIECES)) != place(module.scratch(x, PIECES))
