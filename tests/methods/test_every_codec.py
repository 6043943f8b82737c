"""What holds for every registered codec, in both roles, under every setting that a search may try."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from kvplan.errors import MethodError
from kvplan.methods.codecs import Codec, Codes, codecs, packing
from kvplan.methods.params import Choice, search_ranges, settings

D, N = 64, 256


def variants() -> list[Codec]:
    """Every codec with every combination of its choices that makes sense."""
    found = []
    for name in codecs.names():
        ranges = search_ranges(codecs[name])
        choices = [allowed.values if isinstance(allowed, Choice) else () for allowed in ranges.values()]
        for values in itertools.product(*choices):
            try:
                found.append(codecs[name](**dict(zip(ranges, values, strict=True))))
            except MethodError:
                continue
    return found


def label(codec: Codec) -> str:
    return "-".join([codec.name, *(f"{k}={v}" for k, v in settings(codec).items())])


ROLES = [
    pytest.param(getattr(codec, role)(), id=f"{label(codec)}-{role}")
    for codec in variants()
    for role in ("for_keys", "for_values")
]
every_role = pytest.mark.parametrize("codec", ROLES)
KIVI_BITS_GROUPS = [(bits, group) for bits in (2, 4) for group in (32, 64, 128)]


def vectors(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def equal(a: Codes, b: Codes) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def picked(codes: Codes, index: Any) -> Codes:
    return {name: field[index] for name, field in codes.items()}


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@every_role
class TestEveryCodec:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    def test_what_was_stored_comes_back_close(self, codec: Codec, dtype: torch.dtype) -> None:
        x = vectors(2, 3, N, D, dtype=dtype)
        back = codec.decode(codec.encode(x), D, dtype)
        assert back.shape == x.shape
        assert back.dtype == dtype
        assert back.isfinite().all()
        error = (back - x).double().square().mean().sqrt()
        assert error < 0.6  # 2 bits of Gaussian data; test_codec_goldens.py knows better

    def test_encoding_is_deterministic_and_leaves_its_input_alone(self, codec: Codec) -> None:
        x = vectors(2, 3, N, D)
        before = x.clone()
        first = codec.encode(x)
        assert equal(first, codec.encode(x))
        assert torch.equal(x, before)

    @pytest.mark.parametrize("dim", [32, 64, 96, 128, 256])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_declared_bytes_are_stored_bytes(self, codec: Codec, dim: int, dtype: torch.dtype) -> None:
        try:
            fields = codec.fields(dim, dtype)
        except MethodError:
            return  # test_refusals
        stored = codec.encode(vectors(1, 2, N, dim, dtype=dtype))
        assert stored.keys() == fields.keys()
        for name, field in fields.items():
            assert stored[name].shape == (1, 2, N // codec.group_tokens, field.width)
            assert stored[name].dtype == field.dtype
        held = sum(t.numel() * t.element_size() for t in stored.values())
        assert held == 2 * N // codec.group_tokens * codec.unit_bytes(dim, dtype)

    def test_rows_do_not_touch_each_other(self, codec: Codec) -> None:
        x = vectors(2, 3, N, D)
        both = codec.encode(x)
        for row in range(2):
            assert equal(picked(both, slice(row, row + 1)), codec.encode(x[row : row + 1]))

    def test_units_do_not_touch_each_other(self, codec: Codec) -> None:
        x = vectors(1, 2, N, D)
        whole, step = codec.encode(x), codec.group_tokens
        for unit in range(0, N // step, 3):
            alone = codec.encode(x[:, :, unit * step : (unit + 1) * step])
            assert equal(picked(whole, (..., slice(unit, unit + 1), slice(None))), alone)

    def test_evicting_slots_or_whole_units_commutes_with_encoding(self, codec: Codec) -> None:
        x, step = vectors(1, 2, N, D), codec.group_tokens
        kept = torch.arange(N // step) % 3 != 1
        slots = kept.repeat_interleave(step)
        assert equal(picked(codec.encode(x), (..., kept, slice(None))), codec.encode(x[:, :, slots]))

    def test_constant_tensors_come_back(self, codec: Codec) -> None:
        for value in (0.0, 1.0, -2.5, 0.75):
            x = torch.full((1, 2, N, D), value)
            back = codec.decode(codec.encode(x), D, torch.float32)
            if value == 0 or codec.name in ("dense", "per-token", "per-channel", "int8"):
                assert torch.equal(back, x)
            elif codec.name == "fp8":  # off by the rounding of the scale to float16
                torch.testing.assert_close(back, x, rtol=2**-11, atol=0)
            else:
                assert back.isfinite().all()

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
    @pytest.mark.parametrize("queries", [1, 2, 40])
    def test_dot_and_mix_are_products_with_what_is_stored(
        self, codec: Codec, dtype: torch.dtype, tolerance: float, queries: int
    ) -> None:
        codes = codec.encode(vectors(2, 3, N, D, dtype=dtype))
        back = codec.decode(codes, D, dtype)
        q, probs = vectors(2, 3, queries, D, seed=1, dtype=dtype), vectors(2, 3, queries, N, seed=2, dtype=dtype)
        probs = probs.softmax(-1)
        products, sums = codec.dot(q, codes), codec.mix(probs, codes, D)
        assert products.shape == (2, 3, queries, N)
        assert sums.shape == (2, 3, queries, D)
        assert products.dtype == sums.dtype == dtype
        assert relative(products, q @ back.mT) < tolerance
        assert (sums - probs @ back).abs().max() < tolerance * back.abs().max()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_rounded_only_at_the_end(self, codec: Codec, dtype: torch.dtype) -> None:
        if codec.name == "dense":
            pytest.skip("dense leaves the arithmetic to the model's dtype")
        codes = codec.encode(vectors(1, 2, N, D, dtype=dtype))
        q, probs = vectors(1, 2, 4, D, seed=1, dtype=dtype), vectors(1, 2, 4, N, seed=2).softmax(-1).to(dtype)
        exact, back = q.float(), codec.decode(codes, D, torch.float32)
        assert relative(codec.dot(q, codes).float(), exact @ back.mT) < torch.finfo(dtype).eps
        sums = probs.float() @ back
        assert relative(codec.mix(probs, codes, D).float(), sums) < torch.finfo(dtype).eps

    def test_blocks_change_nothing(self, codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
        codes = codec.encode(vectors(2, 3, N, D))
        q, probs = vectors(2, 3, 2, D, seed=1), vectors(2, 3, 2, N, seed=2).softmax(-1)
        products, sums = codec.dot(q, codes), codec.mix(probs, codes, D)
        monkeypatch.setattr(packing, "BLOCK_ELEMENTS", 5 * 6 * D)
        assert relative(codec.dot(q, codes), products) < 1e-5
        assert (codec.mix(probs, codes, D) - sums).abs().max() < 1e-5

    def test_views_into_flat_buffers_and_other_batch_dimensions(self, codec: Codec) -> None:
        x = vectors(2, 3, N, D)
        codes = codec.encode(x)
        room = N // codec.group_tokens + 5
        wide = {name: torch.full((2, 3, room, f.shape[-1]), 7, dtype=f.dtype) for name, f in codes.items()}
        views = {name: field[:, :, 2 : 2 + codes[name].shape[2]] for name, field in wide.items()}
        for name, view in views.items():
            view.copy_(codes[name])
            assert not view.is_contiguous()
        q, probs = vectors(2, 3, 2, D, seed=1), vectors(2, 3, 2, N, seed=2).softmax(-1)
        assert torch.equal(codec.decode(views, D, x.dtype), codec.decode(codes, D, x.dtype))
        assert relative(codec.dot(q, views), codec.dot(q, codes)) < 1e-6
        assert (codec.mix(probs, views, D) - codec.mix(probs, codes, D)).abs().max() < 1e-5
        assert equal(codec.encode(x[0, 0]), picked(codes, (0, 0)))
        assert equal(codec.encode(x[None]), picked(codes, None))
        transposed = x.transpose(1, 2).contiguous().transpose(1, 2)
        assert equal(codec.encode(transposed), codes)
        assert codec.dot(q[0, 0], picked(codes, (0, 0))).shape == (2, N)

    def test_no_slots_are_no_special_case(self, codec: Codec) -> None:
        codes = codec.encode(torch.zeros(2, 3, 0, D))
        assert all(field.shape[:3] == (2, 3, 0) for field in codes.values())
        assert codec.decode(codes, D, torch.float32).shape == (2, 3, 0, D)
        assert codec.dot(vectors(2, 3, 2, D), codes).shape == (2, 3, 2, 0)
        assert torch.equal(codec.mix(torch.zeros(2, 3, 2, 0), codes, D), torch.zeros(2, 3, 2, D))

    @pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e4])
    def test_loud_and_quiet_vectors_stay_finite(self, codec: Codec, scale: float) -> None:
        x = vectors(1, 2, N, D) * scale
        back = codec.decode(codec.encode(x), D, torch.float32)
        assert back.isfinite().all()
        assert (back - x).square().mean().sqrt() < 0.6 * scale

    def test_empty_slots_decode_to_finite_numbers(self, codec: Codec) -> None:
        fields = codec.fields(D, torch.float32)
        empty = {name: torch.zeros(1, 2, 4, f.width, dtype=f.dtype) for name, f in fields.items()}
        assert codec.decode(empty, D, torch.float32).isfinite().all()


@pytest.mark.parametrize("codec", variants(), ids=label)
def test_parameters_survive_settings(codec: Codec) -> None:
    assert type(codec)(**settings(codec)) == codec


@pytest.mark.parametrize("name", codecs.names())
def test_defaults_lie_in_their_search_ranges(name: str) -> None:
    codec = codecs[name]()
    assert settings(codec) == {}
    for field, allowed in search_ranges(type(codec)).items():
        assert isinstance(allowed, Choice)
        assert getattr(codec, field) in allowed.values
    assert dataclasses.is_dataclass(codec)


@pytest.mark.parametrize("name", [n for n in codecs.names() if n != "kivi"])
def test_slots_stand_alone(name: str) -> None:
    assert codecs[name]().group_tokens == 1
    assert codecs[name]().residual_tokens == 0


def test_what_a_slot_costs() -> None:
    def slot_bytes(codec: Codec, dim: int) -> float:
        return codec.unit_bytes(dim, torch.bfloat16) / codec.group_tokens

    for dim in (64, 128):
        assert slot_bytes(codecs["dense"](), dim) == 2 * dim
        assert slot_bytes(codecs["int8"](), dim) == dim + 4
        assert slot_bytes(codecs["int8"](group_channels=32), dim) == dim + 4 * dim / 32
        assert slot_bytes(codecs["fp8"](), dim) == dim + 2
        for bits in (2, 3, 4):
            assert slot_bytes(codecs["turboquant"](bits=bits), dim) == dim * bits / 8 + 2
    for bits, group in KIVI_BITS_GROUPS:
        kivi = codecs["kivi"](bits=bits, group=group, residual_tokens=128)
        assert slot_bytes(kivi.for_keys(), 128) == 128 * (bits / 8 + 4 / group)
        assert slot_bytes(kivi.for_values(), 128) == 128 * (bits / 8 + 4 / group)


@pytest.mark.parametrize(("bits", "group"), KIVI_BITS_GROUPS)
def test_kivi_encodes_what_it_decoded_to_the_same_codes(bits: int, group: int) -> None:
    kivi = codecs["kivi"](bits=bits, group=group, residual_tokens=128)
    for codec in (kivi.for_keys(), kivi.for_values()):
        codes = codec.encode(vectors(2, 3, N, D))
        again = codec.encode(codec.decode(codes, D, torch.float32))
        assert torch.equal(again["codes"], codes["codes"])
        assert torch.equal(again["minima"], codes["minima"])


def test_kivi_has_no_role_of_its_own() -> None:
    kivi = codecs["kivi"]()
    assert (kivi.for_keys().group_tokens, kivi.for_keys().residual_tokens) == (32, 128)
    assert (kivi.for_values().group_tokens, kivi.for_values().residual_tokens) == (1, 128)
    with pytest.raises(NotImplementedError, match="for_keys"):
        kivi.encode(vectors(1, 1, N, D))
    with pytest.raises(NotImplementedError, match="for_keys"):
        kivi.fields(D, torch.float32)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dim", [8, 24, 64, 80, 96, 120, 128])
def test_turboquant_rotates_vectors_of_any_even_length(bits: int, dim: int) -> None:
    codec = codecs["turboquant"](bits=bits)
    x = vectors(4, 16, dim)
    codes = codec.encode(x)
    back = codec.decode(codes, dim, torch.float32)
    assert (back - x).norm() < {2: 0.4, 3: 0.22, 4: 0.12}[bits] * x.norm()
    assert equal(codec.encode(8 * x), {**codes, "norms": 8 * codes["norms"]})
    assert relative(codec.dot(x[:, :3], codes), x[:, :3] @ back.mT) < 1e-5


@pytest.mark.parametrize(
    ("name", "parameters", "dim", "told"),
    [
        ("int8", {"group_channels": 1}, 0, "int8.group_channels is 1; it must be at least 2, or null"),
        ("int8", {"group_channels": 32}, 80, "int8.group_channels is 32, which does not divide vectors of 80 channels"),
        ("fp8", {"kind": "e3m4"}, 0, "fp8.kind is 'e3m4'; it must be e4m3 or e5m2"),
        ("kivi", {"bits": 3}, 0, "kivi.bits is 3; it must be 2 or 4"),
        ("kivi", {"group": 30}, 0, "kivi.group is 30; it must be a multiple of 4"),
        (
            "kivi",
            {"group": 64, "residual_tokens": 32},
            0,
            "kivi.residual_tokens is 32; it must be a multiple of kivi.group (64)",
        ),
        ("kivi", {}, 80, "kivi.group is 32, which does not divide vectors of 80 channels"),
        ("kivi", {"bits": 2}, 6, "2-bit codes of 6 channels do not fill whole bytes"),
        ("turboquant", {"bits": 5}, 0, "turboquant.bits is 5; it must be 2, 3 or 4"),
        ("turboquant", {"bits": 3}, 12, "the channels must be a multiple of 8"),
    ],
)
def test_refusals(name: str, parameters: dict[str, Any], dim: int, told: str) -> None:
    with pytest.raises(MethodError) as caught:
        codecs[name](**parameters).for_values().fields(dim, torch.float32)
    assert told in str(caught.value)
