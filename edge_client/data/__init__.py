"""The device's images: loading, partitioning and batching."""

from edge_client.data.batches import (
    Augmentation,
    BatchReader,
    Interpolation,
    Preprocessing,
    shuffled,
)
from edge_client.data.dataset import Dataset, by_content, hold_out, limit_per_set
from edge_client.data.download import cache_dir
from edge_client.data.errors import (
    ClassMismatchError,
    CorruptImageError,
    DataError,
    DataFormatError,
    DatasetDownloadError,
    EmptyDatasetError,
    MissingDataError,
    MissingLibraryError,
    PartitionError,
    PickledDataError,
    PreprocessingError,
    SourceError,
    UnknownDatasetError,
)
from edge_client.data.image_set import ImageSet
from edge_client.data.partition import Part, Scheme, parse_scheme, partition
from edge_client.data.remarks import Skipped
from edge_client.data.sources import DataSource, load_dataset, parse_source

__all__ = [
    "Augmentation",
    "BatchReader",
    "ClassMismatchError",
    "CorruptImageError",
    "DataError",
    "DataFormatError",
    "DataSource",
    "Dataset",
    "DatasetDownloadError",
    "EmptyDatasetError",
    "ImageSet",
    "Interpolation",
    "MissingDataError",
    "MissingLibraryError",
    "Part",
    "PartitionError",
    "PickledDataError",
    "Preprocessing",
    "PreprocessingError",
    "Scheme",
    "Skipped",
    "SourceError",
    "UnknownDatasetError",
    "by_content",
    "cache_dir",
    "hold_out",
    "limit_per_set",
    "load_dataset",
    "parse_scheme",
    "parse_source",
    "partition",
    "shuffled",
]
