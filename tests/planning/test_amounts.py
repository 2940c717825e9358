"""Times and sizes, read and written."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebear.errors import FormatError
from forebear.planning import duration, parse_duration, parse_size, size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2h", 7200),
        ("90m", 5400),
        ("1h30m", 5400),
        ("1 h 30 m", 5400),
        ("45s", 45),
        ("1d2h", 93600),
        ("0.5h", 1800),
        ("12", 12),
    ],
)
def test_times_are_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "hours", "h", "30m1h", "1h1h", "1h30", "-1h", "2x", "1e3"])
def test_what_is_not_a_time_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(FormatError, match="1h30m"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("8GB", 8 * 10**9),
        ("8 gb", 8 * 10**9),
        ("8g", 8 * 10**9),
        ("500MB", 5 * 10**8),
        ("1.5TB", 15 * 10**11),
        ("2GiB", 2**31),
        ("4096", 4096),
    ],
)
def test_sizes_are_read(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "GB", "8 apples", "-8GB", "8GBB", "1e9"])
def test_what_is_not_a_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(FormatError, match="8GB"):
        parse_size(text)


@pytest.mark.parametrize("parse", [parse_duration, parse_size])
def test_zero_is_refused(parse: object) -> None:
    with pytest.raises(FormatError, match="above zero"):
        parse("0")  # type: ignore[operator]


@given(st.floats(0.001, 1e7))
def test_what_is_written_can_be_read_within_its_digits(seconds: float) -> None:
    text = duration(seconds).replace("min", "m")
    if text.endswith("ms"):
        assert float(text[:-2]) / 1000 == pytest.approx(seconds, abs=0.001)
    else:
        assert parse_duration(text) == pytest.approx(seconds, rel=0.06)


@given(st.integers(1, 10**15))
def test_sizes_are_written_within_their_digits(count: int) -> None:
    text = size(count).replace(",", "")
    assert parse_size(text) == pytest.approx(count, rel=0.06)
