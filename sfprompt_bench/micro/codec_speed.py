"""What each codec costs on one CPU core, beside a copy of the same tensor: prints a table.

    OMP_NUM_THREADS=1 python -m tests.performance.codec_speed [CODEC ...]

Smashed data of 64 samples, 64 tokens and a width of 384 (6.3 MB in float32). Every copy is taken
right beside the call that it is compared with, so that a busy machine slows both; medians of both.
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

SECONDS = 1.5  # for each figure

EXAMPLES = {"topk:F": "topk:0.05", "cosine:S": "cosine:4", "svd:E": "svd:0.9"}


def in_copies(work: Callable[[], object], tensor: torch.Tensor) -> tuple[float, float]:
    """Median time of ``work``, in copies of ``tensor`` and in seconds."""
    copies: list[float] = []
    works: list[float] = []
    for _ in range(3):
        tensor.clone()
        work()
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(works) < 3:
        start = time.perf_counter()
        tensor.clone()
        middle = time.perf_counter()
        work()
        works.append(time.perf_counter() - middle)
        copies.append(middle - start)
    took = statistics.median(works)
    return took / statistics.median(copies), took


def line(name: str, tensor: torch.Tensor, generator: torch.Generator) -> str:
    """One row: the codec's name, its ratio, and its time in copies of the tensor."""
    codec = get_codec(name)
    buffers = codec.encode(tensor)
    back = codec.decode(buffers, tensor.shape)
    nbytes = sum(buffer.nbytes for buffer in buffers)
    encode, seconds = in_copies(lambda: codec.encode(tensor), tensor)
    at_random, _ = in_copies(lambda: codec.encode(tensor, generator), tensor)
    decode, _ = in_copies(lambda: codec.decode(buffers, tensor.shape), tensor)
    error = float((back.float() - tensor).norm() / tensor.norm())
    return (
        f"{name:14}{4 * tensor.numel() / nbytes:8.2f}{error:10.4f}"
        f"{encode:10.2f}{at_random:12.2f}{decode:10.2f}{seconds * 1e3:12.1f}\n"
    )


def main() -> None:
    """Time every codec and print a row for each."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    tensor = torch.randn(SHAPE, generator=generator)
    plain = [EXAMPLES.get(name, name) for name in FLOAT_CODECS]
    sys.stdout.write(
        f"{'':14}{'ratio':>8}{'error':>10}{'encode':>10}{'at random':>12}{'decode':>10}"
        f"{'encode':>12}\n{'':14}{'':>8}{'relative':>10}{'copies':>10}{'copies':>12}"
        f"{'copies':>10}{'ms':>12}\n"
    )
    for name in sys.argv[1:] or plain:
        sys.stdout.write(line(name, tensor, generator))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
