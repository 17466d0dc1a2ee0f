"""Which pairs of a tile stripes keep, as words of 32 keys, for the accumulator's threads.

Seen from a tile of rows at position ``p0``, band ``m`` is the 128 keys from ``p0 - 128 m`` on. Its
distances ``128 m + row - column`` are the same in every tile, and those of a row are neighbours in
a bitmap that is kept backwards: 128 bits from place ``128 (groups - m) - row`` on. A thread loads
them as four words that begin with its own first column, and tests constant bits of them.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = ["keep", "kept_words"]

_ROWS = gl.constexpr(64)
_BLOCK = gl.constexpr(128)
_BY_LANE = gl.constexpr(
    gl.DistributedLinearLayout(
        [[1, 0], [2, 0]], [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16]], [[0, 0], [0, 0]], [], [4, 32]
    )
)
"""Layout of 4 words by 32 lanes, the same in each warp."""
_TEST = gl.constexpr(
    "{ .reg .pred kept; .reg .b32 bit;\n"
    "and.b32 bit, $2, $3;\n"
    "setp.ne.b32 kept, bit, 0;\n"
    "selp.f32 $0, $1, 0fFF800000, kept; }"
)
"""A score, or -inf: what the compiler makes of a comparison packs the bits once more."""


@gluon.jit
def _by_words(b_s):
    """Split 128 columns into words, eights, threads and the two neighbours that a thread holds."""
    return b_s.reshape([b_s.shape[0], 4, 4, 4, 2])


@gluon.jit
def kept_words(kept, BANDS: gl.constexpr, s_layout: gl.constexpr):
    """Return ``[64 or 1, 4, 4]``, a thread's words: bit ``8 a + e`` is column ``8 a + 2 t + e``.

    ``kept`` is what `_band_words` or else `_column_words` takes.
    """
    layout: gl.constexpr = _by_words(gl.zeros([_ROWS, _BLOCK], gl.float32, s_layout)).type.layout
    words: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(4, layout))
    if BANDS:
        tables, band, p0, groups, half = kept
        b_words = _band_words(tables, band, p0, groups, half, words)
    else:
        places, listed, i, count, p0 = kept
        b_words = _column_words(places, listed, i, count, p0, words)
    return b_words


@gluon.jit
def _band_words(tables, band, p0, groups, half, words: gl.constexpr):
    """Return the words of columns and diagonals in a band, for rows from ``half`` on.

    ``tables`` holds, for a set, 64 bits from each 32nd place of two bitmaps on: columns, where key
    ``n`` is at place ``n + 128``, and distances, where ``d`` is at place ``128 groups - d``.
    """
    columns: gl.constexpr = gl.SliceLayout(0, words)
    o_r = gl.arange(0, _ROWS, gl.SliceLayout(1, gl.SliceLayout(2, words))) + half
    o_w = gl.arange(0, 4, gl.SliceLayout(1, columns))[:, None]
    o_t = 2 * gl.arange(0, 4, gl.SliceLayout(0, columns))[None, :]
    o_c = p0 - band * _BLOCK + o_t
    # keys far before key 0 have no word, and are hidden
    b_columns = gl.load(tables + (gl.maximum((o_c >> 5) + 4, 0) + o_w))
    o_d = o_t[None, :, :] - o_r[:, None, None]
    p_distance = tables + 4 * (groups + 1) + 4 * (groups - band)
    b_words = gl.load(p_distance + ((o_d >> 5) + o_w[None, :, :]))
    b_words = (b_words >> (o_d & 31).to(gl.int64)).to(gl.int32)
    b_columns = (b_columns >> (o_c & 31).to(gl.int64)).to(gl.int32)
    before = gl.minimum(gl.maximum(-(o_c + 32 * o_w), 0), 32)  # keys before key 0
    b_shown = (gl.full([4, 4], -1, gl.int64, columns) << before.to(gl.int64)).to(gl.int32)
    return (b_words | b_columns[None, :, :]) & b_shown[None, :, :]


@gluon.jit
def _column_words(places, listed, i, count, p0, words: gl.constexpr):
    """Return the words of columns ``[128 i, 128 i + 128)`` of ``count`` before the tile.

    A column whose band the tile walks, of which ``listed`` tells, counts there.
    """
    columns: gl.constexpr = gl.SliceLayout(0, words)
    o_l = gl.arange(0, 32, gl.SliceLayout(0, _BY_LANE))[None, :]
    o_n = i * _BLOCK + 32 * gl.arange(0, 4, gl.SliceLayout(1, _BY_LANE))[:, None] + o_l
    b_place = gl.load(places + o_n, mask=o_n < count, other=0)
    b_listed = gl.load(listed + ((p0 + _BLOCK - 1 - b_place) >> 7), mask=o_n < count, other=1)
    b_words = gl.sum(gl.where(b_listed == 0, 1 << o_l, 0), 1)
    b_words = gl.convert_layout(b_words, gl.SliceLayout(1, columns), assert_trivial=True)
    o_t = gl.arange(0, 4, gl.SliceLayout(0, columns))
    return (b_words[:, None] >> (2 * o_t)[None, :])[None, :, :]


@gluon.jit
def keep(b_s, b_words):
    """Set the scores whose bits in `kept_words` are 0 to -inf."""
    b_x = _by_words(b_s)
    layout: gl.constexpr = b_x.type.layout
    by_eight: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, gl.SliceLayout(4, layout)))
    by_pair: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, layout)))
    # constants: a thread's columns, less the part that depends on the thread
    o_a = gl.arange(0, 4, gl.SliceLayout(0, by_eight))[None, None, :, None, None]
    o_e = gl.arange(0, 2, gl.SliceLayout(0, by_pair))[None, None, None, None, :]
    b_x = gl.inline_asm_elementwise(
        _TEST, "=f,f,r,r", [b_x, b_words[:, :, None, :, None], 1 << (8 * o_a + o_e)],
        dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip
    return gl.convert_layout(b_x.reshape(b_s.shape), b_s.type.layout, assert_trivial=True)
