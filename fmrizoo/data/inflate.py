"""zlib streams back to bytes, with the fastest library at hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any


def _first(*names: str) -> ModuleType:
    """The first of the modules that is installed; the last one is."""
    for name in names[:-1]:
        try:
            return import_module(name)
        except ImportError:
            continue
    return import_module(names[-1])


def _choose() -> tuple[Callable[..., Any], type[Exception]]:
    """(decompress(packed, size), what it raises). libdeflate takes half of zlib's time."""
    library: Any = _first("deflate", "isal.isal_zlib", "zlib")
    if library.__name__ == "deflate":
        return library.zlib_decompress, library.DeflateError
    return partial(_sized, library.decompress), library.error


def _sized(decompress: Callable[..., bytes], packed: memoryview | bytes, size: int) -> bytes:
    return decompress(packed, bufsize=size)


_DECOMPRESS, _ERROR = _choose()


def inflate(packed: memoryview | bytes, size: int) -> bytes | bytearray:
    """The ``size`` bytes that a zlib stream holds.

    Raises:
        ValueError: a damaged stream, or one of another size.
    """
    try:
        plain: bytes | bytearray = _DECOMPRESS(packed, size)
    except _ERROR as error:
        raise ValueError(str(error)) from None
    if len(plain) != size:
        raise ValueError(f"it holds {len(plain)} bytes, not {size}")
    return plain
