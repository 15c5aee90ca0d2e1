"""Whole HDF5 data sets whose chunks are gzip, inflated here instead of inside HDF5.

HDF5 inflates with the zlib it was built with, chunk by chunk under its global lock. The chunks as
they lie in the file can be had without a filter, and a faster library inflates them.
"""

from __future__ import annotations

from typing import Any

import h5py
import numpy as np

from fmrizoo.data.codec import Array, inflate

_SHUFFLE, _DEFLATE = 2, 1  # HDF5's numbers of its own filters


def read_chunked(data: h5py.Dataset) -> Array:
    """``data[()]``: the same numbers, faster where the chunks are gzip, with or without shuffle.

    Raises:
        OSError, RuntimeError, ValueError: damaged chunks.
    """
    if data.chunks is None or not _filters(data) or 0 in data.shape:
        return np.asarray(data[()])
    places: list[Any] = []
    data.id.chunk_iter(lambda chunk: places.append((chunk.chunk_offset, chunk.filter_mask)))
    if any(skipped for _, skipped in places):  # chunks that a filter did not make smaller
        return np.asarray(data[()])
    shuffled = _SHUFFLE in _filters(data)
    out = np.full(data.shape, data.fillvalue, data.dtype)  # chunks may never have been written
    size = data.dtype.itemsize * int(np.prod(data.chunks))
    for offset, _ in places:
        _, packed = data.id.read_direct_chunk(offset)
        plain = np.frombuffer(inflate(packed, size), np.uint8)
        if shuffled:
            plain = np.ascontiguousarray(plain.reshape(data.dtype.itemsize, -1).T)
        chunk = plain.reshape(-1).view(data.dtype).reshape(data.chunks)
        # A chunk at the edge reaches beyond the data set.
        place = tuple(slice(o, o + c) for o, c in zip(offset, data.chunks, strict=True))
        inside = tuple(slice(0, n - o) for o, n in zip(offset, data.shape, strict=True))
        out[place] = chunk[inside]
    return out


def _filters(data: h5py.Dataset) -> tuple[int, ...]:
    """The filters' numbers if they are (shuffle and) gzip and nothing else, else none."""
    made = data.id.get_create_plist()
    filters = tuple(made.get_filter(i)[0] for i in range(made.get_nfilters()))
    return filters if filters in ((_DEFLATE,), (_SHUFFLE, _DEFLATE)) else ()
