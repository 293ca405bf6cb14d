"""Rows of a table that need not fit into memory: a sequence over a temporary file.

Rows are kept in chunks; only where each chunk lies is in memory. An engine that goes from the last
layer to the first adds its chunks in that order, and the order of the chunks is turned round at
the end, which moves no data. The file has no name from the start, so that a process which is
killed leaves nothing behind; short tables never reach the disk.
"""

from __future__ import annotations

import pickle
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, islice, pairwise
from operator import attrgetter, eq
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any, Generic, TypeVar, overload

from gradflow.runs.records import LayerRecord, ParamRecord, StepRecord, TimeRecord, columns

RecordT = TypeVar("RecordT", LayerRecord, ParamRecord, TimeRecord, StepRecord)
_Cells = tuple[Any, ...]

_CHUNK_ROWS = 512
# Tables up to this size stay in memory.
IN_MEMORY_BYTES = 1 << 20


class Spool(Sequence[RecordT], Generic[RecordT]):
    """Records of one kind, on disk where they are many. Read it like any sequence.

    Args:
        record: the class of the rows.
        folder: where the temporary file goes if one is needed; the system's place if None.
        rows: what it holds from the start.
    """

    def __init__(
        self, record: type[RecordT], folder: Path | None = None, rows: Iterable[RecordT] = ()
    ) -> None:
        self.record: type[RecordT] = record
        self.folder = folder
        self._cells = attrgetter(*columns(record))
        place = str(folder) if folder else None
        self._file = SpooledTemporaryFile(max_size=IN_MEMORY_BYTES, dir=place)  # noqa: SIM115 (it lives as long)
        weakref.finalize(self, self._file.close)  # it lives as long as the table
        self._places: list[tuple[int, int, int]] = []  # offset, bytes and rows of each chunk
        self._end = 0
        self._read: tuple[int, list[_Cells]] = (-1, [])  # the last chunk that was read, and where
        self.extend(rows)

    def extend(self, rows: Iterable[RecordT]) -> None:
        """Add rows at the end.

        Raises:
            OSError: the disk is full, or failed.
        """
        remaining = iter(rows)
        while chunk := list(islice(remaining, _CHUNK_ROWS)):
            self.add_chunk(chunk)

    def add_chunk(self, rows: Sequence[RecordT]) -> None:
        """Add rows that `turn` keeps together in one chunk.

        Raises:
            OSError: the disk is full, or failed.
        """
        if rows:
            data = pickle.dumps([self._cells(row) for row in rows], pickle.HIGHEST_PROTOCOL)
            self._file.seek(self._end)
            self._file.write(data)
            self._places.append((self._end, len(data), len(rows)))
            self._end += len(data)

    def map(self, change: Callable[[Iterable[RecordT]], Iterable[RecordT]]) -> Spool[RecordT]:
        """A new table with the rows that `change` makes of the rows of this one."""
        return Spool(self.record, self.folder, change(self))

    @property
    def chunks(self) -> int:
        """Number of chunks; `turn` takes an earlier value to know where a pass began."""
        return len(self._places)

    def turn(self, first: int) -> None:
        """Turn round the order of the chunks from `first` on; rows within one keep theirs."""
        self._places[first:] = self._places[first:][::-1]

    def cells(self) -> Iterator[_Cells]:
        """The rows as tuples, in the order of the columns: the fastest way through them."""
        for index in range(len(self._places)):
            yield from self._chunk(index)

    def _chunk(self, index: int) -> list[_Cells]:
        offset, size, _ = self._places[index]
        if self._read[0] != offset:
            self._file.seek(offset)
            # The bytes are those that this very object wrote.
            self._read = (offset, pickle.loads(self._file.read(size)))
        return self._read[1]

    def __len__(self) -> int:
        return sum(count for _, _, count in self._places)

    def __iter__(self) -> Iterator[RecordT]:
        return (self.record(*cells) for cells in self.cells())

    @overload
    def __getitem__(self, index: int) -> RecordT: ...
    @overload
    def __getitem__(self, index: slice) -> list[RecordT]: ...
    def __getitem__(self, index: int | slice) -> RecordT | list[RecordT]:
        """A row, or the list of rows of a slice, of which only the chunks in question are read."""
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]] if index.step else self._slice(index)
        place = range(len(self))[index]
        return self._slice(slice(place, place + 1))[0]

    def _slice(self, wanted: slice) -> list[RecordT]:
        low, high, _ = wanted.indices(len(self))
        found: list[RecordT] = []
        starts = accumulate((count for _, _, count in self._places), initial=0)
        for index, (start, stop) in enumerate(pairwise(starts)):
            if start < high and low < stop:
                chunk = self._chunk(index)[max(low - start, 0) : high - start]
                found += (self.record(*cells) for cells in chunk)
        return found

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(map(eq, self, other))

    __hash__ = None  # type: ignore[assignment]  # rows may be added

    def __repr__(self) -> str:
        return f"<{len(self)} rows of {self.record.__name__}>"

    def __reduce__(self) -> tuple[Any, ...]:
        """Go to another process as bytes, in a file where its system keeps temporary files."""
        self._file.seek(0)
        return _restored, (self.record, self._file.read(self._end), self._places)


def _restored(record: type[RecordT], data: bytes, places: list[tuple[int, int, int]]) -> Any:
    spool = Spool(record)
    spool._file.write(data)
    spool._places, spool._end = places, len(data)
    return spool
