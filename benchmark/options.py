"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from split_server.settings import DType

BodyType = Annotated[
    DType,
    typer.Option(
        help="What the body computes in; auto: float32 on a CPU. One with instructions for "
        "bfloat16 takes half as long in it."
    ),
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures here.")]
