"""Structured mutations of bytes, of trees of JSON or msgpack, and of frames."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import Any, Final

import msgpack
from xxhash import xxh3_64_intdigest

from protocol.codecs import get_codec
from protocol.errors import SFPromptError
from protocol.frames import ALIGNMENT, MAGIC, PREFIX_BYTES
from sfprompt_bench.fuzz.corpus import CODECS

_CHECKSUM_AT: Final = 20

_RESEALED: Final = 0.8  # share of frames whose checksum fits their mutation

_NUMBERS: Final = (
    0,
    1,
    -1,
    2,
    7,
    64,
    127,
    128,
    255,
    256,
    65_535,
    65_536,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**53 - 1,
    2**53,
    2**63 - 1,
    2**63,
    2**64 - 1,
    -(2**63),
)

_FLOATS: Final = (0.5, -0.0, 1e-320, 3.4e38, 1e39, 1e308, float("inf"), float("-inf"), float("nan"))

_TEXTS: Final = (
    "",
    "a",
    "\x00",
    "\n\x1b[2J",
    "a" * 257,
    "é" * 200,
    "\U0001f600",
    "\ud800",
    "../../secret",
    "%2e%2e/",
    "1e999",
    "NaN",
    "-1",
    "null",
    "smashed",
    "tail.head.weight",
)

_BYTES_OF_FLOATS: Final = (
    *(
        struct.pack(form, number)
        for form in ("<f", "<d", "<e")
        for number in (0.0, -0.0, 1.0, float("inf"), float("-inf"), float("nan"))
    ),
    *(struct.pack("<f", number) for number in (3.4e38, 1e-45)),
    *(b"\x80\x7f", b"\x80\xff", b"\xc0\x7f"),
)

_MAX_BYTES: Final = 64 * 1024  # of a payload that is made up


def resealed(data: bytearray) -> bytearray:
    """Write the checksum that fits a frame's bytes."""
    if len(data) >= PREFIX_BYTES:
        digest = xxh3_64_intdigest(bytes(data[:_CHECKSUM_AT]) + bytes(data[PREFIX_BYTES:]))
        struct.pack_into("<Q", data, _CHECKSUM_AT, digest)
    return data


def mutated_bytes(data: bytes | bytearray, draws: random.Random, begin: int = 0) -> bytearray:
    """Change one to four places of some bytes, from ``begin`` on."""
    changed = bytearray(data)
    for _ in range(draws.randint(1, 4)):
        if len(changed) <= begin:
            return changed
        _change_place(changed, draws.randrange(begin, len(changed)), draws)
    return changed


def _change_place(data: bytearray, place: int, draws: random.Random) -> None:
    action = draws.randrange(9)
    length = min(draws.choice((1, 2, 4, 8, 64)), len(data) - place)
    if action == 0:
        data[place] ^= 1 << draws.randrange(8)
    elif action == 1:
        data[place] = draws.randrange(256)
    elif action == 2:
        del data[place:]
    elif action == 3:
        data[place:place] = draws.randbytes(length)
    elif action == 4:
        del data[place : place + length]
    elif action == 5:
        data[place:place] = data[place : place + length]
    elif action == 6:
        data[place : place + length] = draws.choice((b"\x00", b"\xff")) * length
    elif action == 7:
        number = draws.choice(_NUMBERS) % 2**64
        size = draws.choice((1, 2, 4, 8))
        order = draws.choice(("little", "big"))
        whole = (number % 2 ** (8 * size)).to_bytes(size, order)
        data[place : place + size] = whole[: len(data) - place]
    else:
        plain = draws.choice(_BYTES_OF_FLOATS)
        data[place : place + len(plain)] = plain[: len(data) - place]


def mutated_tree(tree: Any, draws: random.Random) -> Any:
    """Change one to three nodes of a tree of maps and lists, which becomes the changed one."""
    for _ in range(draws.randint(1, 3)):
        places: list[tuple[Any, Any]] = []
        _collect(tree, places)
        if not places:
            return _value(draws)
        parent, key = draws.choice(places)
        _change_node(parent, key, draws)
    return tree


def _collect(node: Any, places: list[tuple[Any, Any]]) -> None:
    """List all nodes below a node, as their parent and key or index."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, child in items:
        places.append((node, key))
        if isinstance(child, (dict, list)):
            _collect(child, places)


def _change_node(parent: Any, key: Any, draws: random.Random) -> None:
    action = draws.randrange(6)
    child = parent[key]
    if action == 0:
        del parent[key]
    elif action == 1 and isinstance(parent, dict):
        parent[draws.choice(_TEXTS)] = child
    elif action == 1:
        many = 2 if isinstance(child, (dict, list)) else 5000
        parent[key:key] = [child] * draws.choice((1, 2, many))
    elif action == 2 and isinstance(child, (int, float)) and not isinstance(child, bool):
        parent[key] = child + draws.choice((-1, 1, 0.5, 2**32))
    elif action == 3:
        parent[key] = _nested(child, draws.choice((1, 9, 100)), draws.random() < 0.5)
    elif action == 4 and isinstance(child, str):
        parent[key] = draws.choice((child + "\x00", child[:-1], child.upper(), child * 300))
    else:
        parent[key] = _value(draws)


def _nested(value: Any, depth: int, in_lists: bool) -> Any:
    for _ in range(depth):
        value = [value] if in_lists else {"a": value}
    return value


def _value(draws: random.Random) -> Any:
    action = draws.randrange(8)
    if action < 3:
        return draws.choice(_NUMBERS)
    if action == 3:
        return draws.choice(_FLOATS)
    if action < 6:
        return draws.choice(_TEXTS)
    return draws.choice((None, True, False, [], {}, [1, 2], {"a": 1}, draws.choice(CODECS)))


def mutated_frame(data: bytes, draws: random.Random) -> bytearray:
    """Change a frame: its bytes, its header's tree, its buffers or its tensors as a whole."""
    change = draws.choice(_FRAME_CHANGES)
    changed = change(data, draws)
    return resealed(changed) if draws.random() < _RESEALED else changed


def _split(data: bytes) -> tuple[Any, bytes]:
    """Return a valid frame's header, as a tree, and its payload."""
    length = struct.unpack_from("<I", data, 8)[0]
    begin = PREFIX_BYTES + length
    return msgpack.unpackb(data[PREFIX_BYTES:begin]), data[begin + -begin % ALIGNMENT :]


def assembled(header: Any, payload: bytes) -> bytearray:
    """Assemble a frame with right lengths and a right checksum.

    Args:
        header: of any content that msgpack can pack.
        payload: what follows it.
    """
    try:
        packed: bytes = msgpack.packb(header)
    except (ValueError, OverflowError, UnicodeEncodeError, RecursionError):
        packed = b"\xc1"  # never used by msgpack
    pad = bytes(-(PREFIX_BYTES + len(packed)) % ALIGNMENT)
    total = PREFIX_BYTES + len(packed) + len(pad) + len(payload)
    prefix = struct.pack("<4sHHIQQ", MAGIC, 2, 0, len(packed), total, 0)
    return resealed(bytearray(prefix + packed + pad + payload))


def _change_bytes(data: bytes, draws: random.Random) -> bytearray:
    return mutated_bytes(data, draws)


def _change_header_bytes(data: bytes, draws: random.Random) -> bytearray:
    """Change the packed header and repair lengths and padding around it."""
    length = struct.unpack_from("<I", data, 8)[0]
    _, payload = _split(data)
    packed = bytes(mutated_bytes(data[PREFIX_BYTES : PREFIX_BYTES + length], draws))
    pad = bytes(-(PREFIX_BYTES + len(packed)) % ALIGNMENT)
    total = PREFIX_BYTES + len(packed) + len(pad) + len(payload)
    prefix = struct.pack("<4sHHIQQ", MAGIC, 2, 0, len(packed), total, 0)
    return bytearray(prefix + packed + pad + payload)


def _change_header(data: bytes, draws: random.Random) -> bytearray:
    header, payload = _split(data)
    return assembled(mutated_tree(header, draws), payload)


def _change_payload(data: bytes, draws: random.Random) -> bytearray:
    """Change numbers in the buffers, which keep their sizes."""
    header, payload = _split(data)
    changed = bytearray(payload)
    for _ in range(draws.randint(1, 6)):
        if not changed:
            break
        place = draws.randrange(len(changed))
        whole = draws.choice((*_BYTES_OF_FLOATS, draws.randbytes(draws.choice((1, 4)))))
        changed[place : place + len(whole)] = whole[: len(changed) - place]
    return assembled(header, bytes(changed))


def _forge_tensor(data: bytes, draws: random.Random) -> bytearray:
    """Put a tensor of random bytes in the frame, with sizes that its codec allows."""
    header, _ = _split(data)
    codec = draws.choice(CODECS)
    shape = [draws.choice((0, 1, 2, 3, 5, 33, 64)) for _ in range(draws.randint(0, 4))]
    count = draws.choice((1, 2, 3))
    try:
        sizes = get_codec(codec).max_sizes(shape, count)
    except SFPromptError:
        sizes = [draws.choice((0, 1, 4, 64)) for _ in range(count)]
    if draws.random() < 0.5:
        sizes = [max(0, size - draws.choice((0, 0, 1, 2, 4, size // 2))) for size in sizes]
    if sum(sizes) > _MAX_BYTES:
        sizes = [0 for _ in sizes]
    fill = draws.choice((draws.randbytes, lambda size: bytes(size), lambda size: b"\x01" * size))
    buffers = [fill(size) for size in sizes]
    payload = b"".join(part + bytes(-len(part) % ALIGNMENT) for part in buffers)
    spec = {"name": "forged", "codec": codec, "shape": shape, "sizes": sizes}
    return assembled({**header, "tensors": [spec]}, payload)


_FRAME_CHANGES: Final[tuple[Callable[[bytes, random.Random], bytearray], ...]] = (
    _change_bytes,
    _change_header_bytes,
    _change_header,
    _change_header,
    _change_payload,
    _change_payload,
    _forge_tensor,
)
