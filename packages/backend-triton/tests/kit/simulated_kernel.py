"""A Gluon kernel called as Triton's is, whose own source threads run: see hopper_simulator."""

from __future__ import annotations

import math
import types

import hopper_simulator as play
import torch

__all__ = ["Simulated"]


def load(pointer, mask=True, other=0):
    offset = torch.as_tensor(pointer.offset).long()
    mask = torch.as_tensor(mask)
    offset = torch.where(mask, offset, 0)
    flat = pointer.data.view(-1)
    assert ((offset >= 0) & (offset < flat.numel())).all()
    return torch.where(mask, flat[offset], other)


def hide(scores, bounds, after):
    columns = torch.arange(scores.shape[1])
    keep = columns <= bounds[:, None] if after else columns >= bounds[:, None]
    return torch.where(keep, scores, -torch.inf)


class Simulated:
    """A kernel of one of ``modules``, program after program in this process.

    ``instead`` are stand-ins for functions of the modules.
    """

    def __init__(self, kernel, *modules, **instead):
        from longctx_triton.kernels.flash_hopper_softmax import NOTHING_SEEN, SLACK

        names = {
            name: types.FunctionType(item.fn.__code__, {})
            for module in modules
            for name, item in vars(module).items()
            if hasattr(item, "fn") and hasattr(item.fn, "__code__")
        }
        world = {
            **names,
            "gl": types.SimpleNamespace(**{**vars(play.LANGUAGE), "load": load}),
            "tma": types.SimpleNamespace(store_wait=play.store_wait),
            "mbarrier": play.MBARRIER,
            "fence_async_shared": play.quiet,
            "warpgroup_mma": play.warpgroup_mma,
            "warpgroup_mma_wait": play.warpgroup_mma_wait,
            "async_load": lambda d, c, b, m: play.async_load(d, c, play.Shared(play.row(b)), m),
            "async_store": play.async_store,
            "_depth": play.quiet,
            **play.SOFTMAX,
            "barrier": play.quiet,
            "hide": hide,
            "float": float,
            "len": len,
            "NOTHING_SEEN": NOTHING_SEEN.value,
            "_ONE": None,
            "_PLACES": 32,
            "_ROWS": 64,
            "_LOG2E": math.log2(math.e),
            "_LN2": math.log(2),
            "_SLACK": SLACK,
            **instead,
        }
        for item in names.values():
            item.__globals__.update(world)
        self.functions = names
        self.function = names[kernel]
        self.launches = 0

    def __getitem__(self, grid):
        def start(*args, num_warps, **constants):
            self.launches += 1
            assert num_warps == 4
            given = [self.argument(value) for value in args]
            for program in range(grid[0]):
                play.GEOMETRY.program, play.GEOMETRY.programs = program, grid[0]
                self.function(*given, **constants)

        return start

    @staticmethod
    def argument(value):
        if isinstance(value, int):
            return torch.tensor(value)
        return play.Pointer(value) if isinstance(value, torch.Tensor) else value
