"""What a device takes part in: limits of its owner, which no server can change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from protocol.errors import FieldValue, RefusedByDevice
from protocol.messages import BlobRef, RunView

DEFAULT_MIN_CUT = 1

DEFAULT_MAX_DOWNLOAD = 4 * 1024**3

DEFAULT_MAX_EPOCHS = 1000


@dataclass(frozen=True)
class DevicePolicy:
    """Limits that a run must keep, checked before anything of it is downloaded or computed.

    Attributes:
        min_cut: smallest number of blocks on the device. With 0, smashed data are embedded patches,
            from which images can be computed.
        max_download: largest size of head and global state together, in bytes.
        require_tls: whether the server's address must be https.
        backbones: allowed names of backbones; empty: all.
        max_epochs: most epochs of a round, of either kind, and most views of a sample.
    """

    min_cut: int = DEFAULT_MIN_CUT
    max_download: int = DEFAULT_MAX_DOWNLOAD
    require_tls: bool = False
    backbones: tuple[str, ...] = ()
    max_epochs: int = DEFAULT_MAX_EPOCHS

    def check_address(self, url: str) -> None:
        """Refuse an address without TLS, if the policy requires it.

        Raises:
            RefusedByDevice: the address is not https.
        """
        if self.require_tls and urlsplit(url).scheme.lower() != "https":
            raise RefusedByDevice(
                "this device takes part over TLS only",
                field="url",
                limit="https://…",
                value=url,
                hint="use the server's https address, or join without --require-tls",
            )

    def check_run(self, run: RunView) -> None:
        """Refuse a run whose settings or files are outside the limits.

        Raises:
            RefusedByDevice: names the first such field, its limit and its value.
        """
        for is_refused, field, limit, value, option in self._rows(run):
            if is_refused:
                raise RefusedByDevice(
                    "this device does not take part in such a run",
                    field=field,
                    limit=limit,
                    value=value,
                    hint=f"ask the operator for a run within the limit, or join with {option}",
                )
        self.check_download(run.head, run.state)

    def check_download(self, head: BlobRef, state: BlobRef) -> None:
        """Refuse files that are larger than the limit together.

        Raises:
            RefusedByDevice: they are.
        """
        nbytes = head.nbytes + state.nbytes
        if nbytes > self.max_download:
            raise RefusedByDevice(
                "this device does not download files of this size",
                field="head, state",
                limit=f"{self.max_download} bytes",
                value=f"{nbytes} bytes",
                hint="join with a larger --max-download, or ask the operator for a smaller model",
            )

    def describe(self) -> str:
        """Return the limits as one line for people."""
        backbones = ", ".join(self.backbones) or "every backbone"
        tls = "TLS only, " if self.require_tls else ""
        return (
            f"{tls}cut {self.min_cut} or more, {backbones}, downloads up to "
            f"{self.max_download / 1e6:,.0f} MB, up to {self.max_epochs} epochs a round"
        )

    def _rows(self, run: RunView) -> Iterator[tuple[bool, str, FieldValue, FieldValue, str]]:
        """Yield for each limit: whether it is broken, field, limit, value, and the option."""
        model, training = run.plan.model, run.plan.training
        most, option = f"at most {self.max_epochs}", "a larger --max-epochs"
        yield (
            model.cut < self.min_cut,
            "method.cut",
            f"at least {self.min_cut}",
            model.cut,
            "a smaller --min-cut",
        )
        yield (
            bool(self.backbones) and model.backbone not in self.backbones,
            "model.backbone",
            list(self.backbones),
            model.backbone,
            f"--backbone {model.backbone}",
        )
        for name, count in (
            ("method.local_epochs", training.local_epochs),
            ("method.split_epochs", training.split_epochs),
            ("training.views", training.views if training.augment else 0),
        ):
            yield count > self.max_epochs, name, most, count, option
