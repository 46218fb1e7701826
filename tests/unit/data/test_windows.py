import mmap
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from isoflop.data import windows as windows_module
from isoflop.data.manifest import Shard
from isoflop.data.windows import ShardWriter, Windows, dtype_for
from isoflop.utils.errors import UserError


def write(folder, pieces, sequence_length, num_ids):
    writer = ShardWriter(folder, "text-train-00000", sequence_length, dtype_for(num_ids))
    for ids in pieces:
        writer.add(np.asarray(ids, dtype=np.int64))
    writer.cut()
    return writer


@settings(deadline=None, max_examples=40)
@given(
    pieces=st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=40), min_size=1, max_size=30),
    sequence_length=st.integers(2, 16),
    cuts=st.sets(st.integers(0, 29)),
)
def test_windows_and_tail_are_the_stream_wherever_shards_end(pieces, sequence_length, cuts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("split")
    stream = [token for ids in pieces for token in ids]
    writer = ShardWriter(folder, "text-train-00000", sequence_length, "uint16")
    for number, ids in enumerate(pieces):
        writer.add(np.asarray(ids, dtype=np.int64))
        if number in cuts:
            writer.cut()
            assert len(writer.tail) < sequence_length
            assert writer.open_bytes == 2 * len(writer.tail)
    writer.cut()
    windows = Windows(folder, writer.shards, sequence_length)
    assert len(windows) == len(stream) // sequence_length == sum(shard.windows for shard in writer.shards)
    packed = windows.take(np.arange(len(windows))).reshape(-1).tolist()
    assert packed + writer.tail.tolist() == stream
    assert sorted(file.name for file in folder.iterdir()) == [shard.name for shard in writer.shards]  # no temporary file is left


def test_many_batches_and_shards_read_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr(windows_module, "_BATCH_BYTES", 64)
    stream = np.arange(1000) % 300
    writer = ShardWriter(tmp_path, "text-train-00000", 8, "uint16")
    for piece in np.split(stream, 20):
        writer.add(piece)
        if writer.open_bytes >= 200:
            writer.cut()
    writer.cut()
    assert [shard.name for shard in writer.shards][:2] == ["text-train-00000-000.arrow", "text-train-00000-001.arrow"]
    assert sum(shard.windows for shard in writer.shards) == 125
    order = np.random.default_rng(0).permutation(125)
    assert np.array_equal(Windows(tmp_path, writer.shards, 8).take(order), stream.reshape(125, 8)[order])
    rows = Dataset.from_file(str(tmp_path / writer.shards[0].name))  # an Arrow file as datasets has them
    assert rows["input_ids"][0] == stream[:8].tolist()


@pytest.mark.parametrize(("num_ids", "dtype"), [(65_536, "uint16"), (65_537, "uint32"), (128_256, "uint32"), (300, "uint16")])
def test_the_type_holds_the_largest_id(num_ids, dtype, tmp_path):
    assert dtype_for(num_ids) == dtype
    writer = write(tmp_path, [[num_ids - 1, 0, num_ids - 1, 1]], 2, num_ids)
    assert Windows(tmp_path, writer.shards, 2).take(np.array([0, 1])).tolist() == [[num_ids - 1, 0], [num_ids - 1, 1]]


def test_reading_is_a_view_of_the_file(tmp_path):
    writer = write(tmp_path, [range(64)], 8, num_ids=64)
    block = Windows(tmp_path, writer.shards, 8).blocks[0]
    assert block.dtype == np.uint16
    assert not block.flags.owndata
    assert not block.flags.writeable


@pytest.mark.parametrize(("memory_bytes", "advised"), [(10**12, False), (1000, True)])
def test_nothing_is_read_ahead_where_the_windows_do_not_fit_the_memory(tmp_path, monkeypatch, memory_bytes, advised):
    writer = ShardWriter(tmp_path, "train", 4, "uint16")
    writer.add(np.arange(400))
    writer.cut()
    given = []

    class Memory(mmap.mmap):
        def madvise(self, option):
            given.append(option)

    monkeypatch.setattr(windows_module.mmap, "mmap", Memory)
    monkeypatch.setattr(windows_module.psutil, "virtual_memory", lambda: SimpleNamespace(total=memory_bytes))
    windows = Windows(tmp_path, writer.shards, 4)
    assert given == [mmap.MADV_RANDOM] * advised
    assert windows.take(np.array([99, 0])).tolist() == [[396, 397, 398, 399], [0, 1, 2, 3]]


def test_an_id_that_the_tokenizer_does_not_have_is_refused(tmp_path):
    writer = write(tmp_path, [[1, 2, 299, 4, 300, 6]], 2, num_ids=301)
    assert Windows(tmp_path, writer.shards, 2, 301).take(np.array([1, 2])).tolist() == [[299, 4], [300, 6]]
    windows = Windows(tmp_path, writer.shards, 2, 300)
    assert windows.take(np.array([1, 0])).tolist() == [[299, 4], [1, 2]]
    with pytest.raises(UserError, match="a window holds the id 300, and its tokenizer has 300 ids; copy the folder again"):
        windows.take(np.array([0, 2]))


@pytest.mark.parametrize("compression", ["lz4", "zstd", "of old", None])
def test_compressed_batches_are_refused(tmp_path, compression):
    """As Arrow writes them, and as it did before 1.0; with a column in front."""
    old = compression == "of old"
    version = pa.ipc.MetadataVersion.V4 if old else pa.ipc.MetadataVersion.V5
    options = pa.ipc.IpcWriteOptions(metadata_version=version, compression=None if old else compression)
    ids = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(16, dtype=np.uint16)), 8)
    batch = pa.record_batch({"length": pa.array([8, 8]), "input_ids": ids})
    with pa.ipc.new_stream(tmp_path / "x.arrow", batch.schema, options=options) as out:
        out.write_batch(batch, custom_metadata={"ARROW:experimental_compression": "zstd"} if old else None)
    shards = [Shard(name="x.arrow", bytes=(tmp_path / "x.arrow").stat().st_size, sha256="", windows=2)]
    if compression is None:
        assert Windows(tmp_path, shards, 8).take(np.array([1])).tolist() == [list(range(8, 16))]
    else:
        with pytest.raises(UserError, match=r"x\.arrow holds no windows: its record batches are compressed; copy it again"):
            Windows(tmp_path, shards, 8)
