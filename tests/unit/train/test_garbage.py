"""The garbage collector during training: how often it runs, what it frees, and that it is left as it was."""

import gc
import weakref

import pytest

from isoflop.train.garbage import COLLECT_ALL_EVERY_STEPS, COLLECT_EVERY_STEPS, collected_by_hand


@pytest.fixture
def collections():
    """Generations collected so far, one entry a collection."""
    seen = []

    def note(phase, info):
        if phase == "stop":
            seen.append(info["generation"])

    gc.callbacks.append(note)
    yield seen
    gc.callbacks.remove(note)


class Node:
    """An object of a reference cycle."""

    def __init__(self):
        self.itself = self


def test_collections_happen_at_the_due_steps_and_at_no_other(collections):
    with collected_by_hand(every=5, all_every=20) as collector:
        assert collections.pop() == 2  # on entry, of everything
        collections.clear()
        counts = []
        for _ in range(42):
            [[] for _ in range(2_000)]  # the automatic collector would run after 700 objects
            collector.step()
            counts.append(len(collections))
    assert collections[:8] == [1, 1, 1, 2, 1, 1, 1, 2]
    assert counts[3:6] == [0, 1, 1]
    assert counts[-1] == 8


def test_the_defaults_are_those_of_their_sources():
    assert (COLLECT_EVERY_STEPS, COLLECT_ALL_EVERY_STEPS) == (50, 5_000)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_left_as_it_was(enabled):
    (gc.enable if enabled else gc.disable)()
    try:
        with collected_by_hand(every=5):
            assert not gc.isenabled()
            assert gc.get_freeze_count() > 10_000
        assert gc.isenabled() == enabled
        assert gc.get_freeze_count() == 0
        with pytest.raises(RuntimeError, match="of the loop"), collected_by_hand(every=5):
            raise RuntimeError("of the loop")
        assert gc.isenabled() == enabled
        assert gc.get_freeze_count() == 0
    finally:
        gc.enable()


def test_what_was_made_before_is_freed_though_something_else_was_frozen():
    """Python 3.12 starts with frozen objects: a second run in its process held the first one's model."""
    gc.freeze()
    node = weakref.ref(Node())
    assert node() is not None
    with collected_by_hand(every=5):
        pass
    gc.collect()
    assert node() is None


def test_cyclic_garbage_is_freed_and_does_not_grow():
    nodes, alive = weakref.WeakSet(), []
    with collected_by_hand(every=5, all_every=10_000) as collector:
        for _ in range(100):
            for _ in range(10):
                nodes.add(Node())
            collector.step()
            alive.append(len(nodes))
    assert max(alive) == 40  # of four steps: the fifth's end frees them
    assert alive[-1] == 0


def left_of_100_nodes(all_every):
    """How many nodes are there after 100 steps, each of which makes one that is in use for seven steps."""
    nodes, held = weakref.WeakSet(), []
    with collected_by_hand(every=5, all_every=all_every) as collector:
        for _ in range(100):
            held.append(Node())
            nodes.add(held[-1])
            del held[:-7]
            collector.step()
        return len(nodes)


def test_cyclic_garbage_that_outlived_a_collection_is_freed_by_those_of_everything():
    assert left_of_100_nodes(all_every=20) == 7
    assert left_of_100_nodes(all_every=10_000) > 50  # each was in use while generation 1 was collected
