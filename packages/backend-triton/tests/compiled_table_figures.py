"""What the kernels are known to fall short of, by kernel, case and architecture.

Figures of Triton 3.6, whose registers the tiles were chosen by, and of 3.9; none where none is.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["SERIALIZED", "SPILLS"]

SPILLS: Mapping[str, Mapping[str, Mapping[str, tuple[int, int]]]] = {
    "block_attention_kernel": {
        "block sparse 128 of 64 on sm_80": {"3.9": (16, 16)},
    },
    "decode_kernel": {
        "decode 128 fp8 on sm_90a": {"3.9": (56, 32)},
        "decode 128 tokens on sm_80": {"3.9": (80, 40)},
        "decode 64 fp8 on sm_90a": {"3.9": (8, 8)},
    },
    # numbers of a block, most of them addresses
    "flash_backward_hopper_kernel": {
        "flash backward hopper 128 causal on sm_90a": {"3.6": (208, 64), "3.9": (48, 16)},
        "flash backward hopper 128 full on sm_90a": {"3.6": (224, 56), "3.9": (56, 16)},
    },
    "flash_dkdv_kernel": {
        "flash backward 128 all on sm_80": {"3.6": (16, 16), "3.9": (16, 16)},
        "flash backward 128 all on sm_90a": {"3.9": (56, 32)},
        "flash backward 128 causal on sm_80": {"3.6": (16, 16), "3.9": (16, 16)},
        "flash backward 128 packed on sm_80": {"3.6": (16, 16), "3.9": (16, 16)},
        "flash backward 128 packed on sm_90a": {"3.9": (72, 40)},
        "flash backward 256 on sm_80": {"3.6": (24, 16), "3.9": (40, 24)},
        "flash backward 256 on sm_90a": {"3.9": (544, 264)},
        "flash backward 64 all on sm_90a": {"3.6": (16, 16), "3.9": (144, 72)},
        "flash backward 64 full on sm_90a": {"3.9": (16, 16)},
        "flash backward 64 packed on sm_90a": {"3.9": (56, 32)},
    },
    "flash_dq_kernel": {
        "flash backward 128 all on sm_90a": {"3.6": (32, 24), "3.9": (32, 24)},
        "flash backward 256 on sm_90a": {"3.6": (40, 24), "3.9": (56, 24)},
    },
    "flash_forward_kernel": {
        "flash 128 causal on sm_80": {"3.6": (80, 24), "3.9": (112, 40)},
        "flash 128 full on sm_80": {"3.9": (48, 16)},
        "flash 128 packed on sm_80": {"3.6": (80, 24), "3.9": (80, 24)},
        "flash 128 packed on sm_90a": {"3.6": (48, 32), "3.9": (176, 64)},
        "flash 128 sinks on sm_80": {"3.6": (80, 24), "3.9": (112, 40)},
        "flash 128 window on sm_80": {"3.9": (120, 32)},
        "flash 256 on sm_90a": {"3.6": (184, 88), "3.9": (248, 88)},
    },
    # numbers of a tile, set aside before its loop over keys and fetched after it
    "flash_hopper_kernel": {
        "flash 128 causal on sm_90a": {"3.6": (56, 16), "3.9": (224, 56)},
        "flash 128 fp8 on sm_90a": {"3.6": (56, 16), "3.9": (184, 48)},
        "flash 128 full on sm_90a": {"3.6": (24, 8), "3.9": (64, 16)},
        "flash 128 ping-pong on sm_90a": {"3.6": (48, 16), "3.9": (256, 64)},
        "flash 128 sinks on sm_90a": {"3.6": (56, 16), "3.9": (232, 56)},
    },
    "key_walk_hopper_kernel": {
        "block sparse 128 on sm_90a": {"3.6": (108, 40), "3.9": (192, 48)},
        "flash 128 window on sm_90a": {"3.6": (100, 32), "3.9": (252, 64)},
        "star context 128 on sm_90a": {"3.6": (80, 32), "3.9": (244, 56)},
        "window sparse 128 by head on sm_90a": {"3.6": (104, 32), "3.9": (252, 64)},
        "window sparse 128 on sm_90a": {"3.6": (100, 32), "3.9": (252, 64)},
    },
    "latent_hopper_kernel": {
        "topk attention latent hopper on sm_90a": {"3.6": (32, 24), "3.9": (400, 128)},
        "topk attention latent hopper decode on sm_90a": {"3.6": (24, 16)},
    },
    "lightning_scan_kernel": {
        "lightning 128 cut on sm_80": {"3.6": (184, 96), "3.9": (184, 96)},
        "lightning 128 cut on sm_90a": {"3.6": (200, 104), "3.9": (200, 104)},
        "lightning 128 packed on sm_80": {"3.6": (184, 96), "3.9": (184, 96)},
        "lightning 128 packed on sm_90a": {"3.6": (208, 104), "3.9": (208, 104)},
        "lightning 128 whole on sm_80": {"3.6": (120, 64), "3.9": (120, 64)},
        "lightning 128 whole on sm_90a": {"3.6": (328, 160), "3.9": (376, 192)},
        "lightning backward 128 on sm_80": {"3.6": (256, 136), "3.9": (256, 136)},
        "lightning backward 128 on sm_90a": {"3.6": (200, 104), "3.9": (232, 128)},
    },
    "list_attention_kernel": {
        "topk attention latent on sm_90a": {"3.6": (80, 40), "3.9": (516, 248)},
        "topk attention latent decode on sm_80": {"3.6": (48, 24), "3.9": (40, 16)},
        "topk attention latent decode on sm_90a": {"3.6": (164, 72), "3.9": (524, 256)},
        "topk attention wide on sm_80": {"3.6": (248, 96), "3.9": (272, 96)},
        "topk attention wide on sm_90a": {"3.6": (168, 64), "3.9": (272, 120)},
    },
    "range_attention_kernel": {
        "star context 128 of 1000 on sm_90a": {"3.6": (16, 16), "3.9": (136, 64)},
    },
    "row_threshold_kernel": {
        "index topk large on sm_90a": {"3.9": (0, 16)},
    },
    "score_backward_keys_kernel": {
        "index backward on sm_90a": {"3.9": (96, 40)},
    },
    "star_query_kernel": {
        "star query 128 chained on sm_80": {"3.9": (16, 16)},
        "star query 128 chained on sm_90a": {"3.9": (56, 32)},
    },
    "stripe_attention_kernel": {
        "stripe sparse 128 on sm_80": {"3.6": (176, 72), "3.9": (176, 72)},
    },
    "stripe_walk_hopper_kernel": {
        "stripe sparse 128 on sm_90a": {"3.6": (728, 168), "3.9": (1208, 240)},
        "stripe sparse 64 on sm_90a": {"3.6": (96, 32), "3.9": (376, 88)},
    },
    "token_attention_hopper_kernel": {
        # of the warps that copy, and around the loop of those that multiply
        "token sparse 128 on sm_90a": {"3.6": (168, 48), "3.9": (224, 80)},
        "token sparse 64 on sm_90a": {"3.6": (20, 8), "3.9": (104, 40)},
    },
    "token_set_attention_kernel": {
        "token sparse 128 on sm_80": {"3.6": (72, 40), "3.9": (64, 40)},
        "token sparse 128 portable on sm_90a": {"3.9": (32, 24)},
    },
    "topk_rows_kernel": {
        "index topk on sm_80": {"3.6": (344, 160)},
        "index topk on sm_90a": {"3.6": (352, 160), "3.9": (400, 152)},
        "index topk rows on sm_80": {"3.6": (48, 32)},
        "index topk rows on sm_90a": {"3.6": (64, 40), "3.9": (64, 24)},
    },
}
"""Most bytes of spills, stores and loads together, and of stack: what was measured and a little.

The top-k of rows trades spills for a second program a multiprocessor (its ``maxnreg``).
"""

SERIALIZED: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    "flash_dq_kernel": {
        "flash backward 64 all on sm_90a": {"3.6": "C7515", "3.9": "C7515"},
    },
    "flash_forward_kernel": {
        "flash 128 all on sm_90a": {"3.6": "C7515", "3.9": "C7515"},
        "flash 64 all on sm_90a": {"3.6": "C7515", "3.9": "C7515"},
    },
    "star_query_kernel": {
        "star query 128 chained on sm_90a": {"3.6": "C7515"},
    },
    "stripe_attention_kernel": {
        "stripe sparse 96 on sm_90a": {"3.9": "C7515"},
    },
    # tuned: serialised, and 1.6 times as fast as the code's own tiles
    "token_set_attention_kernel": {
        "token sparse 64 portable on sm_90a": {"3.6": "C7515"},
    },
}
"""The assembler's warning that the products of a warpgroup do not overlap.

C7511: too few registers; C7513, C7515: other instructions write their inputs or accumulators.
"""
