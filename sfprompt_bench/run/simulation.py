"""`sfprompt.simulate`: a run on this machine, from a program or a notebook."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console

from edge_client.data.partition import parse_scheme
from protocol.errors import InvalidField
from protocol.messages import Results, RoundView
from protocol.presets import Form
from protocol.quality import EvaluationView
from protocol.traffic import total_bytes
from sfprompt_bench.presets import with_changes
from sfprompt_bench.run.choice import choose_preset
from sfprompt_bench.run.local_run import EVALUATION, SERVER, LocalRun
from sfprompt_bench.run.preflight import check_packages, make_run_folder
from sfprompt_bench.run.report import closed_rounds, write_files

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class ImageDataset(Protocol):
    """What `simulate` reads of a ``torch.utils.data.Dataset``: pairs of an image and a label.

    An image is a PIL image, or an array or tensor: uint8 or floats from 0 to 1, [H, W], [3, H, W]
    or [H, W, 3]. A label is an integer; ``classes`` may name them.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, position: int, /) -> tuple[Any, Any]: ...


@dataclass(frozen=True)
class Simulation:
    """A finished run on this machine.

    Attributes:
        results: rounds, participants and traffic, as the server reports them.
        folder: its history, plots and files.
    """

    results: Results
    folder: Path

    @property
    def accuracy(self) -> float | None:
        """Accuracy of the run's state on the images that the devices held out."""
        best = self.results.best
        return None if best is None else best.accuracy

    @property
    def rounds(self) -> Sequence[RoundView]:
        """The rounds, in order."""
        return closed_rounds(self.results)

    @property
    def megabytes(self) -> float:
        """Bytes at the sockets of all devices, both directions, in MB."""
        return total_bytes(self.results.traffic) / 1e6

    @property
    def evaluation(self) -> EvaluationView | None:
        """Figures by device and by class; None: nothing was measured."""
        path = self.folder / EVALUATION
        return EvaluationView.model_validate_json(path.read_text()) if path.is_file() else None

    def plot(self) -> Figure:
        """Plot the accuracy over rounds."""
        from sfprompt_bench.plots import draw_accuracy

        return draw_accuracy(self.rounds, self.results.run.settings.name)

    def export(self, out: Path | str, round_: str = "newest") -> Path:
        """Write the complete tuned model; the suffix chooses the format.

        Args:
            out: NAME.safetensors, NAME.onnx, NAME.pt2, or a folder in timm's format.
            round_: ``newest``, ``best`` or a round's number.

        Returns:
            The path.

        Raises:
            InvalidField: the suffix names no format, or the format cannot hold the model.
        """
        from split_model.checkpoints.export_format import choose_format
        from split_server.federation.export import export_run

        path = Path(out)
        kind = choose_format(path, None)
        export_run(self.folder / SERVER, self.results.run.id, path, kind, round_)
        return path

    def __repr__(self) -> str:
        accuracy = "not measured" if self.accuracy is None else f"{self.accuracy:.2%}"
        return (
            f"Simulation(accuracy {accuracy}, {len(self.rounds)} rounds, "
            f"{len(self.results.participants)} devices, {self.megabytes:.2f} MB, {self.folder})"
        )


def simulate(
    data: str | Path | ImageDataset = "digits",
    *,
    devices: int = 4,
    partition: str = "iid",
    rounds: int | None = None,
    image_size: int | None = None,
    seed: int = 0,
    form: Form = "default",
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    folder: Path | str | None = None,
    quiet: bool = False,
) -> Simulation:
    """Tune with one real server and several real devices on this machine, over loopback.

    Args:
        data: ``digits``, ``fashion-mnist``, a folder with one folder of images per class, or a
            data set of pairs of an image and a label.
        devices: number of devices.
        partition: of the data between them: ``iid``, ``dirichlet:ALPHA``, ``shards:N``, ….
        rounds: of the run; None: those of the preset.
        image_size: side of the model's input, in pixels; None: that of the preset, or chosen by
            the images' size.
        seed: of the partition and of all random numbers.
        form: form of SFPrompt: ``default`` or ``paper``.
        settings: further settings, by section and name.
        folder: for results; None: runs/NAME-TIME.
        quiet: show no progress.

    Returns:
        The finished run.

    Raises:
        SFPromptError: the run failed.
        InvalidField: a setting or the data set is invalid.

    Example:
        >>> run = sfprompt.simulate("photos", devices=3)  # doctest: +SKIP
        >>> run.export("model.onnx")  # doctest: +SKIP
    """
    check_packages()
    scheme = parse_scheme(partition)
    with tempfile.TemporaryDirectory(prefix="sfprompt-images-") as images:
        if not isinstance(data, str | Path):
            data = write_images(data, Path(images) / "images")
        preset = choose_preset(str(data), form, image_size)
        federation = {"min_participants": devices, **({} if rounds is None else {"rounds": rounds})}
        changed = with_changes(
            preset.settings.model_copy(update={"seed": seed}), {"federation": federation}
        )
        changed = with_changes(changed, settings or {})
        out = make_run_folder(None if folder is None else Path(folder), changed.name)
        local = LocalRun(
            settings=changed,
            data=preset.data,
            devices=devices,
            partition=str(scheme),
            folder=out,
            limit_train=preset.limit_train,
            limit_test=preset.limit_test,
        )
        results, figures = local.execute(Console(quiet=quiet))
    write_files(results, figures, out)
    return Simulation(results, out)


def write_images(dataset: ImageDataset, folder: Path) -> Path:
    """Write a data set as PNG files, one folder for each class, without loss.

    Args:
        dataset: its images and labels.
        folder: to write; it must not exist.

    Returns:
        The folder.

    Raises:
        InvalidField: an image or a label is of another kind.
    """
    from sfprompt_bench.run.dataset_images import as_picture

    names = getattr(dataset, "classes", None)
    try:
        for position in range(len(dataset)):
            image, label = dataset[position]
            name = _class_name(names, label, position)
            target = folder / name / f"{position:07}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            as_picture(image, position).save(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _class_name(names: Sequence[str] | None, label: Any, position: int) -> str:
    try:
        number = int(label)
        name = str(number) if names is None else str(names[number])
    except (TypeError, ValueError, IndexError) as error:
        raise InvalidField(
            "a label is not the number of a class",
            field="data",
            limit=f"0 to {len(names) - 1}" if names else "an integer",
            value=f"{label!r} at position {position}",
        ) from error
    return name.replace("/", "-") or "unnamed"
