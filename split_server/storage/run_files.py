"""A run's tensors on disk, in files that are written whole or not at all."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from protocol.errors import NotFound
from protocol.messages import BlobRef
from protocol.plan import PromptPlacement
from split_model.checkpoints.state import PROMPTS, is_server_side
from split_server.storage.tensor_files import read_tensors, write_named_tensors, write_tensors

log = logging.getLogger(__name__)

TAIL_WEIGHT, TAIL_BIAS = "tail.head.weight", "tail.head.bias"  # of a linear tail, in a state


def relative_to_data_dir(path: Path, data_dir: Path) -> str:
    """Return a path relative to the data folder, which may be moved or restored elsewhere."""
    return str(path.relative_to(data_dir) if path.is_relative_to(data_dir) else path)


@dataclass(frozen=True)
class StateRefs:
    """The files of a global state.

    Attributes:
        device: the device-side state, which devices download.
        server: the server-side state, which never leaves the server: prompts at the cut or a tuned
            body; None: the run has neither.
    """

    device: BlobRef
    server: BlobRef | None = None


@dataclass(frozen=True)
class RunFiles:
    """The files of one run, in its folder ``root``:

    - ``head.safetensors``: the first head.
    - ``states/SHA256.safetensors``: device-side states, of all rounds.
    - ``states/SHA256.from.SHA256.frame``: the change from one device-side state to the next.
    - ``held/SHA256.safetensors``: server-side states, of the last two rounds.
    - ``updates/SHA256.safetensors``: updates, until their round is aggregated.
    - ``basis/ATTEMPT.safetensors``: the result of round 0, if the run has one.
    - ``known/ATTEMPT-PARTICIPANT.safetensors``: features and sums of a participant's samples, which
      its later updates are checked against, until the run is over.
    - ``labels/PARTICIPANT.safetensors``: ids and labels of its samples, where labels are shared;
      ``labels/ATTEMPT-PARTICIPANT.safetensors``: what the server has computed of them since that
      attempt at round 0; until the run is over.
    - ``moments/ROUND.safetensors``: a server optimiser's moments, of the last two rounds.
    - ``extras/ROUND``, ``weights/ROUND`` and ``heads/ROUND.safetensors``: of the last round after
      which the model was rebuilt, the updates' further tensors and the resulting weights.
    """

    root: Path

    @property
    def head(self) -> Path:
        return self.root / "head.safetensors"

    def head_after(self, round_: int) -> Path:
        """Return the path of the head made after this round; 0: the run's first head."""
        return self.root / "heads" / f"{round_}.safetensors" if round_ else self.head

    def weights_after(self, round_: int) -> Path:
        """Return the path of the model's weights made after this round."""
        return self.root / "weights" / f"{round_}.safetensors"

    def basis(self, attempt: int) -> Path:
        """Return the path of the result of an attempt at round 0: basis and classifier."""
        return self.root / "basis" / f"{attempt}.safetensors"

    def known(self, attempt: int, participant: str) -> Path:
        """Return the path of a participant's features and sums in an attempt at round 0."""
        return self.root / "known" / f"{attempt}-{participant}.safetensors"

    def drop_known(self) -> None:
        """Remove all participants' features, sums and labels."""
        shutil.rmtree(self.root / "known", ignore_errors=True)
        shutil.rmtree(self.root / "labels", ignore_errors=True)

    def labels(self, participant: str) -> Path:
        """Return the path of a participant's ids and labels."""
        return self.root / "labels" / f"{participant}.safetensors"

    def measured(self, attempt: int, participant: str) -> Path:
        """Return the path of what the server has computed for a participant since round 0."""
        return self.root / "labels" / f"{attempt}-{participant}.safetensors"

    def drop_labels(self, participant: str) -> None:
        """Remove what the server has of a participant's labels and of its features."""
        for folder in ("labels", "known"):
            for path in (self.root / folder).glob(f"*-{participant}.safetensors"):
                path.unlink(missing_ok=True)
        self.labels(participant).unlink(missing_ok=True)

    def state(self, sha256: str) -> Path:
        """Return the path of a device-side state."""
        return self.root / "states" / f"{sha256}.safetensors"

    def server_state(self, sha256: str) -> Path:
        """Return the path of a server-side state."""
        return self.root / "held" / f"{sha256}.safetensors"

    def update(self, sha256: str) -> Path:
        """Return the path of an update."""
        return self.root / "updates" / f"{sha256}.safetensors"

    def write_state(self, tensors: Mapping[str, Tensor], prompt_at: PromptPlacement) -> StateRefs:
        """Write a global state: its device side and its server side.

        Equal tensors always give equal references.
        """
        server = {name: t for name, t in tensors.items() if is_server_side(name, prompt_at)}
        device = {name: tensor for name, tensor in tensors.items() if name not in server}
        return StateRefs(
            write_tensors(self.root / "states", device),
            write_tensors(self.root / "held", server) if server else None,
        )

    def delta(self, sha256: str, base: str) -> Path:
        """Return the path of the change from device-side state ``base`` to another state."""
        return self.root / "states" / f"{sha256}.from.{base}.frame"

    def drop_deltas(self) -> None:
        """Remove all changes between states; devices download the whole state instead."""
        for path in (self.root / "states").glob("*.frame*"):
            path.unlink(missing_ok=True)

    def read_state(self, refs: StateRefs) -> dict[str, Tensor]:
        """Read a global state, both sides of it."""
        state = read_tensors(self.state(refs.device.sha256))
        if refs.server is not None:
            state |= read_tensors(self.server_state(refs.server.sha256))
        return state

    def read_moments(self, round_: int) -> dict[str, Tensor]:
        """Read the server optimiser's moments after this round; none after round 0.

        Raises:
            NotFound: the file is gone.
        """
        if round_ == 0:
            return {}
        path = self._moments(round_)
        if not path.is_file():
            raise NotFound(
                "the server optimiser's moments of the last round are missing",
                field="moments",
                value=path.name,
            )
        return read_tensors(path)

    def write_moments(self, round_: int, moments: Mapping[str, Tensor]) -> None:
        """Write the server optimiser's moments after this round; keep those of the round before.

        A server killed before it commits the round's state makes that state again from them.
        """
        write_named_tensors(self._moments(round_), moments)
        _prune(self._moments(round_).parent, (str(number) for number in (round_ - 1, round_)))

    def _moments(self, round_: int) -> Path:
        return self.root / "moments" / f"{round_}.safetensors"

    def read_extras(self, round_: int) -> dict[str, Tensor]:
        """Read the mean of the further tensors that this round's updates carried.

        Raises:
            NotFound: the file is gone.
        """
        path = self._extras(round_)
        if not path.is_file():
            raise NotFound(
                "the means of the updates' further tensors are missing",
                field="extras",
                value=path.name,
            )
        return read_tensors(path)

    def write_extras(self, round_: int, tensors: Mapping[str, Tensor]) -> None:
        """Write what `read_extras` reads."""
        write_named_tensors(self._extras(round_), tensors)

    def _extras(self, round_: int) -> Path:
        return self.root / "extras" / f"{round_}.safetensors"

    def prune_rebuilt(self, round_: int) -> None:
        """Remove the further tensors, weights and heads of all other rounds."""
        for folder in ("extras", "weights", "heads"):
            _prune(self.root / folder, [str(round_)])

    def write_update(self, tensors: dict[str, Tensor]) -> BlobRef:
        return write_tensors(self.root / "updates", tensors)

    def prune_updates(self, wanted: Iterable[str]) -> None:
        """Remove the files of all other updates, and files left unfinished by a crash."""
        _prune(self.root / "updates", wanted)

    def prune_server_states(self, wanted: Iterable[str]) -> None:
        """Remove all other server-side states, since a body is large."""
        _prune(self.root / "held", wanted)

    def sweep_temporary(self) -> None:
        """Remove what a killed server had not finished writing."""
        for path in self.root.rglob(".*.tmp"):
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the run's folder."""
        shutil.rmtree(self.root, ignore_errors=True)


def _prune(folder: Path, wanted: Iterable[str]) -> None:
    names = {f"{name}.safetensors" for name in wanted}
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.name not in names:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:  # some systems do not remove a file that is open
                log.warning("%s could not be removed yet: %s", path.name, error)


@lru_cache(maxsize=64)
def read_prompts(path: Path) -> Tensor:
    """Read the prompts [L, P, D] of a server-side state. Cached: callers must not change them.

    Raises:
        OSError: the file cannot be read.
    """
    return read_tensors(path)[PROMPTS]


@lru_cache(maxsize=64)
def read_linear_tail(path: Path, device: torch.device) -> tuple[Tensor, Tensor]:
    """Read weight [C, r] and bias [C] of a linear tail from a device-side state. Cached.

    Raises:
        OSError: the file cannot be read.
    """
    tensors = read_tensors(path)
    return tensors[TAIL_WEIGHT].to(device), tensors[TAIL_BIAS].to(device)
