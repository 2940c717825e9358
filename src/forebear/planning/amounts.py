"""Times and sizes as people write them: `2h`, `1h30m`, `8GB`."""

import re

from forebear.errors import FormatError

SECONDS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
BYTES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
BYTES |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_NUMBER = r"(\d+(?:\.\d+)?|\.\d+)"


def parse_duration(text: str) -> float:
    """Seconds of `"2h"`, `"90m"`, `"1h30m"` or `"45s"`; a bare number is seconds.

    Raises:
        FormatError: it is not a time, or not above zero.
    """
    compact = "".join(text.lower().split())
    found = re.findall(_NUMBER + "([dhms])", compact)
    if re.fullmatch(_NUMBER, compact):
        total = float(compact)
    elif found and "".join(number + unit for number, unit in found) == compact:
        units = [unit for _, unit in found]
        if sorted(units, key="dhms".index) != units or len(set(units)) < len(units):
            raise _not_a_time(text)
        total = sum(float(number) * SECONDS[unit] for number, unit in found)
    else:
        raise _not_a_time(text)
    if total <= 0:
        raise FormatError(f"{text!r} is no time to work in: write one above zero, such as 2h")
    return total


def parse_size(text: str) -> int:
    """Bytes of `"8GB"`, `"500MB"` or `"16GiB"`; a bare number is bytes.

    Raises:
        FormatError: it is not a size, or not above zero.
    """
    found = re.fullmatch(_NUMBER + "([A-Z]*)", "".join(text.upper().split()))
    unit = found and (found[2] if found[2] in BYTES else found[2] + "B")
    if not found or unit not in BYTES:
        raise FormatError(f"{text!r} is not a size: write it like 8GB, 500MB or 16GiB")
    total = int(float(found[1]) * BYTES[unit])
    if total <= 0:
        raise FormatError(f"{text!r} is no room to work in: write a size above zero, such as 8GB")
    return total


def duration(seconds: float) -> str:
    """Seconds for people: two units at most."""
    if seconds < 0.95:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return _two(whole, 60, "min", "s")
    if whole < 2 * 86400:
        return _two(round(seconds / 60), 60, "h", "min")
    return _two(round(seconds / 3600), 24, "d", "h")


def size(count: float) -> str:
    """Bytes for people, in powers of ten: three digits at most."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 9.95 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def _two(whole: int, base: int, large: str, small: str) -> str:
    rest = f" {whole % base} {small}" if whole % base else ""
    return f"{whole // base:,} {large}{rest}"


def _not_a_time(text: str) -> FormatError:
    return FormatError(f"{text!r} is not a time: write it like 2h, 90m, 1h30m or 45s")
