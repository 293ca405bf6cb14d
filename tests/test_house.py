"""The house keeps its limits; `benchmarks/house.py` counts, and writes the table."""

from __future__ import annotations

import house


def test_the_top_of_the_package_is_14_folders_and_8_files_at_most() -> None:
    folders, files = house.top_level()
    assert len(folders) <= 14, folders
    assert len(files) <= 8, files


def test_no_import_arrow_goes_up_and_every_room_has_its_layer() -> None:
    assert house.arrows_up() == []
    assert house.rooms_without_layer() == []


def test_a_public_name_has_one_meaning() -> None:
    assert len(house.names_defined_twice()) <= 5, house.names_defined_twice()


def test_private_parts_of_torch_have_one_home() -> None:
    assert house.private_torch() == []


def test_docstrings_stand_by_themselves() -> None:
    assert house.short_docstrings() == []
    assert house.fragments() == []


def test_the_readme_has_12_kilobytes_at_most() -> None:
    assert house.readme_bytes() <= 12_288


def test_modules_are_170_at_most() -> None:
    assert len(house.sources()) <= 170


def test_every_room_has_tests() -> None:
    assert min(house.tests_by_room().values()) >= 1
    assert sum(house.tests_by_room().values()) > 1000
