"""The public names of SFPrompt for programs.

    import sfprompt

    run = sfprompt.simulate("photos", devices=3)
    run.export("model.safetensors")
    model = sfprompt.load_exported("model.safetensors")
    settings = sfprompt.RunSettings(method={"name": "sfprompt", "prompt_count": 5})

A name is imported when it is first used: `import sfprompt` alone loads neither torch nor FastAPI,
and a device needs no server packages.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_client.participant import Participant as Participant
    from protocol.errors import SFPromptError as SFPromptError
    from protocol.method import MethodSettings as MethodSettings
    from protocol.method import register as register
    from protocol.settings import RunSettings as RunSettings
    from sfprompt_bench.run.simulation import Simulation as Simulation
    from sfprompt_bench.run.simulation import simulate as simulate
    from split_model.checkpoints.export import TunedModel as TunedModel
    from split_model.checkpoints.export import load_exported as load_exported
    from split_server.app import SplitServer as SplitServer
    from split_server.app import create_app as create_app
    from split_server.client import OperatorClient as OperatorClient
    from split_server.settings import ServerSettings as ServerSettings

__version__ = version("sfprompt")

_MODULES = {
    "MethodSettings": "protocol.method",
    "OperatorClient": "split_server.client",
    "Participant": "edge_client.participant",
    "RunSettings": "protocol.settings",
    "SFPromptError": "protocol.errors",
    "ServerSettings": "split_server.settings",
    "Simulation": "sfprompt_bench.run.simulation",
    "SplitServer": "split_server.app",
    "TunedModel": "split_model.checkpoints.export",
    "create_app": "split_server.app",
    "load_exported": "split_model.checkpoints.export",
    "register": "protocol.method",
    "simulate": "sfprompt_bench.run.simulation",
}

__all__ = sorted([*_MODULES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'sfprompt' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
