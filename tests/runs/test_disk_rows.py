"""Tables on disk read like lists."""

from __future__ import annotations

import pickle
from pathlib import Path
from tempfile import SpooledTemporaryFile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import records_of

from gradflow.runs import disk_rows
from gradflow.runs.disk_rows import Spool
from gradflow.runs.records import LayerRecord, ParamRecord, TimeRecord

times = st.lists(records_of(TimeRecord), max_size=12)


def rows_of(count: int) -> list[TimeRecord]:
    return [TimeRecord(0, layer, "mlp", layer / 7, 0.5) for layer in range(count)]


@pytest.mark.parametrize("record", [LayerRecord, ParamRecord, TimeRecord])
def test_every_cell_comes_back_as_it_was(record: type) -> None:
    @given(st.lists(records_of(record), max_size=5))
    def check(rows: list[object]) -> None:
        assert repr(list(Spool(record, rows=rows))) == repr(rows)

    check()


@given(st.integers(0, 30), st.slices(30), st.integers(1, 9))
def test_it_is_the_list_of_its_rows(count: int, part: slice, chunk: int) -> None:
    rows, table = rows_of(count), Spool(TimeRecord)
    for start in range(0, count, chunk):
        table.add_chunk(rows[start : start + chunk])
    assert table == rows
    assert len(table) == count
    assert table[part] == rows[part]
    assert list(reversed(table)) == rows[::-1]
    assert [table[i] for i in range(-count, count)] == rows + rows
    for place in (count, -count - 1):
        with pytest.raises(IndexError):
            table[place]


def test_tables_that_differ_are_not_equal() -> None:
    table = Spool(TimeRecord, rows=rows_of(3))
    assert table != rows_of(2)
    assert table != [*rows_of(2), rows_of(1)[0]]
    assert table != 3


def test_chunks_turn_round_from_a_mark_on() -> None:
    rows, table = rows_of(10), Spool(TimeRecord, rows=rows_of(2))
    mark = table.chunks
    for start in (8, 6, 4, 2):
        table.add_chunk(rows[start : start + 2])
    table.turn(mark)
    assert table == rows


def test_rows_change_into_a_table_of_their_own() -> None:
    table = Spool(TimeRecord, rows=rows_of(5))
    assert table.map(lambda rows: list(rows)[1:]) == rows_of(5)[1:]
    assert table == rows_of(5)


@pytest.mark.parametrize("most", [0, 1 << 20])
def test_other_processes_get_a_table(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(disk_rows, "IN_MEMORY_BYTES", most)
    table = Spool(TimeRecord, rows=rows_of(700))
    again = pickle.loads(pickle.dumps(table))
    assert again == rows_of(700)
    again.extend(rows_of(2))
    assert (len(again), len(table)) == (702, 700)


def test_many_rows_go_to_the_disk_and_leave_no_name_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[str | None] = []

    class Watched(SpooledTemporaryFile):
        def rollover(self) -> None:
            folders.append(self._TemporaryFileArgs["dir"])
            super().rollover()

    monkeypatch.setattr(disk_rows, "SpooledTemporaryFile", Watched)
    monkeypatch.setattr(disk_rows, "IN_MEMORY_BYTES", 1000)
    few, many = (Spool(TimeRecord, tmp_path, rows_of(count)) for count in (2, 2000))
    assert few == rows_of(2)
    assert many == rows_of(2000)
    assert folders == [str(tmp_path)]
    assert list(tmp_path.iterdir()) == []
