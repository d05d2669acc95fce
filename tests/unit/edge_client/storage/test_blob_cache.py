"""Files of the server on the device: never twice, resumed, checked, shared by processes."""

import hashlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from edge_client.storage import blob_cache
from edge_client.storage.blob_cache import BlobCache
from protocol.errors import MalformedFrame, Unreachable
from protocol.messages import BlobRef

CONTENT = os.urandom(10_000)


def ref_of(content: bytes) -> BlobRef:
    return BlobRef(sha256=hashlib.sha256(content).hexdigest(), nbytes=len(content))


REF = ref_of(CONTENT)


class Source:
    """Gives at most ``piece`` bytes a time, and breaks after ``good`` pieces."""

    def __init__(self, content: bytes = CONTENT, piece: int = 3000, good: int = 10**9) -> None:
        self.content, self.piece, self.good = content, piece, good
        self.starts: list[int] = []

    def __call__(self, start: int) -> bytes:
        self.starts.append(start)
        if len(self.starts) > self.good:
            raise Unreachable("the connection broke")
        return self.content[start : start + self.piece]


def never(_start: int) -> bytes:
    raise AssertionError("nothing is to be downloaded")


@pytest.fixture
def cache(tmp_path: Path) -> BlobCache:
    return BlobCache(tmp_path)


def test_a_file_comes_in_pieces_once(cache: BlobCache, tmp_path: Path) -> None:
    source = Source()
    path = cache.fetch(REF, source)
    assert path.read_bytes() == CONTENT
    assert source.starts == [0, 3000, 6000, 9000]
    assert cache.fetch(REF, never) == path
    assert BlobCache(tmp_path).fetch(REF, never) == path
    assert [file.name for file in tmp_path.iterdir()] == [f"{REF.sha256}.safetensors"]


def test_an_empty_file_needs_no_download(cache: BlobCache) -> None:
    assert cache.fetch(ref_of(b""), never).read_bytes() == b""


def test_an_interrupted_download_continues(cache: BlobCache, tmp_path: Path) -> None:
    with pytest.raises(Unreachable):
        cache.fetch(REF, Source(good=2))
    source = Source()
    assert BlobCache(tmp_path).fetch(REF, source).read_bytes() == CONTENT
    assert source.starts == [6000, 9000]


def test_a_killed_process_is_continued_by_the_next(tmp_path: Path) -> None:
    program = f"""
import os, pathlib, signal
from edge_client.storage import blob_cache
from edge_client.storage.blob_cache import BlobCache
from protocol.messages import BlobRef
content = bytes.fromhex({CONTENT.hex()!r})
def download(start):
    if start >= 6000:
        os.kill(os.getpid(), signal.SIGKILL)
    return content[start : start + 3000]
ref = BlobRef(sha256={REF.sha256!r}, nbytes={REF.nbytes})
BlobCache(pathlib.Path({str(tmp_path)!r})).fetch(ref, download)
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, timeout=60)
    assert done.returncode == -9
    source = Source()
    assert BlobCache(tmp_path).fetch(REF, source).read_bytes() == CONTENT
    assert source.starts == [6000, 9000]


def test_a_complete_part_is_not_requested_again(cache: BlobCache, tmp_path: Path) -> None:
    """The process died between the last byte and the renaming."""
    (tmp_path / f"{REF.sha256}.part").write_bytes(CONTENT)
    assert cache.fetch(REF, never).read_bytes() == CONTENT


@pytest.mark.parametrize("part", [b"\0" * 5000, CONTENT + b"more", bytes(len(CONTENT))])
def test_a_damaged_part_is_downloaded_again(cache: BlobCache, tmp_path: Path, part: bytes) -> None:
    """A power cut may leave zeros, or more than there was."""
    (tmp_path / f"{REF.sha256}.part").write_bytes(part)
    assert cache.fetch(REF, Source()).read_bytes() == CONTENT


def test_a_download_that_is_damaged_on_its_way_is_repeated(cache: BlobCache) -> None:
    damaged, whole = Source(CONTENT[:5000] + b"?" + CONTENT[5001:]), Source()
    sources = iter([*[damaged] * 4, *[whole] * 4])  # each takes four pieces
    assert cache.fetch(REF, lambda start: next(sources)(start)).read_bytes() == CONTENT


@pytest.mark.parametrize(
    "wrong",
    [b"x" * 10_000, CONTENT[:-1], CONTENT + b"x", CONTENT[::-1], b""],
)
def test_wrong_content_is_refused_and_removed(
    cache: BlobCache, tmp_path: Path, wrong: bytes
) -> None:
    with pytest.raises(MalformedFrame) as caught:
        cache.fetch(REF, Source(wrong))
    assert caught.value.field == "sha256"
    assert caught.value.limit == f"{REF.sha256} of 10000 bytes"
    assert list(tmp_path.iterdir()) == []
    assert cache.fetch(REF, Source()).read_bytes() == CONTENT


def test_a_wrong_announced_size_is_refused(cache: BlobCache, tmp_path: Path) -> None:
    """Also where the content is right: a size is what memory and patience are planned by."""
    for size in (len(CONTENT) - 1, len(CONTENT) + 1):
        with pytest.raises(MalformedFrame):
            cache.fetch(REF.model_copy(update={"nbytes": size}), Source(piece=20_000))
        assert list(tmp_path.iterdir()) == []


def test_a_file_damaged_on_the_disk_is_downloaded_again(cache: BlobCache) -> None:
    path = cache.fetch(REF, Source())
    for damaged in (CONTENT[:-5], b"\0" * len(CONTENT), b""):
        path.write_bytes(damaged)
        assert cache.fetch(REF, Source()).read_bytes() == CONTENT


def test_threads_download_a_file_once(cache: BlobCache) -> None:
    starts = []

    def download(start: int) -> bytes:
        starts.append(start)
        time.sleep(0.005)
        return CONTENT[start : start + 3000]

    results: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: results.append(cache.fetch(REF, download).read_bytes()))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [CONTENT] * 6
    assert starts == [0, 3000, 6000, 9000]


def test_processes_download_a_file_once(tmp_path: Path) -> None:
    program = f"""
import pathlib, time
from edge_client.storage import blob_cache
from edge_client.storage.blob_cache import BlobCache
from protocol.messages import BlobRef
content = bytes.fromhex({CONTENT.hex()!r})
def download(start):
    with open({str(tmp_path / "log")!r}, "a") as file:
        file.write(f"{{start}} ")
    time.sleep(0.02)
    return content[start : start + 3000]
ref = BlobRef(sha256={REF.sha256!r}, nbytes={REF.nbytes})
path = BlobCache(pathlib.Path({str(tmp_path / "blobs")!r})).fetch(ref, download)
assert path.read_bytes() == content
"""
    processes = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert (tmp_path / "log").read_text().split() == ["0", "3000", "6000", "9000"]
    assert len(list((tmp_path / "blobs").iterdir())) == 1


def test_after_a_failed_download_the_next_process_continues(cache: BlobCache) -> None:
    """Who waits for a download that turns out wrong or broken takes it over."""
    started, may_finish = threading.Event(), threading.Event()

    def wrong(start: int) -> bytes:
        started.set()
        may_finish.wait(5)
        return bytes(REF.nbytes - start)

    def first() -> None:
        with pytest.raises(MalformedFrame):
            cache.fetch(REF, wrong)

    thread = threading.Thread(target=first)
    thread.start()
    started.wait(5)
    threading.Timer(0.05, may_finish.set).start()
    assert cache.fetch(REF, Source()).read_bytes() == CONTENT
    thread.join()


def fill(cache: BlobCache, count: int) -> list[Path]:
    """``count`` files, the first used longest ago; all of them days ago."""
    paths = []
    for number in range(count):
        content = str(number).encode()
        path = cache.fetch(ref_of(content), Source(content))
        os.utime(path, (1_000_000 + number,) * 2)
        paths.append(path)
    return paths


def test_old_files_go_but_for_the_named_and_the_newest(cache: BlobCache) -> None:
    paths = fill(cache, 8)
    cache.drop_old(keep={paths[0].stem}, newest=3)
    assert [path.exists() for path in paths] == [True] + [False] * 4 + [True] * 3


def test_a_file_in_recent_use_stays(cache: BlobCache) -> None:
    """It may be another process's on this device, between its fetching and its reading."""
    paths = fill(cache, 6)
    cache.fetch(ref_of(b"1"), never)
    cache.drop_old(keep=set(), newest=1)
    assert [path.exists() for path in paths] == [False, True, False, False, False, False]
    cache.drop_old(keep=set(), newest=0, unused_s=0)
    assert not any(path.exists() for path in paths)


def test_files_that_this_device_alone_has_used_go_at_once(tmp_path: Path) -> None:
    """A server that sends a new file every second does not fill the disk."""
    cache, other = BlobCache(tmp_path), BlobCache(tmp_path)
    contents = [bytes([number]) for number in range(20)]
    for content in contents:
        for _ in range(2):  # once downloaded, once from the disk
            cache.fetch(ref_of(content), lambda _start, content=content: content)
        if content == contents[3]:
            other.fetch(ref_of(content), never)
        cache.drop_old(keep=set(), newest=2)
        assert len(list(tmp_path.iterdir())) <= 4  # the newest two, and that of the other
    assert (tmp_path / f"{ref_of(contents[3]).sha256}.safetensors").exists()


def test_a_file_that_goes_while_it_is_fetched_is_downloaded_again(
    cache: BlobCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process on this device has dropped it, after this one has seen it."""
    path, real = cache.fetch(REF, Source()), blob_cache._matches

    def seen_and_gone(file: Path, ref: BlobRef) -> bool:
        results = real(file, ref)
        BlobCache(tmp_path).drop_old(keep=set(), newest=0, unused_s=-60)
        return results

    monkeypatch.setattr(blob_cache, "_matches", seen_and_gone)
    source = Source()
    assert cache.fetch(REF, source) == path
    assert path.read_bytes() == CONTENT
    assert source.starts == [0, 3000, 6000, 9000]


def test_keeping_a_file_counts_as_using_it(cache: BlobCache) -> None:
    paths = fill(cache, 2)
    cache.drop_old(keep={paths[0].stem}, newest=0)
    cache.drop_old(keep=set(), newest=0)  # another process, which has another head
    assert [path.exists() for path in paths] == [True, False]


def test_abandoned_parts_go_and_those_being_written_stay(cache: BlobCache, tmp_path: Path) -> None:
    old, new = (tmp_path / f"{digit * 64}.part" for digit in "ab")
    for part in (old, new):
        part.write_bytes(b"x")
    os.utime(old, (1_000_000,) * 2)

    def download(start: int) -> bytes:
        os.utime(tmp_path / f"{REF.sha256}.part", (1_000_000,) * 2)
        BlobCache(tmp_path).drop_old(keep=set())
        return CONTENT[start:]

    assert cache.fetch(REF, download).read_bytes() == CONTENT
    assert (old.exists(), new.exists()) == (False, True)


def test_a_large_file_is_not_read_whole(cache: BlobCache) -> None:
    import tracemalloc

    piece = os.urandom(1 << 20)
    digest = hashlib.sha256()
    for _ in range(16):
        digest.update(piece)
    ref = BlobRef(sha256=digest.hexdigest(), nbytes=16 << 20)
    tracemalloc.start()
    try:
        cache.fetch(ref, lambda _start: piece)
        cache.fetch(ref, never)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20
