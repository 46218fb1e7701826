import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoflop.data import windows as windows_module
from isoflop.data.windows import SplitWriter, Windows, dtype_for


def write(folder, documents, sequence_length, num_ids):
    writer = SplitWriter(folder, "train", sequence_length, dtype_for(num_ids), num_ids)
    for ids in documents:
        writer.add(np.asarray(ids, dtype=np.int64), documents=1, num_bytes=len(ids))
    return writer.close()


@settings(deadline=None, max_examples=40)
@given(
    documents=st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=40), min_size=1, max_size=30),
    sequence_length=st.integers(2, 16),
)
def test_no_token_is_lost_but_the_last_partial_window(documents, sequence_length, tmp_path_factory):
    folder = tmp_path_factory.mktemp("split")
    stream = [token for ids in documents for token in ids]
    split = write(folder, documents, sequence_length, num_ids=100)
    assert split.tokens == len(stream)
    assert split.windows == len(stream) // sequence_length
    assert split.dropped_tokens == len(stream) % sequence_length
    windows = Windows(str(folder), split, sequence_length)
    assert len(windows) == split.windows
    packed = windows.take(np.arange(len(windows)))
    assert packed.reshape(-1).tolist() == stream[: split.windows * sequence_length]


def test_many_shards_read_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr(windows_module, "SHARD_BYTES", 200)
    monkeypatch.setattr(windows_module, "_BATCH_BYTES", 64)
    stream = np.arange(1000) % 300
    split = write(tmp_path, np.split(stream, 20), 8, num_ids=300)
    assert len(split.shards) == 9  # 13 windows of 16 bytes pass 200 bytes: 4 batches of 4 windows a shard, 125 windows
    assert sum(shard.windows for shard in split.shards) == 125
    order = np.random.default_rng(0).permutation(125)
    assert np.array_equal(Windows(str(tmp_path), split, 8).take(order), stream.reshape(125, 8)[order])


@pytest.mark.parametrize(("num_ids", "dtype"), [(65_536, "uint16"), (65_537, "uint32"), (128_256, "uint32"), (300, "uint16")])
def test_the_type_holds_the_largest_id(num_ids, dtype, tmp_path):
    assert dtype_for(num_ids) == dtype
    split = write(tmp_path, [[num_ids - 1, 0, num_ids - 1, 1]], 2, num_ids)
    assert Windows(str(tmp_path), split, 2).take(np.array([0, 1])).tolist() == [[num_ids - 1, 0], [num_ids - 1, 1]]


def test_reading_is_a_view_of_the_file(tmp_path):
    split = write(tmp_path, [range(64)], 8, num_ids=64)
    block = Windows(str(tmp_path), split, 8)._blocks[0]
    assert block.dtype == np.uint16
    assert not block.flags.owndata
    assert not block.flags.writeable


def test_unigram_entropy_is_that_of_the_counts(tmp_path):
    split = write(tmp_path, [[0, 0, 1, 2]], 2, num_ids=10)
    assert split.unigram_entropy_nats == pytest.approx(1.5 * np.log(2), rel=1e-12)
