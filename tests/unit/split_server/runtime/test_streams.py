"""Codecs and the body on separate streams of one GPU give a CPU's results."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from protocol.codecs import get_codec
from split_server.engine.api import BackwardJob, ForwardJob, InferJob, StepKey
from split_server.runtime.device import SideStreams, choose_placement, used_here
from tests.support.engine import engines, input_body
from tests.support.federation import smashed

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA on this machine")

EXACT = ["float32", "float16", "bfloat16"]

NEAR = ["int8", "int4", "int4-asym", "int8+zstd", "topk:0.25", "cosine:4", "svd:0.99", "pq"]

NEAR += ["klt:0.25"]

STEPS = 40


def numbers(*shape: int) -> Tensor:
    """Return a tensor of low rank, so that a factorisation pays."""
    draw = torch.Generator().manual_seed(0)
    rows, width = shape[:-1], shape[-1]
    return torch.randn(*rows, 3, generator=draw) @ torch.randn(3, width, generator=draw)


@pytest.mark.parametrize("name", EXACT + NEAR)
def test_a_gpu_decodes_a_cpus_encoding(name: str) -> None:
    codec, tensor = get_codec(name), numbers(4, 6, 192)
    buffers = codec.encode(tensor)
    found = codec.decode(buffers, tensor.shape, "cuda")
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), codec.decode(buffers, tensor.shape))


@pytest.mark.parametrize("name", EXACT + NEAR)
def test_a_cpu_decodes_a_gpus_encoding(name: str) -> None:
    codec, tensor = get_codec(name), numbers(4, 6, 192)
    found = codec.decode(codec.encode(tensor.cuda()), tensor.shape)
    own = codec.decode(codec.encode(tensor), tensor.shape)
    error = float((own - tensor).norm())  # a value may round to the other code, at no larger error
    assert float((found - tensor).norm()) == pytest.approx(error, rel=0.01, abs=1e-6)


def test_decoding_during_a_computation_changes_no_results(tmp_path: Path) -> None:
    key, gpu = input_body(tmp_path), choose_placement("cuda", "float32")
    streams, codec = SideStreams(gpu.device), get_codec("float32")
    inputs = [smashed(batch=8, seed=seed) for seed in range(STEPS)]

    def read(tensor: Tensor) -> Tensor:
        with streams.use():
            return codec.decode(codec.encode(tensor), tensor.shape, gpu.device)

    def write(tensor: Tensor) -> Tensor:
        with streams.use():
            return codec.decode(codec.encode(used_here(tensor)), tensor.shape)

    async def all_steps(threads: ThreadPoolExecutor) -> Sequence[Tensor]:
        loop = asyncio.get_running_loop()

        async def one(number: int) -> Tensor:
            step = StepKey("r1", f"p{number}", "s")
            sent = await loop.run_in_executor(threads, read, inputs[number])
            features = await engine.submit(ForwardJob(step, key, sent, 1))
            sent = await loop.run_in_executor(threads, read, torch.ones(features.shape))
            result = await engine.submit(BackwardJob(step, key, sent, 2))
            return await loop.run_in_executor(threads, write, result)

        return await asyncio.gather(*map(one, range(STEPS)))

    with engines(gpu) as make, ThreadPoolExecutor(4) as threads:
        engine = make()
        found = asyncio.run(all_steps(threads))
    with engines(replace(gpu, device=torch.device("cpu"))) as make:
        engine = make()
        for number, gradients in enumerate(found):
            step = StepKey("r1", "p1", str(number))
            job = ForwardJob(step, key, inputs[number], 1)
            features = asyncio.run(engine.submit(job))
            last = BackwardJob(step, key, torch.ones_like(features), 2)
            expected = asyncio.run(engine.submit(last))
            torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-4)


def test_an_inference_in_parts_is_complete_when_it_is_encoded(tmp_path: Path) -> None:
    key, gpu = input_body(tmp_path), choose_placement("cuda", "float32")
    streams, codec, sent = SideStreams(gpu.device), get_codec("float32"), smashed(batch=64)
    job = InferJob("r1", "p1", key, sent)

    async def infer(times: int) -> list[Tensor]:
        return [await engine.infer(job) for _ in range(times)]

    with engines(gpu) as make:
        engine = make()
        engine._full_tokens = 4 * job.tokens
        answers = asyncio.run(infer(STEPS))
        with streams.use():
            found = [codec.decode(codec.encode(used_here(one)), one.shape) for one in answers]
    with engines(replace(gpu, device=torch.device("cpu"))) as make:
        engine = make()
        (expected,) = asyncio.run(infer(1))
    for one in found:
        torch.testing.assert_close(one, expected, rtol=1e-3, atol=1e-4)
