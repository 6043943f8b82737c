"""Golden vectors and error levels of the codecs.

KIVI: scales, minima, codes and mean errors of the pure-torch quantizers of jy-yuan/KIVI (quant/new_pack.py), whose
words hold 32 / bits codes of the grouped axis, the first in the lowest bits. Fixture: x = ((31i^2 + 7919i + 104729s)
mod 2003) / 1001.5 - 1 over i = 0, 1, ...
"""

from __future__ import annotations

import math

import pytest
import torch

from kvplan.methods.codecs import codecs
from kvplan.methods.codecs.grouped import PerChannel, PerToken, quantize
from kvplan.methods.codecs.packing import unpack
from kvplan.methods.codecs.turboquant import LEVELS, integer_rotation, rotation


def det(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    i = torch.arange(math.prod(shape))
    u = (31 * i * i + 7919 * i + 104729 * seed) % 2003
    return (u.double() / 1001.5 - 1).float().reshape(shape)


def codes_of(words: list[int], bits: int) -> list[list[int]]:
    """What a list of 32-bit words holds, a list per word."""
    return [[word >> bits * j & 2**bits - 1 for j in range(32 // bits)] for word in words]


def test_the_fixture_is_the_published_one() -> None:
    expected = torch.tensor([-0.427858, -0.489765, -0.489765, -0.427858, -0.304044, -0.118323])
    torch.testing.assert_close(det((6,), 1), expected, rtol=0, atol=2e-6)


KEYS_2 = det((1, 1, 16, 2), 1)  # groups of 8 tokens
KEYS_4 = det((1, 1, 8, 2), 1)
VALUES_2 = det((1, 1, 2, 16), 2)  # groups of 8 channels


class TestKIVI:
    def test_keys_of_2_bits(self) -> None:
        codes, scales, minima = quantize(KEYS_2.view(2, 8, 2), 2, dim=-2, scale_dtype=torch.float32)
        expected = [0.468298, 0.431686, 0.490597, 0.569812]  # by group, then channel
        torch.testing.assert_close(scales.flatten(), torch.tensor(expected), rtol=0, atol=2e-6)
        expected = [-0.489765, -0.856216, -0.827259, -0.727409]
        torch.testing.assert_close(minima.flatten(), torch.tensor(expected), rtol=0, atol=2e-6)
        # The authors keep a word per channel and 16 tokens: two groups of 8
        by_channel = codes.permute(2, 0, 1).reshape(2, 16)
        assert by_channel.tolist() == codes_of([-924142784, -1236329243], 2)

    def test_keys_of_4_bits(self) -> None:
        codes, scales, _ = quantize(KEYS_4.view(1, 8, 2), 4, dim=-2, scale_dtype=torch.float32)
        torch.testing.assert_close(scales.flatten(), torch.tensor([0.093660, 0.086337]), rtol=0, atol=2e-6)
        assert codes[0].T.tolist() == codes_of([-1624346111, 97646932], 4)

    def test_values_of_2_bits(self) -> None:
        codes, scales, minima = quantize(VALUES_2.view(2, 2, 8), 2, scale_dtype=torch.float32)
        expected = [0.563488, 0.509569, 0.528541, 0.547512]  # by token, then group
        torch.testing.assert_close(scales.flatten(), torch.tensor(expected), rtol=0, atol=2e-6)
        expected = [-0.989016, -0.617574, -0.917124, -0.988018]
        torch.testing.assert_close(minima.flatten(), torch.tensor(expected), rtol=0, atol=2e-6)
        assert codes.view(2, 16).tolist() == codes_of([2028224170, 95520631], 2)

    def test_what_is_stored_are_those_codes_by_planes(self) -> None:
        stored = PerChannel(bits=2, group_slots=8).encode(KEYS_2)
        by_channel = unpack(stored["codes"].view(2, 2, 2), 2, dim=-2).permute(2, 0, 1).reshape(2, 16)
        assert by_channel.tolist() == codes_of([-924142784, -1236329243], 2)
        stored = PerToken(bits=2, group_channels=8).encode(VALUES_2)
        assert unpack(stored["codes"], 2)[0, 0].tolist() == codes_of([2028224170, 95520631], 2)

    def test_mean_errors(self) -> None:
        keys, values = PerChannel(bits=2, group_slots=8), PerToken(bits=2, group_channels=8)
        error = (keys.decode(keys.encode(KEYS_2), 2, torch.float32) - KEYS_2).abs().mean()
        assert error == pytest.approx(0.080140, abs=1e-4)  # float16 scales
        error = (values.decode(values.encode(VALUES_2), 16, torch.float32) - VALUES_2).abs().mean()
        assert error == pytest.approx(0.096324, abs=1e-4)

    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_errors_are_at_most_half_a_step_and_extremes_are_exact(self, bits: int) -> None:
        x = torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
        codes, scales, minima = quantize(x, bits, scale_dtype=torch.float32)
        back = codes * scales + minima
        assert ((back - x).abs() <= scales / 2 + 1e-6).all()
        torch.testing.assert_close(back.amin(-1), x.amin(-1), rtol=0, atol=1e-6)
        torch.testing.assert_close(back.amax(-1), x.amax(-1), rtol=0, atol=1e-6)

    def test_a_minimum_that_float16_rounds_leaves_the_maximum_in_reach(self) -> None:
        x = 2049 + torch.linspace(0, 3, 32)  # between 2048 and 4096 float16 holds even numbers only
        codes, scale, minimum = quantize(x, 8)
        assert minimum == 2048
        assert ((codes * scale.float() + minimum.float()) - x).abs().max() < 0.01

    def test_keys_with_outlier_channels_want_groups_along_tokens(self) -> None:
        x = torch.randn(1, 2, 256, 64, generator=torch.Generator().manual_seed(0))
        x[..., [3, 40]] *= 30
        kivi = codecs["kivi"](group=64)
        along_tokens, along_channels = (
            (codec.decode(codec.encode(x), 64, torch.float32) - x).abs().mean()
            for codec in (kivi.for_keys(), kivi.for_values())
        )
        assert along_channels > 4 * along_tokens


def relative_error(codec_name: str, role: str = "for_values", **parameters: object) -> float:
    """Root mean square error on Gaussian vectors of 64 channels, as a part of what is stored."""
    codec = getattr(codecs[codec_name](**parameters), role)()
    x = torch.randn(1, 4, 4096, 64, generator=torch.Generator().manual_seed(0))
    return float((codec.decode(codec.encode(x), 64, torch.float32) - x).norm() / x.norm())


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"codec_name": "fp8", "kind": "e4m3"}, 0.025),
        ({"codec_name": "fp8", "kind": "e5m2"}, 0.050),
        ({"codec_name": "int8", "group_channels": 64}, 0.0054),
        ({"codec_name": "int8"}, 0.0054),
        ({"codec_name": "kivi", "bits": 4, "group": 64}, 0.090),
        ({"codec_name": "kivi", "bits": 4, "group": 64, "role": "for_keys"}, 0.090),
        ({"codec_name": "kivi", "bits": 2, "group": 64}, 0.45),
        ({"codec_name": "kivi", "bits": 2, "group": 64, "role": "for_keys"}, 0.45),
    ],
)
def test_errors_on_gaussian_data(parameters: dict[str, str], expected: float) -> None:
    assert relative_error(**parameters) == pytest.approx(expected, rel=0.03)


class TestTurboQuant:
    @pytest.mark.parametrize(("dim", "expected"), [(64, (0.1146, 0.0335, 0.0092)), (128, (0.1162, 0.0340, 0.0093))])
    def test_mean_squared_errors(self, dim: int, expected: tuple[float, ...]) -> None:
        x = torch.randn(40_000, dim, generator=torch.Generator().manual_seed(0))
        for bits, mse in zip((2, 3, 4), expected, strict=True):
            codec = codecs["turboquant"](bits=bits)
            error = codec.decode(codec.encode(x), dim, torch.float32) - x
            assert error.square().sum() / x.square().sum() == pytest.approx(mse, rel=0.01)

    @pytest.mark.parametrize(("bits", "mse"), [(2, 0.117482), (3, 0.034548), (4, 0.009501)])
    def test_levels_are_the_best_for_a_gaussian(self, bits: int, mse: float) -> None:
        """Each level is the mean of the normal variable between the midpoints around it."""
        levels = torch.tensor(LEVELS[bits], dtype=torch.float64)
        middle = (levels[1:] + levels[:-1]) / 2
        low, high = torch.cat([torch.zeros(1), middle]), torch.cat([middle, torch.full((1,), math.inf)])
        density = torch.exp(-(low**2) / 2) - torch.exp(-(high**2) / 2)
        mass = (torch.erf(high / math.sqrt(2)) - torch.erf(low / math.sqrt(2))) * math.sqrt(math.pi / 2)
        torch.testing.assert_close(density / mass, levels, rtol=0, atol=1e-5)
        assert 1 - (mass * levels**2).sum() * math.sqrt(2 / math.pi) == pytest.approx(mse, abs=1e-5)

    @pytest.mark.parametrize("dim", [2, 8, 64, 80, 96, 128, 7])
    def test_the_rotation_is_one(self, dim: int) -> None:
        matrix = rotation(dim, torch.float64, torch.device("cpu"))
        atol = 1e-12 if dim & (dim - 1) == 0 else 1e-6  # entries of other lengths are rounded
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(dim, dtype=torch.float64), rtol=0, atol=atol)
        whole = integer_rotation(dim, torch.device("cpu"))
        assert torch.equal(whole, whole.round())

    def test_the_rotation_is_the_same_on_every_machine(self) -> None:
        # The first coordinate adds all channels with their signs
        signs = (rotation(8, torch.float32, torch.device("cpu"))[0] > 0).tolist()
        assert signs == [True, False, False, True, False, False, False, True]

    def test_outlier_channels_do_not_matter(self) -> None:
        x = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
        x[:, [3, 40]] *= 30
        codec = codecs["turboquant"](bits=4)
        error = (codec.decode(codec.encode(x), 64, torch.float32) - x).norm() / x.norm()
        assert error < 0.11


class TestFP8:
    @pytest.mark.parametrize(("kind", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
    def test_every_code_decodes_as_torch_says(self, kind: str, dtype: torch.dtype) -> None:
        every = torch.arange(256, dtype=torch.uint8)[None]
        codes = {"codes": every, "scales": torch.ones(1, 1, dtype=torch.float16)}
        expected = every.view(dtype).float() / (1 if kind == "e4m3" else 128)
        finite = expected.isfinite()
        assert torch.equal(codecs["fp8"](kind=kind).decode(codes, 256, torch.float32)[finite], expected[finite])

    @pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
    def test_powers_of_two_scale_exactly(self, kind: str) -> None:
        codec = codecs["fp8"](kind=kind)
        x = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
        quiet, loud = codec.encode(x), codec.encode(64 * x)
        assert torch.equal(quiet["codes"], loud["codes"])
        assert torch.equal(64 * quiet["scales"], loud["scales"])

    @pytest.mark.parametrize(("kind", "bound"), [("e4m3", 2**-4), ("e5m2", 2**-3)])
    def test_normal_numbers_are_close(self, kind: str, bound: float) -> None:
        codec = codecs["fp8"](kind=kind)
        x = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
        back = codec.decode(codec.encode(x), 64, torch.float32)
        normal = x.abs() > x.abs().amax(-1, keepdim=True) * 2**-14
        assert ((back - x).abs() <= bound * 1.001 * x.abs())[normal].all()

    @pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
    def test_a_louder_token_is_finite_and_as_exact(self, kind: str) -> None:
        codec = codecs["fp8"](kind=kind)
        x = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
        x[50:] *= 10
        x[99, 0] = 1e6
        back = codec.decode(codec.encode(x), 64, torch.float32)
        assert back.isfinite().all()
        assert ((back - x).norm(dim=-1) < 0.1 * x.norm(dim=-1)).all()
