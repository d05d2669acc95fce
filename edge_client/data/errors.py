"""Errors of loading, partitioning and preprocessing data.

DataError
├── SourceError            the text after --data names no known kind of source
├── UnknownDatasetError    there is no classification set of that name
├── MissingDataError       the folder or the files are not where they are expected
├── EmptyDatasetError      no training image is left
├── DatasetDownloadError   the files are missing and their download failed
├── DataFormatError        a file's content does not match its format
├── PickledDataError       the data exist only in pickled form, which is never read
├── CorruptImageError      an image cannot be read
│   └── TooManyPixelsError an image is larger than this device decodes
├── ClassMismatchError     the set shares no class with the run
├── PartitionError         the set cannot be partitioned as requested
├── PreprocessingError     an image size, mean, interpolation or batch size is invalid
└── MissingLibraryError    the set needs a library that is not installed
"""

from __future__ import annotations

from typing import ClassVar

from protocol.errors import FieldValue, SFPromptError


class DataError(SFPromptError):
    """The data, or the request for them, are faulty. A class's docstring is its message."""

    code: ClassVar[str] = "data_error"

    def __init__(self, field: str, *, limit: object, value: object, hint: str = "") -> None:
        sentence = type(self).__doc__ or type(self).__name__
        super().__init__(
            sentence.rstrip("."),
            field=field,
            limit=_plain(limit),
            value=_plain(value),
            hint=hint or None,
        )


class SourceError(DataError):
    """The text after --data names no known kind of source."""


class UnknownDatasetError(DataError):
    """There is no classification set of that name."""


class MissingDataError(DataError):
    """The folder or the files are not where they are expected."""


class EmptyDatasetError(DataError):
    """No training image is left."""


class DatasetDownloadError(DataError):
    """The files are missing and their download failed."""


class DataFormatError(DataError):
    """A file's content does not match its format."""


class PickledDataError(DataError):
    """The data exist only in pickled form, which is never read."""


class CorruptImageError(DataError):
    """An image cannot be read."""


class TooManyPixelsError(CorruptImageError):
    """An image is larger than this device decodes."""


class ClassMismatchError(DataError):
    """The set shares no class with the run."""


class PartitionError(DataError):
    """The set cannot be partitioned as requested."""


class PreprocessingError(DataError):
    """An image size, mean, interpolation or batch size is invalid."""


class MissingLibraryError(DataError):
    """The set needs a library that is not installed."""


def _plain(value: object) -> FieldValue:
    return value if isinstance(value, str | int | float | bool | None) else str(value)
