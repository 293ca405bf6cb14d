"""Stored runs with damage that a reader must name."""

from __future__ import annotations

from pathlib import Path

from hypothesis import strategies as st

FILES = ("run.json", "layers.csv", "params.csv", "times.csv")


def corrupt(file: Path, data: st.DataObject) -> None:
    """Cut, change or insert something, of the kind that a text editor or a bad disk leaves."""
    content = file.read_bytes()
    place = data.draw(st.integers(0, len(content)))
    junk = st.sampled_from(
        [b"", b"nan", b"-1", b",", b"\n", b'"', b"inf", b"null", b"{}", b"1e999"]
    )
    inserted = data.draw(junk | st.binary(max_size=3))
    skipped = data.draw(st.sampled_from([0, 0, 1, 2, 8, len(content)]))
    file.write_bytes(content[:place] + inserted + content[place + skipped :])
