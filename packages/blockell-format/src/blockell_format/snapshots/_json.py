"""JSON that is valid whatever is put in, and that survives whatever is read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def to_plain(value: Any, where: str) -> Any:
    """Reduce a value to JSON types; non-finite numbers become "NaN", "Infinity", "-Infinity".

    Objects with an `item()` method (numpy and torch scalars) are asked for their Python number.

    Raises:
        TypeError: a value that JSON cannot hold; the message names `where`.
    """
    try:
        return _plain(value, where)
    except RecursionError:
        raise TypeError(f"{where} is nested too deeply, or holds itself.") from None


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):
        return _clean(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {_clean(str(k)): _plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    item = getattr(value, "item", None)
    if callable(item):
        try:
            return _plain(item(), where)
        except (ValueError, RuntimeError) as error:
            raise TypeError(
                f"{where} is a {type(value).__name__} of several elements; log scalars, or a list."
            ) from error
    raise TypeError(
        f"{where} is a {type(value).__name__}; it must be a number, a string, a boolean, None, "
        "or lists and mappings of these."
    )


def _clean(text: str) -> str:
    """Text that UTF-8 can hold: lone surrogates become question marks."""
    return text.encode("utf-8", "replace").decode()


def from_plain(value: Any) -> Any:
    """Turn "NaN", "Infinity" and "-Infinity" back into numbers.

    Raises:
        ValueError: nested too deeply; `loads` goes deeper than this can.
    """
    try:
        return _restore(value)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _restore(value: Any) -> Any:
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {k: _restore(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_restore(v) for v in value]
    return value


def dumps(value: Any) -> str:
    """Compact JSON of plain values."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def loads(data: bytes | str) -> Any:
    """Parse JSON; anything that goes wrong is a ValueError.

    Raises:
        ValueError: not UTF-8, not JSON, nested too deeply, or text with lone surrogates (which no
            terminal or browser could print).
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        text.encode()
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"is not JSON, or cut off ({error})") from None
    except UnicodeEncodeError:
        raise ValueError("holds text that is not valid Unicode") from None
    return value
