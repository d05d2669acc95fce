"""The public names of split_model: sorted, importable and complete."""

from __future__ import annotations

from types import ModuleType

import split_model


def test_the_names_are_sorted() -> None:
    names = split_model.__all__
    # Constants, then classes, then functions, as ruff's RUF022 sorts them.
    assert names == sorted(set(names), key=lambda name: (not name.isupper(), name.islower(), name))


def test_each_imported_name_is_exported() -> None:
    imported = {
        name
        for name, value in vars(split_model).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert imported == set(split_model.__all__)
