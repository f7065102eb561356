"""The cache of remote shards: bounded, shared by processes, the same bytes."""

import errno
import fcntl
import multiprocessing
import os
import random
import threading
import warnings

import fsspec
import pytest
from data.made import SPACE, write

from memseg_dist.data.augment import AugmentConfig
from memseg_dist.data.cache import ShardCache
from memseg_dist.data.index import Index
from memseg_dist.data.loader import EvalDataset, Source, TrainLoader
from memseg_dist.tools.external import ensure_indexed

SIZE = 1000


def remote_files(folder, count):
    """URLs that are no local paths for us, though fsspec serves them from `folder`."""
    folder.mkdir()
    for number in range(count):
        (folder / f"{number}").write_bytes(bytes([number]) * SIZE)
    return [f"local://{folder}/{number}" for number in range(count)]


def held(cache_dir):
    return sum(path.stat().st_size for path in cache_dir.glob("*.data"))


def test_downloads_once_and_evicts_the_least_recently_opened(tmp_path):
    urls = remote_files(tmp_path / "remote", 4)
    cache = ShardCache(tmp_path / "cache", 3 * SIZE)
    streams = [cache.open(url) for url in urls[:3]]
    assert held(tmp_path / "cache") == 3 * SIZE
    cache.open(urls[0]).close()
    cache.open(urls[3]).close()  # evicts 1, the one not opened for longest
    assert held(tmp_path / "cache") == 3 * SIZE
    for number, is_held in ((0, True), (2, True), (1, False)):
        again = cache.open(urls[number])
        assert again.read() == bytes([number]) * SIZE
        assert os.path.sameopenfile(again.fileno(), streams[number].fileno()) == is_held
    assert streams[1].read() == bytes([1]) * SIZE  # still readable where it is open
    os.remove(tmp_path / "remote" / "1")
    with pytest.raises(ValueError, match=r"cannot read local://.*/1: .*check the path"):
        cache.open(urls[1])


def test_a_shard_that_was_rewritten_is_read_anew(tmp_path):
    (url,) = remote_files(tmp_path / "remote", 1)
    cache = ShardCache(tmp_path / "cache", 3 * SIZE)
    assert cache.open(url).read() == bytes(SIZE)
    (tmp_path / "remote" / "0").write_bytes(b"x" * SIZE)
    assert cache.open(url).read() == b"x" * SIZE


def test_a_store_that_cannot_tell_versions_is_named_once(tmp_path, monkeypatch):
    urls = remote_files(tmp_path / "remote", 2)
    local = fsspec.filesystem("local")
    monkeypatch.setattr(type(local), "info", lambda *_, **__: {"size": SIZE, "ETag": None})
    cache = ShardCache(tmp_path / "cache", 3 * SIZE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for url in urls:
            cache.open(url).close()
    assert [str(warning.message)[:24] for warning in caught] == ["the store of local:// fi"]


def test_local_paths_pass_through(tmp_path):
    (tmp_path / "shard").write_bytes(b"abc")
    cache = ShardCache(tmp_path / "cache", 1)
    for url in (str(tmp_path / "shard"), f"file://{tmp_path}/shard"):
        with cache.open(url) as stream:
            assert stream.read() == b"abc"
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ValueError, match=r"cannot open shard .*absent.tar.*restore it"):
        cache.open(str(tmp_path / "absent.tar"))
    with pytest.raises(ValueError, match=r"refusing 'pipe:rm -r /'"):
        cache.open("pipe:rm -r /")


def test_a_shard_above_the_bound_and_a_cut_download_are_named(tmp_path, monkeypatch):
    (url,) = remote_files(tmp_path / "remote", 1)
    with pytest.raises(ValueError, match="has 1000 bytes but the cache may hold 999; raise"):
        ShardCache(tmp_path / "cache", SIZE - 1).open(url)
    local = fsspec.filesystem("local")
    monkeypatch.setattr(type(local), "info", lambda *_, **__: {"size": SIZE + 5})
    with pytest.raises(ValueError, match="got 1000 of 1005 bytes"):
        ShardCache(tmp_path / "cache", 2 * SIZE).open(url)
    assert held(tmp_path / "cache") == 0


def test_a_leftover_of_a_killed_process_makes_room(tmp_path):
    urls = remote_files(tmp_path / "remote", 2)
    cache = ShardCache(tmp_path / "cache", 2 * SIZE)
    cache.open(urls[0]).close()
    leftover = tmp_path / "cache" / ".x.data.1-2.tmp"
    leftover.write_bytes(b"0" * SIZE)
    cache.open(urls[1]).close()
    assert not leftover.exists()


def read_many(cache_dir, urls, seed, results):
    cache = ShardCache(cache_dir, 3 * SIZE)
    draw = random.Random(seed)
    wrong = 0
    for _ in range(80):
        number = draw.randrange(len(urls))
        with cache.open(urls[number]) as stream:
            wrong += stream.read() != bytes([number]) * SIZE
    results.put(wrong)


def test_two_processes_never_exceed_the_bound_nor_read_wrong_bytes(tmp_path):
    urls = remote_files(tmp_path / "remote", 8)
    cache_dir = tmp_path / "cache"
    context = multiprocessing.get_context("forkserver")
    results = context.Queue()
    processes = [
        context.Process(target=read_many, args=(cache_dir, urls, seed, results))
        for seed in range(2)
    ]
    highest, done = 0, threading.Event()

    def watch():
        nonlocal highest
        while not done.wait(0.001):
            sizes = []
            for path in [*cache_dir.glob("*.data"), *cache_dir.glob(".*.tmp")]:
                try:
                    sizes.append((path.stat().st_ino, path.stat().st_size))
                except FileNotFoundError:
                    continue
            highest = max(highest, sum(dict(sizes).values()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for process in processes:
        process.start()
    assert [results.get(timeout=120) for _ in processes] == [0, 0]
    for process in processes:
        process.join()
    done.set()
    watcher.join()
    assert 0 < held(cache_dir) <= 3 * SIZE
    assert highest <= 4 * SIZE  # a listing is no snapshot: a file may go while another comes


def test_a_data_set_behind_a_url_equals_the_local_one(tmp_path, masks_root):
    memory = fsspec.filesystem("memory")
    memory.put(str(masks_root) + "/", "/bucket/masks", recursive=True)
    small = AugmentConfig((64, 48), crop=32)
    made = []
    for path in (str(masks_root), "memory://bucket/masks"):
        source = Source("masks", path, "masks", 2, 2, small)
        loader = TrainLoader([source], SPACE, seed=0, cache_dir=tmp_path, cache_bytes=200_000)
        made.append([batch for step in loader.steps(0, 6) for batch, _ in step])
    for ours, theirs in zip(*made, strict=True):
        assert ours.keys == theirs.keys
        assert ours.images.equal(theirs.images)
    assert 0 < held(tmp_path / "shards") <= 200_000
    items = EvalDataset("memory://bucket/masks", SPACE, "masks", cache_dir=tmp_path)
    assert items[3].truth.shape == (30, 40)
    memory.rm("/bucket/masks/shard-000003.tar")
    index = Index.open("memory://bucket/masks", tmp_path)
    row = int(index.shard_starts[3])
    fresh = EvalDataset("memory://bucket/masks", SPACE, "masks", cache_dir=tmp_path / "new")
    with pytest.raises(ValueError, match=r"cannot read memory://.*shard-000003\.tar"):
        fresh[row]


def test_external_shards_behind_a_url_are_indexed_in_the_cache(tmp_path):
    write(tmp_path / "data", (2, 1))
    memory = fsspec.filesystem("memory")
    for name in ("shard-000000.tar", "shard-000001.tar", "vocabulary.json"):
        memory.pipe(f"/external/{name}", (tmp_path / "data" / name).read_bytes())
    ensure_indexed(["memory://external"], tmp_path / "cache")
    index = Index.open("memory://external", tmp_path / "cache")
    assert len(index) == 3
    assert index.shard_names[0] == "memory://external/shard-000000.tar"
    items = EvalDataset("memory://external", SPACE, "masks", cache_dir=tmp_path / "cache")
    local = EvalDataset(tmp_path / "data", SPACE, "masks", cache_dir=tmp_path / "cache")
    assert items[2].image.equal(local[2].image)


def test_a_lock_is_asked_for_on_a_file_that_can_be_written(tmp_path, monkeypatch):
    """NFS refuses others: its locks are those of POSIX."""
    plain = fcntl.flock

    def of_nfs(stream, operation):
        if fcntl.fcntl(stream, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        plain(stream, operation)

    monkeypatch.setattr(fcntl, "flock", of_nfs)
    urls = remote_files(tmp_path / "remote", 1)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ".x.data.1-2.tmp").write_bytes(b"0")
    with ShardCache(tmp_path / "cache", 2 * SIZE).open(urls[0]) as stream:
        assert len(stream.read()) == SIZE
