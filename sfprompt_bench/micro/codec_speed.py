"""Time of each codec on one CPU core, in copies of the same tensor: prints a table.

    OMP_NUM_THREADS=1 python -m sfprompt_bench.micro.codec_speed [CODEC ...]

The tensor is smashed data of 64 samples, 64 tokens and a width of 384 (6.3 MB in float32). A copy
precedes each call, so that a busy machine slows both down; the table has the medians.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch

from protocol.codec_names import FLOAT_CODECS
from protocol.codecs import get_codec

SHAPE = (64, 64, 384)

SECONDS = 1.5  # of each measurement

EXAMPLES = {"topk:F": "topk:0.05", "cosine:S": "cosine:4", "svd:E": "svd:0.9", "klt:Q": "klt:1"}


def time_in_copies(call: Callable[[], object], tensor: torch.Tensor) -> tuple[float, float]:
    """Measure the median time of ``call``, in copies of ``tensor`` and in seconds."""
    copy_seconds: list[float] = []
    call_seconds: list[float] = []
    for _ in range(3):  # warms up
        tensor.clone()
        call()
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(call_seconds) < 3:
        start = time.perf_counter()
        tensor.clone()
        copied = time.perf_counter()
        call()
        call_seconds.append(time.perf_counter() - copied)
        copy_seconds.append(copied - start)
    seconds = statistics.median(call_seconds)
    return seconds / statistics.median(copy_seconds), seconds


def table_row(name: str, tensor: torch.Tensor, generator: torch.Generator) -> str:
    """Measure a codec: its ratio, its relative error, and its times in copies of the tensor."""
    codec = get_codec(name)
    buffers = codec.encode(tensor)
    decoded = codec.decode(buffers, tensor.shape)
    nbytes = sum(buffer.nbytes for buffer in buffers)
    encode, seconds = time_in_copies(lambda: codec.encode(tensor), tensor)
    stochastic, _ = time_in_copies(lambda: codec.encode(tensor, generator), tensor)
    decode, _ = time_in_copies(lambda: codec.decode(buffers, tensor.shape), tensor)
    error = float((decoded.float() - tensor).norm() / tensor.norm())
    return (
        f"{name:14}{4 * tensor.numel() / nbytes:8.2f}{error:10.4f}"
        f"{encode:10.2f}{stochastic:12.2f}{decode:10.2f}{seconds * 1e3:12.1f}\n"
    )


def main() -> None:
    """Print a row for each codec."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    tensor = torch.randn(SHAPE, generator=generator)
    names = [EXAMPLES.get(name, name) for name in FLOAT_CODECS]
    sys.stdout.write(
        f"{'':14}{'ratio':>8}{'error':>10}{'encode':>10}{'at random':>12}{'decode':>10}"
        f"{'encode':>12}\n{'':14}{'':>8}{'relative':>10}{'copies':>10}{'copies':>12}"
        f"{'copies':>10}{'ms':>12}\n"
    )
    for name in sys.argv[1:] or names:
        sys.stdout.write(table_row(name, tensor, generator))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
