"""The Python API: a data set in memory, tuned by real processes, evaluated and exported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import Dataset

import sfprompt
from protocol.errors import InvalidField, NotFound
from sfprompt_bench.run.simulation import write_images

CLASSES = ("zero", "one", "two")


class Digits(Dataset[tuple[torch.Tensor, int]]):
    """The first digits as floats [1, 8, 8], as `torchvision.transforms.ToTensor` gives them."""

    classes = CLASSES

    def __init__(self, per_class: int) -> None:
        pixels, labels = load_digits(return_X_y=True)
        chosen = np.concatenate(
            [np.flatnonzero(labels == label)[:per_class] for label in range(len(CLASSES))]
        )
        self.images = (pixels[chosen] / 16).astype(np.float32).reshape(-1, 1, 8, 8)
        self.labels = labels[chosen]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(self.images[position]), int(self.labels[position])


def test_a_data_set_is_tuned_evaluated_plotted_and_exported(tmp_path: Path) -> None:
    run = sfprompt.simulate(
        Digits(20),
        devices=2,
        rounds=1,
        image_size=32,
        settings={"model": {"backbone": "test_vit", "weights": "random:0"}},
        folder=tmp_path / "run",
        quiet=True,
    )
    assert run.accuracy is not None
    assert run.accuracy > 1 / len(CLASSES), "random features of digits tell more than guessing"
    assert [view.round for view in run.rounds] == [0, 1]
    assert run.megabytes > 0
    view = run.evaluation
    assert view is not None
    assert view.quality is not None
    assert view.quality.accuracy == run.accuracy
    assert sorted(each.name for each in view.classes) == sorted(CLASSES)
    assert sum(each.samples for each in view.classes) == view.quality.samples == 12
    assert run.plot().axes[0].get_ylabel().startswith("accuracy")
    model = sfprompt.load_exported(run.export(tmp_path / "model.safetensors"))
    assert sorted(model.class_names) == sorted(CLASSES)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    assert f"{run.accuracy:.2%}" in repr(run)


def pairs(*images: object, label: object = 0) -> list[tuple[object, object]]:
    return [(image, label) for image in images]


def test_images_of_every_kind_are_written_without_loss(tmp_path: Path) -> None:
    colour = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    kinds = [
        colour,
        colour.transpose(2, 0, 1),
        torch.from_numpy(colour),
        colour.astype(np.float32) / 255,
        torch.from_numpy(colour.transpose(2, 0, 1)).float() / 255,
        Image.fromarray(colour),
    ]
    folder = write_images(pairs(*kinds), tmp_path / "images")
    for path in sorted(folder.rglob("*.png")):
        with Image.open(path) as written:
            np.testing.assert_array_equal(np.asarray(written.convert("RGB")), colour)
    assert len(list((folder / "0").iterdir())) == len(kinds)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (np.zeros((4, 4, 2), np.uint8), "1 or 3 channels"),
        (np.zeros((0, 4), np.uint8), "1 or 3 channels"),
        (np.full((4, 4), 1.5), "before normalisation"),
        (np.full((4, 4), np.nan), "before normalisation"),
        (np.zeros((4, 4), np.int64), "uint8"),
        ("a path", "1 or 3 channels"),
    ],
)
def test_an_image_of_another_kind_is_refused_and_nothing_stays(
    image: object, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidField, match="position 1") as caught:
        write_images(pairs(np.zeros((4, 4), np.uint8), image), tmp_path / "images")
    assert reason in str(caught.value.limit)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("label", ["cat", None, 3.5j])
def test_a_label_that_is_no_number_is_refused(label: object, tmp_path: Path) -> None:
    with pytest.raises(InvalidField, match="not the number of a class"):
        write_images(pairs(np.zeros((4, 4), np.uint8), label=label), tmp_path / "images")


def test_a_name_of_no_data_set_is_refused_before_a_process_starts(tmp_path: Path) -> None:
    with pytest.raises(NotFound) as caught:
        sfprompt.simulate("letters", folder=tmp_path / "run")
    assert caught.value.limit == ["digits", "fashion-mnist", "folder:PATH"]
    assert not (tmp_path / "run").exists()
