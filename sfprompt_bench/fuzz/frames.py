"""Decode mutated frames and messages in this process; anything but a typed error is a finding."""

from __future__ import annotations

import json
import os
import random
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

from protocol.base import Message
from protocol.errors import Busy, SFPromptError, error_from_wire
from protocol.frames import decode_frame
from protocol.limits import FrameLimits
from protocol.messages import parse_message
from sfprompt_bench.fuzz.corpus import METAS, valid_error, valid_frames, valid_messages
from sfprompt_bench.fuzz.findings import Report, last_frames
from sfprompt_bench.fuzz.mutations import mutated_bytes, mutated_frame, mutated_tree

_MIB: Final = 1024 * 1024

_LIMITS: Final = FrameLimits(max_frame_bytes=_MIB, max_elements=_MIB)

_DECODED_BYTES: Final = 8 * _MIB  # for one frame: the meter refuses more

_MEMORY_BYTES: Final = 32 * _MIB  # by which the process may grow, in one frame and in all of them

_INPUT_S: Final = 0.25  # CPU time of one input

_MESSAGES: Final = 0.25  # share of messages among all inputs

_WARM_UP: Final = 300  # inputs before memory is measured

_TICK: Final = 1000  # inputs between two looks at memory and progress


def fuzz_frames(count: int, seed: int, tick: Callable[[int], None]) -> Report:
    """Decode mutated frames and parse mutated messages.

    Args:
        count: of inputs.
        seed: of the first input; each further input has the next number.
        tick: is called with the number of inputs done.
    """
    report = Report("Frames and messages", "inputs", memory_limit=_MEMORY_BYTES)
    valid_frames(), valid_messages(), valid_error()
    for warm in range(_WARM_UP):  # libraries take their memory at their first use
        _try(warm, Report("", ""))
    _forget_peak()
    began, descriptors = time.perf_counter(), _descriptors()
    memory = peak = _peak_bytes()
    for number in range(count):
        took = _try(seed + number, report)
        report.time(seed + number, took)
        if took > _INPUT_S:
            report.add(seed + number, "an input", f"took {took:.2f} s, limit {_INPUT_S} s")
        if (now := _peak_bytes()) > peak:
            if now - peak > _MEMORY_BYTES:
                report.add(seed + number, "an input", f"took {(now - peak) / _MIB:.0f} MiB")
            peak = now
        if number % _TICK == 0:
            tick(number)
            if report.is_full:
                break
    report.seconds = time.perf_counter() - began
    report.memory_bytes, report.descriptors = peak - memory, _descriptors() - descriptors
    if report.memory_bytes > _MEMORY_BYTES:
        report.add(seed, "all inputs", "took more memory than the limit")
    if report.descriptors > 0:
        report.add(seed, "all inputs", "left descriptors open")
    tick(count)
    return report


def _try(seed: int, report: Report) -> float:
    """Decode one mutated input, note what happened, and return the CPU seconds of the decoder."""
    name, decode = _make_input(random.Random(seed))  # noqa: S311 - nothing secret
    began = time.thread_time()
    try:
        outcome = decode()
    except SFPromptError as error:
        outcome = error.code
        try:
            json.dumps(error.to_wire(), allow_nan=False, ensure_ascii=False).encode()
            str(error)
        except Exception as broken:
            report.add(seed, name, f"an error that cannot be sent: {last_frames(broken)}")
    except Exception as error:
        outcome = "exception"
        report.add(seed, name, last_frames(error))
    took = time.thread_time() - began
    report.outcomes[outcome] += 1
    return took


def _make_input(draws: random.Random) -> tuple[str, Callable[[], str]]:
    """Make a mutated frame, message or error, and what decodes it."""
    if draws.random() >= _MESSAGES:
        valid = draws.choice(valid_frames())
        data = mutated_frame(valid.data, draws)
        if draws.random() < 0.1 and _is_valid(data):
            data = mutated_frame(bytes(data), draws)
        content = bytes(data) if draws.random() < 0.2 else data
        return f"a frame {valid.kind} of {valid.codecs}", partial(_decode, content)
    if draws.random() < 0.1:
        status = draws.randrange(200, 600)
        return "an error", partial(_parse_error, _mutated_json(valid_error(), draws), status)
    message_type, text = draws.choice(valid_messages())
    return f"a {message_type.__name__}", partial(_parse, message_type, _mutated_json(text, draws))


def _decode(data: bytes | bytearray) -> str:
    """Decode a frame, its tensors and its meta."""
    frame = decode_frame(data, _LIMITS, _meter())
    for name, tensor in frame.tensors().items():
        if tuple(tensor.shape) != frame.spec(name).shape:
            raise AssertionError(f"{name}: {tuple(tensor.shape)}, not {frame.spec(name).shape}")
    message_type = METAS.get(frame.kind, (None, {}))[0]
    if message_type is not None:
        parse_message(message_type, dict(frame.meta))
    return "decoded"


def _is_valid(data: bytearray) -> bool:
    try:
        decode_frame(data, _LIMITS)
    except SFPromptError:
        return False
    return True


def _meter() -> Callable[[int], None]:
    taken = 0

    def take(nbytes: int) -> None:
        nonlocal taken
        taken += nbytes
        if taken > _DECODED_BYTES:
            raise Busy("the frame decodes to too much", limit=_DECODED_BYTES, value=taken)

    return take


def _parse(message_type: type[Message], text: bytes) -> str:
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError):
        return "no JSON"
    parse_message(message_type, raw).model_dump_json()
    return "parsed"


def _parse_error(text: bytes, status: int) -> str:
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError):
        return "no JSON"
    json.dumps(error_from_wire(raw, status).to_wire(), allow_nan=False)
    return "parsed"


def _mutated_json(valid: str, draws: random.Random) -> bytes:
    if draws.random() < 0.2:
        return bytes(mutated_bytes(valid.encode(), draws))
    return json.dumps(mutated_tree(json.loads(valid), draws)).encode()


def _peak_bytes() -> int:
    """The largest resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _forget_peak() -> None:
    """Let the peak begin at the present resident memory, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _descriptors() -> int:
    folder = Path("/proc/self/fd")
    return len(os.listdir(folder)) if folder.is_dir() else 0
