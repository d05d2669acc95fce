"""A device's samples as one run uses them: training, test and validation, with their caches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from edge_client.data.batches import Augmentation, BatchReader
from edge_client.data.dataset import Dataset
from edge_client.data.image_set import ImageSet
from edge_client.data.label_noise import with_noised_labels
from edge_client.run_model import RunModel
from edge_client.smashed.head_cache import HeadOutputs
from edge_client.smashed.uploads import SampleUploader
from edge_client.storage.identity import device_secret
from edge_client.training import Samples
from edge_client.transport.client import Server
from edge_client.transport.split_client import SplitPlane
from protocol.codec_names import is_row_wise_inside
from protocol.labels import label_epsilon
from protocol.plan import RunPlan
from protocol.seeds import derive_seed


class SampleDevice(Protocol):
    """The device whose samples they are, see `edge_client.participant.Participant`."""

    @property
    def server(self) -> Server: ...

    @property
    def data(self) -> Dataset: ...

    @property
    def folder(self) -> Path: ...

    @property
    def name(self) -> str: ...

    @property
    def cache_bytes(self) -> int: ...


@dataclass(frozen=True)
class RunSamples:
    """The device's samples with the caches of one run, and the split plane for their requests."""

    train: Samples
    test: Samples
    validation: Samples | None
    plane: SplitPlane
    inference: SplitPlane  # of held-out images


def open_samples(
    device: SampleDevice, data: Dataset, validation: ImageSet | None, model: RunModel
) -> RunSamples:
    """Open all sets with empty caches."""
    plan, cache_bytes = model.run.plan, device.cache_bytes
    shape = model.model.feature_shape(plan.wire.pooled_features)
    plane = SplitPlane(device.server, plan, shape)
    inference_codec = plan.wire.inference_smashed or plan.wire.smashed
    inference = SplitPlane(device.server, plan, shape, inference_codec)
    augmentation = None
    if plan.training.augment:
        augmentation = Augmentation(derive_seed(plan.seed, "augment", device.name))
    preprocessing = model.model.preprocessing
    train = BatchReader(
        data.train, preprocessing, cache_bytes=cache_bytes, augmentation=augmentation
    )
    test = BatchReader(data.test, preprocessing, cache_bytes=cache_bytes)
    selecting = None
    if validation is not None:
        selecting = BatchReader(validation, preprocessing, cache_bytes=cache_bytes)
    data.drop_resized()

    def with_caches(images: BatchReader, split_plane: SplitPlane, codec: str) -> Samples:
        return _with_caches(device, images, model, split_plane, codec)

    return RunSamples(
        with_caches(train, plane, plan.wire.smashed),
        with_caches(test, inference, inference_codec),
        None if selecting is None else with_caches(selecting, plane, plan.wire.smashed),
        plane,
        inference,
    )


def _with_caches(
    device: SampleDevice, images: BatchReader, model: RunModel, plane: SplitPlane, codec: str
) -> Samples:
    plan = model.run.plan
    if plan.model.prompt_at != "cut":
        return Samples(images)
    outputs = HeadOutputs(model.model, images, device.cache_bytes)
    if not plan.wire.keep_smashed:
        return Samples(images, outputs)
    encoding = f"{model.head.sha256} {codec}"
    secret = device_secret(device.folder)
    joint = not is_row_wise_inside(codec)
    uploader = SampleUploader(outputs, images, plane, secret, encoding, joint=joint)
    return Samples(images, outputs, uploader)


def split_validation(device: SampleDevice, plan: RunPlan) -> tuple[Dataset, ImageSet | None]:
    """Return the device's data, and the training images reserved for selecting the best state.

    With noised labels, labels are replaced at random first.
    """
    data, epsilon = device.data, label_epsilon(plan.training.labels)
    if epsilon is not None and len(data.train):
        data = with_noised_labels(data, epsilon, device_secret(device.folder))
    count = int((plan.training.validation_share or 0.0) * len(data.train))
    if not count:
        return data, None
    seed = derive_seed(plan.seed, "validation", device.name)
    # Not by class: the server sees which samples are not trained on.
    chosen = np.sort(np.random.default_rng(seed).permutation(len(data.train))[:count])
    others = np.setdiff1d(np.arange(len(data.train)), chosen)
    return Dataset(data.train.subset(others), data.test), data.train.subset(chosen)
