"""Bytes of codecs for smashed data, and the error that they cause: prints a table.

    python -m sfprompt_bench.micro.smashed_codecs DATA [--image-size 42] [--samples 150]
        [--codec klt:1]

DATA is as in ``edge-client join``; repeat --samples and --codec for more rows. The samples of a row
are encoded together, as a device uploads them. *Error* is the norm of the error over that of the
smashed data less the mean of each position. *Cosine* is that of the last block's class tokens,
of the frozen model without prompts, from decoded and from exact smashed data: its mean.
"""

from __future__ import annotations

import sys
from typing import Annotated

import torch
import typer
from torch import Tensor
from torch.nn import functional as F

from edge_client.data.batches import BatchReader, Preprocessing
from edge_client.data.download import cache_dir
from edge_client.data.sources import load_dataset
from edge_client.torch_model import read
from protocol.codecs import get_codec
from protocol.plan import ModelPlan
from split_model.backbone.weights import open_backbone, prepare_backbone
from split_model.checkpoints.metadata import image_preparation
from split_model.parts.build import build_body, build_head

_BATCH = 16  # images in one pass

_CODECS = ["int4+zstd", "klt:0.5", "klt:1", "klt:2"]


class _Model:
    """Head and body of the packaged backbone, and the images of one set."""

    def __init__(self, image_size: int, data: str) -> None:
        plan = ModelPlan(image_size=image_size, cut=1, prompt_count=0)
        backbone = prepare_backbone(plan, "packaged", cache_dir() / "backbones")
        tensors = open_backbone(backbone.path)
        self._head = build_head(plan, tensors).eval()
        self._body = build_body(plan, tensors).eval()
        recorded = image_preparation(plan)
        preparation = Preprocessing(image_size, recorded.mean, recorded.std)
        self._images = BatchReader(load_dataset(data, seed=0).train, preparation)

    @torch.no_grad()
    def smashed(self, samples: int) -> Tensor:
        """Compute the smashed data [samples, T, D] of images in a random order."""
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(self._images), generator=generator)[:samples]
        batches = [read(self._images, part.numpy())[0] for part in order.split(_BATCH)]
        return torch.cat([self._head(batch) for batch in batches])

    @torch.no_grad()
    def class_tokens(self, smashed: Tensor) -> Tensor:
        """Compute the final class tokens [B, D] of smashed data."""
        parts = [self._body(part, num_tokens=1)[:, 0] for part in smashed.split(_BATCH)]
        return torch.cat(parts)


def _row(model: _Model, smashed: Tensor, expected: Tensor, name: str) -> str:
    """Measure one codec."""
    codec = get_codec(name)
    buffers = codec.encode(smashed)
    decoded = codec.decode(buffers, smashed.shape).to(torch.float32)
    nbytes = sum(buffer.nbytes for buffer in buffers)
    error = float((decoded - smashed).norm() / (smashed - smashed.mean(0)).norm())
    cosine = float(F.cosine_similarity(model.class_tokens(decoded), expected).mean())
    return (
        f"{len(smashed):8}  {name:12}{nbytes / len(smashed):14.0f}"
        f"{8 * nbytes / smashed.numel():14.2f}{error:10.3f}{cosine:10.4f}\n"
    )


def main(
    data: Annotated[str, typer.Argument(help="A set of images, as in edge-client join.")],
    image_size: Annotated[int, typer.Option(help="Pixels a side.")] = 42,
    samples: Annotated[list[int] | None, typer.Option(help="Encoded together.")] = None,
    codec: Annotated[list[str] | None, typer.Option(help="Name of a codec.")] = None,
) -> None:
    """Print a row for each number of samples and each codec."""
    torch.set_num_threads(1)
    model, counts = _Model(image_size, data), samples or [15, 150]
    every = model.smashed(max(counts))
    expected = model.class_tokens(every)
    sys.stdout.write(
        f"{'samples':>8}  {'codec':12}{'bytes/sample':>14}{'bits/value':>14}{'error':>10}"
        f"{'cosine':>10}\n"
    )
    for count in counts:
        for name in codec or _CODECS:
            sys.stdout.write(_row(model, every[:count], expected[:count], name))
            sys.stdout.flush()


if __name__ == "__main__":
    typer.run(main)
