"""Tensors on disk: whole files or none, each named by the hash of its content."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from protocol.errors import NotFound
from protocol.messages import NEURONS, BlobRef
from protocol.plan import PromptPlacement
from split_model import is_server_side, state_bytes
from split_model.checkpoints.state import PROMPTS
from split_model.files import write_durably

log = logging.getLogger(__name__)


def from_folder(path: Path, data_dir: Path) -> str:
    """Where a file lies, told from the data folder on: that may be moved, or put back."""
    return str(path.relative_to(data_dir) if path.is_relative_to(data_dir) else path)


@dataclass(frozen=True)
class StateRefs:
    """A global state on disk: what devices take, and what never leaves the server.

    The latter are prompts at the cut or a tuned body, where there is one of them.
    """

    device: BlobRef
    server: BlobRef | None = None


@dataclass(frozen=True)
class RunFiles:
    """The files of one run.

    ``head.safetensors``, ``states/SHA256.safetensors`` (what devices have of the global states),
    ``held/SHA256.safetensors`` (what they do not, of the last two),
    ``updates/SHA256.safetensors`` (until their round is aggregated),
    ``moments/ROUND.safetensors`` (of a server optimiser, of the last two rounds) and, where the
    proxy is distilled again, ``neurons/ROUND``, ``proxies/ROUND`` and ``heads/ROUND.safetensors``
    (what the devices told in this round, and what came of it; of the last such round).
    """

    root: Path

    @property
    def head(self) -> Path:
        return self.root / "head.safetensors"

    def head_after(self, round_: int) -> Path:
        """The head file that this round made; 0: the run's first."""
        return self.root / "heads" / f"{round_}.safetensors" if round_ else self.head

    def proxy_after(self, round_: int) -> Path:
        """The weights of the proxy that this round made."""
        return self.root / "proxies" / f"{round_}.safetensors"

    def state(self, sha256: str) -> Path:
        return self.root / "states" / f"{sha256}.safetensors"

    def held(self, sha256: str) -> Path:
        return self.root / "held" / f"{sha256}.safetensors"

    def update(self, sha256: str) -> Path:
        return self.root / "updates" / f"{sha256}.safetensors"

    def write_state(self, tensors: Mapping[str, Tensor], prompt_at: PromptPlacement) -> StateRefs:
        """Store a global state where it acts; the same tensors always give the same references.

        Prompts at the cut and a tuned body are a file of their own that devices never see.
        """
        held = {name for name in tensors if is_server_side(name, prompt_at)}
        device = {name: tensor for name, tensor in tensors.items() if name not in held}
        server = {name: tensors[name] for name in held}
        return StateRefs(
            write_tensors(self.root / "states", device),
            write_tensors(self.root / "held", server) if server else None,
        )

    def delta(self, sha256: str, base: str) -> Path:
        """A frame that takes the state ``base`` to the one named first, as a device holds them."""
        return self.root / "states" / f"{sha256}.from.{base}.frame"

    def drop_deltas(self) -> None:
        """Remove the ways to earlier states: devices that need one take the file."""
        for path in (self.root / "states").glob("*.frame*"):
            path.unlink(missing_ok=True)

    def read_state(self, refs: StateRefs) -> dict[str, Tensor]:
        """A whole global state: what devices have of it, and what the server holds."""
        state = read_tensors(self.state(refs.device.sha256))
        if refs.server is not None:
            state |= read_tensors(self.held(refs.server.sha256))
        return state

    def read_moments(self, round_: int) -> dict[str, Tensor]:
        """What the server optimiser remembered after this round; nothing after round 0.

        Raises:
            NotFound: the file is gone.
        """
        if round_ == 0:
            return {}
        path = self._moments(round_)
        if not path.is_file():
            raise NotFound(
                "what the server optimiser remembered of the last round is gone",
                field="moments",
                value=path.name,
            )
        return read_tensors(path)

    def write_moments(self, round_: int, moments: Mapping[str, Tensor]) -> None:
        """Keep what the server optimiser remembers after this round, and after the one before.

        A server that is killed before the round's state counts makes that state again.
        """
        write_durably(self._moments(round_), state_bytes(moments))
        _keep(self._moments(round_).parent, (str(number) for number in (round_ - 1, round_)))

    def _moments(self, round_: int) -> Path:
        return self.root / "moments" / f"{round_}.safetensors"

    def read_neurons(self, round_: int) -> Tensor:
        """How often each neuron of the proxy's MLPs was inactive in this round, [L, H].

        Raises:
            NotFound: the file is gone.
        """
        path = self._neurons(round_)
        if not path.is_file():
            raise NotFound(
                "what the devices told of their neurons is gone", field=NEURONS, value=path.name
            )
        return read_tensors(path)[NEURONS]

    def write_neurons(self, round_: int, shares: Tensor) -> None:
        """Keep what `read_neurons` reads."""
        write_durably(self._neurons(round_), state_bytes({NEURONS: shares}))

    def _neurons(self, round_: int) -> Path:
        return self.root / "neurons" / f"{round_}.safetensors"

    def keep_renewed(self, round_: int) -> None:
        """Remove what earlier rounds than this have made of the proxy."""
        for folder in ("neurons", "proxies", "heads"):
            _keep(self.root / folder, [str(round_)])

    def write_update(self, tensors: dict[str, Tensor]) -> BlobRef:
        return write_tensors(self.root / "updates", tensors)

    def keep_updates(self, wanted: Iterable[str]) -> None:
        """Remove the files of all other updates, and what a crash has left half written."""
        _keep(self.root / "updates", wanted)

    def keep_held(self, wanted: Iterable[str]) -> None:
        """The same of what the server holds of global states: a body is large."""
        _keep(self.root / "held", wanted)

    def remove(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)


def _keep(folder: Path, wanted: Iterable[str]) -> None:
    names = {f"{name}.safetensors" for name in wanted}
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.name not in names:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:  # some systems keep a file that is being read
                log.warning("%s stays for now: %s", path.name, error)


def write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> BlobRef:
    """Write a safetensors file named by its hash, durable when this returns."""
    data = state_bytes(tensors)
    sha256 = hashlib.sha256(data).hexdigest()
    write_durably(folder / f"{sha256}.safetensors", data)
    return BlobRef(sha256=sha256, nbytes=len(data))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        names: list[str] = list(file.keys())
        return {name: torch.as_tensor(file.get_tensor(name)) for name in names}


@lru_cache(maxsize=64)
def read_prompts(path: Path) -> Tensor:
    """The prompts [L, P, D] of a global state's file, remembered: nobody may change them.

    Raises:
        OSError: the file is not there.
    """
    return read_tensors(path)[PROMPTS]
