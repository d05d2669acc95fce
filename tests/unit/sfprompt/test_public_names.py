"""The public names of the package."""

import subprocess
import sys

import sfprompt

PUBLIC = [
    "MethodSettings",
    "OperatorClient",
    "Participant",
    "RunSettings",
    "SFPromptError",
    "ServerSettings",
    "Simulation",
    "SplitServer",
    "TunedModel",
    "__version__",
    "create_app",
    "load_exported",
    "register",
    "simulate",
]


def test_the_package_exports_exactly_these_names() -> None:
    assert sfprompt.__all__ == PUBLIC == sorted(PUBLIC)
    assert dir(sfprompt) == PUBLIC
    assert all(getattr(sfprompt, name) is not None for name in PUBLIC)


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(sfprompt, "no_such_name")


def test_importing_the_package_alone_loads_no_heavy_library() -> None:
    code = (
        "import sfprompt, sys; print({'torch', 'timm', 'fastapi', 'sqlalchemy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
