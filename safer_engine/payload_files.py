"""Payload files written and opened without holding them in memory: safetensors in pieces, Arrow tables.

A safetensors file is eight bytes of header length (little-endian), a JSON header with each tensor's dtype, shape and
byte range, and the tensors one after another.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safer_engine.errors import ArtifactError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

_DTYPES = {"I64": "<i8", "I32": "<i4", "U8": "|u1", "F32": "<f4", "F64": "<f8"}


@dataclass(frozen=True)
class TensorPieces:
    """One tensor of a file to be written.

    Attributes:
        dtype: safetensors name of the element type.
        shape: its final shape.
        pieces: arrays of that dtype which, one after another, hold its elements in C order.
    """

    dtype: str
    shape: tuple[int, ...]
    pieces: Iterable[NDArray[Any]]

    @property
    def n_bytes(self) -> int:
        """Bytes of the whole tensor."""
        size = int(_DTYPES[self.dtype][2:])
        for length in self.shape:
            size *= length
        return size


def write_tensors(path: Path, tensors: Mapping[str, TensorPieces]) -> None:
    """Write a safetensors file, one piece in memory at a time.

    Raises:
        ArtifactError: the pieces of a tensor do not make up its shape.
    """
    import numpy as np

    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.n_bytes],
        }
        offset += tensor.n_bytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as handle:
        handle.write(struct.pack("<Q", len(raw)) + raw)
        for name, tensor in tensors.items():
            written = 0
            for piece in tensor.pieces:
                written += handle.write(np.ascontiguousarray(piece, dtype=_DTYPES[tensor.dtype]).tobytes())
            if written != tensor.n_bytes:
                raise ArtifactError(f"tensor {name} has {written} bytes, its shape {tensor.shape} needs {tensor.n_bytes}")


def map_tensors(path: Path) -> dict[str, NDArray[Any]]:
    """Memory maps of a safetensors file's tensors, read-only: what is not touched is not read.

    Raises:
        ArtifactError: an element type that numpy has no equal of, or a damaged file.
    """
    import numpy as np

    with path.open("rb") as handle:
        start = handle.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        try:
            header = json.loads(handle.read(length))
        except ValueError as error:
            raise ArtifactError(f"{path.name} is not a safetensors file: {error}") from error
    header.pop("__metadata__", None)
    return {name: _map(np, path, 8 + length, entry) for name, entry in header.items()}


def _map(np: Any, path: Path, base: int, entry: dict[str, Any]) -> NDArray[Any]:
    dtype, shape = _DTYPES.get(entry["dtype"]), tuple(entry["shape"])
    if dtype is None:
        raise ArtifactError(f"{path.name} has a tensor of type {entry['dtype']}, which cannot be mapped")
    first, last = entry["data_offsets"]
    if first == last:
        return np.zeros(shape, dtype=dtype)  # type: ignore[no-any-return]
    try:
        return np.memmap(path, dtype=dtype, mode="r", offset=base + first, shape=shape)  # type: ignore[no-any-return]
    except ValueError as error:
        raise ArtifactError(f"{path.name} is shorter than its header says") from error


def write_table(path: Path, table: pa.Table) -> None:
    """Write an Arrow IPC file."""
    import pyarrow as pa

    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def nullable(values: NDArray[np.float64]) -> pa.Array:
    """A float column in which NaN is null."""
    import numpy as np
    import pyarrow as pa

    return pa.array(values, type=pa.float64(), mask=np.isnan(values))
