"""What can go wrong between the user's `--data` text and a batch of images.

DataError
├── SourceError            the text after --data names no known kind of source
├── UnknownDatasetError    no classification set of that name
├── MissingDataError       the folder or the files are not where they are expected
├── EmptyDatasetError      nothing is left to learn from
├── DatasetDownloadError   the files are not there and could not be fetched
├── DataFormatError        a file's bytes contradict its format
├── PickledDataError       the only form at hand is pickled, which is never read
├── CorruptImageError      an image that was readable before no longer is
├── ClassMismatchError     the set shares no class with the run
├── PartitionError         the set cannot be parted as asked
├── PreprocessingError     an image size, mean or batch size that makes no sense
└── MissingLibraryError    the set needs a library that is not installed
"""

from __future__ import annotations

from typing import ClassVar

from protocol.errors import FieldValue, SFPromptError


class DataError(SFPromptError):
    """A fault in the data or in how it was asked for."""

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
    """Nothing is left to learn from."""


class DatasetDownloadError(DataError):
    """The files are not there and could not be fetched."""


class DataFormatError(DataError):
    """A file's bytes contradict its format."""


class PickledDataError(DataError):
    """The only form at hand is pickled, and pickles are never read."""


class CorruptImageError(DataError):
    """An image that was readable when the set was opened no longer is."""


class ClassMismatchError(DataError):
    """The set shares no class with the run it is meant for."""


class PartitionError(DataError):
    """The set cannot be parted as asked."""


class PreprocessingError(DataError):
    """An image size, mean, interpolation or batch size makes no sense."""


class MissingLibraryError(DataError):
    """The set needs a library that is not installed."""


def _plain(value: object) -> FieldValue:
    return value if isinstance(value, str | int | float | bool | None) else str(value)
