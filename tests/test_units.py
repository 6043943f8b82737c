import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplan.errors import TargetError
from kvplan.units import BASIS_POINTS, format_bytes, format_share, is_size, parse_bytes, parse_share


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("512MiB", 512 * 2**20),
        ("1.5 GiB", 3 * 2**29),
        ("10kb", 10_000),
        ("7B", 7),
        (" 2GB ", 2 * 10**9),
        ("1TiB", 2**40),
    ],
)
def test_sizes_are_read(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "512", "MiB", "-1MiB", "1e3MiB", "5XiB", "1.GiB", "5 MiB extra"])
def test_a_bad_size_says_how_to_write_one(text: str) -> None:
    with pytest.raises(TargetError, match="write for example 512MiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (1572864, "1.50 MiB"), (2**41, "2.00 TiB")]
)
def test_sizes_are_written(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("text", "share"), [("40%", 4000), ("0.4", 4000), ("1", 10_000), ("100%", 10_000), ("37.25 %", 3725), ("0.01%", 1)]
)
def test_shares_are_read(text: str, share: int) -> None:
    assert parse_share(text) == share


@pytest.mark.parametrize("text", ["0", "0%", "101%", "40", "1.5", "0.001%"])
def test_a_share_outside_its_range_is_refused(text: str) -> None:
    with pytest.raises(TargetError, match="not a share above 0% and at most 100%"):
        parse_share(text)


@pytest.mark.parametrize("text", ["", "%", "-40%", "forty", "40%%", "nan"])
def test_a_bad_share_says_how_to_write_one(text: str) -> None:
    with pytest.raises(TargetError, match="write for example 40%"):
        parse_share(text)


@given(st.integers(1, BASIS_POINTS))
def test_a_share_survives_writing_and_reading(share: int) -> None:
    assert parse_share(format_share(share)) == share


@pytest.mark.parametrize(
    ("text", "size"),
    [("512M", True), ("1.5 gib", True), ("3XB", True), ("MiB", True), ("40%", False), ("0.4", False), ("much", False)],
)
def test_a_number_with_letters_is_meant_as_a_size(text: str, size: bool) -> None:
    assert is_size(text) == size
