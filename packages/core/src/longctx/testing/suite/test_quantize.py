"""The fp8 quantiser: scales and values of every row, from zeros to the largest numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import longctx
from longctx.reference import dsa as oracle
from longctx.testing.subject import Subject

__all__ = ["TestQuantizeFp8"]

FP8 = torch.float8_e4m3fn
FORMATS = ["fp32", "ue8m0"]
SHAPES = [(128,), (1, 128), (63, 128), (2, 65, 3, 128), (1000, 128), (4099, 128)]


def require(subject: Subject, scale_format: str, channels: int = 128) -> None:
    """Skip the test if the backend does not declare the request."""
    features = ("ue8m0",) if scale_format == "ue8m0" else ()
    subject.require(*features, head_dim=channels, q_heads=1, kv_heads=1)


def quantize_and_check(subject: Subject, x: Tensor, scale_format: str) -> tuple[Tensor, Tensor]:
    """Quantise rows and check every scale and value; return them."""
    values, scale = subject.run(longctx.quantize_fp8, x, scale_format=scale_format)
    assert values.dtype == FP8
    assert scale.dtype == torch.float32
    assert values.shape == x.shape
    assert scale.shape == x.shape[:-1]
    expected, expected_scale = oracle.quantize_fp8(x, scale_format=scale_format)
    if scale_format == "ue8m0":
        # a division by a power of two is exact, whatever divides
        assert torch.equal(scale, expected_scale)
        assert torch.equal(values.float(), expected.float())
        return values, scale
    exact = x.double().abs().amax(-1).clamp(min=1e-4) / 448
    ones = torch.ones_like(exact)
    subject.check((scale / exact).float(), ones, (expected_scale / exact).float(), "scale")
    quotient = (x.double() / scale.double().unsqueeze(-1)).clamp(-448, 448)
    # the quotient is rounded to fp32 before it is rounded to fp8: a near tie may fall either way
    slack = 4 * torch.finfo(torch.float32).eps * quotient.abs()
    distance = (values.double() - quotient).abs()
    assert (distance <= distance_to_fp8(quotient) + slack).all()
    return values, scale


def distance_to_fp8(quotient: Tensor) -> Tensor:
    """Return how far the nearest e4m3 value is, in fp64."""
    codes = torch.arange(127, dtype=torch.uint8, device=quotient.device)
    grid = codes.view(FP8).double()  # 0 to 448, ascending
    above = torch.bucketize(quotient.abs().contiguous(), grid).clamp(max=126)
    near = torch.stack([grid[above], grid[(above - 1).clamp(min=0)]])
    return (near - quotient.abs()).abs().amin(0)


@pytest.mark.longctx_op("quantize_fp8")
class TestQuantizeFp8:
    """One scale a row, values to the nearest."""

    @pytest.mark.parametrize("scale_format", FORMATS)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_rows_of_all_sizes(
        self, subject: Subject, shape: tuple[int, ...], scale_format: str
    ) -> None:
        """Each row has a magnitude of its own, over ten binades."""
        require(subject, scale_format)
        subject.require_length(max(shape))
        magnitude = (2 * subject.randn(*shape[:-1], 1, dtype=torch.float32)).exp()
        x = (subject.randn(*shape, dtype=torch.float32) * magnitude).to(subject.dtype)
        quantize_and_check(subject, x, scale_format)

    @pytest.mark.parametrize("scale_format", FORMATS)
    @pytest.mark.parametrize("channels", [1, 5, 64, 100, 192, 256, 576])
    def test_numbers_of_channels(self, subject: Subject, channels: int, scale_format: str) -> None:
        require(subject, scale_format, channels)
        quantize_and_check(subject, subject.randn(65, channels, scale=20.0), scale_format)

    def test_power_of_two_scales_round_up_and_only_if_they_must(self, subject: Subject) -> None:
        """The largest value is 448 times a power of two, or its neighbour of 8 bits."""
        require(subject, "ue8m0")
        powers = torch.arange(-20, 7) if subject.dtype == torch.float16 else torch.arange(-21, 100)
        exponent = powers.to(subject.device, torch.float64)
        for offset, more in ((-(2.0**-7), 0), (0.0, 0), (2.0**-7, 1)):
            largest = torch.ldexp(torch.full_like(exponent, 1.75 + offset), exponent + 8)
            x = largest.unsqueeze(1) * torch.linspace(-1, 0.9, 128, device=subject.device)
            _, scale = quantize_and_check(subject, x.to(subject.dtype), "ue8m0")
            assert torch.equal(scale.double(), torch.exp2(exponent + more)), offset

    def test_values_by_hand(self, subject: Subject) -> None:
        """Ties go to the even value; what is below half the least subnormal becomes 0."""
        require(subject, "ue8m0")
        exact = {
            448.0: 448.0, 17.0: 16.0, 19.0: 20.0, 18.0: 18.0, -17.0: -16.0, 240.0: 240.0,
            432.0: 448.0, 2.0**-9: 2.0**-9, 2.0**-10: 0.0,
            1.5 * 2.0**-9: 2.0**-8, -448.0: -448.0, 0.0: 0.0,
        }  # fmt: skip
        row = torch.zeros(1, 128)
        row[0, : len(exact)] = torch.tensor(list(exact))
        values, scale = quantize_and_check(subject, row.to(subject.device, subject.dtype), "ue8m0")
        assert scale.tolist() == [1.0]
        assert values.float()[0, : len(exact)].tolist() == list(exact.values())

    @pytest.mark.parametrize("scale_format", FORMATS)
    def test_zero_and_tiny_rows(self, subject: Subject, scale_format: str) -> None:
        """The largest value counts as 1e-4 at least: no row is divided by 0."""
        require(subject, scale_format)
        x = subject.randn(7, 128)
        x[0] = 0
        x[2] = 0
        x[4] = x[4] * 1e-6
        x[6, :-1] = 0
        values, scale = quantize_and_check(subject, x, scale_format)
        assert (values[[0, 2]].float() == 0).all()
        least = 2.0**-22 if scale_format == "ue8m0" else 1e-4 / 448
        assert scale[[0, 2, 4]].tolist() == pytest.approx([least] * 3, rel=1e-6)

    @pytest.mark.parametrize("scale_format", FORMATS)
    def test_huge_rows(self, subject: Subject, scale_format: str) -> None:
        require(subject, scale_format)
        largest = torch.finfo(subject.dtype).max
        x = (subject.randint(-64, 65, (65, 128), torch.float64) / 64 * largest).to(subject.dtype)
        x[:, 5] = -largest
        values, scale = quantize_and_check(subject, x, scale_format)
        assert scale.isfinite().all()
        assert values.float().isfinite().all()

    @pytest.mark.parametrize("scale_format", FORMATS)
    def test_views(self, subject: Subject, scale_format: str) -> None:
        """Head-major memory, every other row, rows in wider ones that hold NaN beside them."""
        require(subject, scale_format)
        quantize_and_check(subject, subject.randn(2, 5, 63, 128).transpose(1, 2), scale_format)
        quantize_and_check(subject, subject.randn(129, 128)[::2], scale_format)
        wide = subject.randn(65, 144)
        wide[:, 136:] = torch.nan
        wide[:, :8] = torch.nan
        quantize_and_check(subject, wide[:, 8:136], scale_format)

    @pytest.mark.parametrize("scale_format", FORMATS)
    def test_no_rows(self, subject: Subject, scale_format: str) -> None:
        require(subject, scale_format)
        values, scale = subject.run(
            longctx.quantize_fp8, subject.randn(2, 0, 128), scale_format=scale_format
        )
        assert values.shape == (2, 0, 128)
        assert scale.shape == (2, 0)

    def test_more_than_two_to_the_31_values(self, subject: Subject) -> None:
        subject.require_cuda()
        require(subject, "fp32")
        rows = 2**24 + 65
        wanted = 20 * rows * 128  # widened copies of all values, in a backend without a kernel
        if torch.cuda.mem_get_info()[0] < wanted:
            pytest.skip(f"needs {wanted >> 30} GiB of free GPU memory")
        x = subject.randn(4097, 128).repeat(rows // 4097 + 1, 1)[:rows]
        values, scale = subject.run(longctx.quantize_fp8, x)
        for part in (slice(0, 65), slice(2**23, 2**23 + 65), slice(rows - 65, rows)):
            alone, alone_scale = quantize_and_check(subject, x[part], "fp32")
            assert torch.equal(values[part].view(torch.uint8), alone.view(torch.uint8))
            assert torch.equal(scale[part], alone_scale)

    def test_bad_input(self, subject: Subject) -> None:
        require(subject, "fp32")
        x = subject.randn(4, 128)
        with pytest.raises(ValueError, match="no fp8 scale format is called 'ue8m1': did you"):
            subject.run(longctx.quantize_fp8, x, scale_format="ue8m1")
        with pytest.raises(ValueError, match="unit stride in its last axis"):
            subject.run(longctx.quantize_fp8, x.t())
        with pytest.raises(ValueError, match="at least one channel"):
            subject.run(longctx.quantize_fp8, x[:, :0])
        with pytest.raises(TypeError, match="x must be float32 or bfloat16"):
            subject.run(longctx.quantize_fp8, x.to(FP8))

    def test_a_gradient_is_refused(self, subject: Subject) -> None:
        require(subject, "fp32")
        with pytest.raises(longctx.UnsupportedError, match="no backward pass"):
            subject.run(longctx.quantize_fp8, subject.randn(4, 128).requires_grad_())
