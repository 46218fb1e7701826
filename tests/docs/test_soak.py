"""The soak: a short one is really done; what it would say of a leak, and the page's section, are tested on made samples."""

import copy
import json
import sys

import pytest
import reliability
from conftest import run_command
from soak_parts import growth
from soak_parts.disturbed import FAULTS

PLANNED = dict.fromkeys(FAULTS, 1)


def samples(launch=0, minutes=30, mb_per_hour=0.0, **grown):
    """One a 10 s; RSS jumps by 8 MB and back, a save holds one file and one thread every third time."""
    for number in range(minutes * 6):
        hours, busy = number / 360, number % 3 == 0
        memory = int(1e6 * (600 + mb_per_hour * hours + 8 * (number % 7 == 0)))
        counts = {"open_files": 13 + busy, "threads": 5 + busy, "children": 1}
        counts |= {key: counts[key] + round(step * hours) for key, step in grown.items()}
        yield {
            "s": 3600 * launch + 10.0 * number, "launch": launch, "step": 100 * number, "rss_bytes": memory,
            "uss_bytes": memory - 10**8, **counts,
        }  # fmt: skip


def result(seen, **changes):
    """The result of a good soak, with changes."""
    grown = growth.launches_growth(seen, launches=2)
    return {
        "verdict": "ok", "minutes": 60.0, "lasted_s": 3700.0, "steps": 5714, "checkpoints_seen": 2857, "checkpoints_pushed": 200,
        "tracker_posts": 250, "faults_planned": PLANNED, "faults": PLANNED, "exit_codes": {"75": 1, "0": 1}, "differences": [],
        "rss_mb_per_hour": growth.pooled(grown, "rss_mb_per_hour"), "uss_mb_per_hour": growth.pooled(grown, "uss_mb_per_hour"),
        "growth": grown, "machine": "2 CPU cores", "versions": {"torch": "2.13.0"}, "launches": [{}, {}],
        "fault_list": [{"kind": kind, "s": 100.0, "lasted_s": 1.0} for kind in FAULTS], "samples": seen,
    } | changes  # fmt: skip


def test_a_run_that_stays_as_it_is_passes():
    found = result([*samples(), *samples(launch=1, minutes=6)])
    assert growth.verdict(found) == []
    assert [(one["judged"], one["rss_mb_per_hour"], one["open_files"]) for one in found["growth"]] == [
        (True, 0, 0),
        (False, 0, 0),
    ]
    assert found["rss_mb_per_hour"] == 0


@pytest.mark.parametrize(
    ("grown", "printed"),
    [
        ({"mb_per_hour": 30}, "memory grows by 30.0 MB an hour"),
        ({"open_files": 10}, "launch 0: +3 open_files"),
        ({"threads": 10}, "launch 0: +3 threads"),
        ({"children": 10}, "launch 0: +3 children"),
    ],
)
def test_what_grows_is_named(grown, printed):
    assert growth.verdict(result(list(samples(**grown)))) == [printed]


def test_saves_that_are_in_flight_more_often_are_no_leak():
    seen = list(samples())
    for number, sample in enumerate(seen):
        sample["open_files"] = 13 + (number % 9 < (4 if number < len(seen) // 2 else 5))
    assert growth.verdict(result(seen)) == []


@pytest.mark.parametrize(
    ("changes", "printed"),
    [
        ({"differences": ["weights"]}, "differs from the uninterrupted run: weights"),
        ({"exit_codes": {"0": 1, "1": 2}}, "exit code 1, 2 x"),
        ({"exit_codes": {"-9": 1}}, "exit code -9, 1 x"),
        ({"faults": PLANNED | {"dead Hub": 0}}, "dead Hub: 0 of 1"),
    ],
)
def test_what_went_wrong_is_named(changes, printed):
    assert growth.verdict(result(list(samples()), **changes)) == [printed]


def test_memory_of_the_warm_up_and_of_the_end_does_not_count():
    seen = list(samples(minutes=20))
    for sample in [*seen[:17], *seen[-3:]]:
        sample["rss_bytes"] = sample["open_files"] = 0
    assert growth.verdict(result(seen)) == []


def test_the_slope_is_not_moved_by_a_few_jumps():
    y = [2.0 * x for x in range(20)]
    y[3], y[11] = 1e6, -1e6
    assert growth.theil_sen(list(range(20)), y) == pytest.approx(2.0, abs=0.5)


def test_launches_count_by_their_minutes():
    grown = growth.launches_growth([*samples(minutes=40, mb_per_hour=10), *samples(1, minutes=20, mb_per_hour=40)], 2)
    low, high = (one["minutes"] for one in grown)
    assert growth.pooled(grown, "rss_mb_per_hour") == pytest.approx((10 * low + 40 * high) / (low + high), abs=0.02)


def test_the_page_has_a_section_where_there_are_results(tmp_path, monkeypatch):
    monkeypatch.setattr(reliability, "DOCS", tmp_path)
    assert reliability.soak_section(tmp_path / "soak.json") == ""
    (tmp_path / "soak.json").write_text(json.dumps(result([*samples(), *samples(launch=1)])))
    page = reliability.soak_section(tmp_path / "soak.json")
    assert "| verdict | ok |" in page
    assert "| launches, by exit code | 2: 1 x 75, 1 x 0 |" in page
    assert "| faults | 5: 1 x SIGTERM, 1 x SIGSTOP, 1 x full disk, 1 x dead tracker, 1 x dead Hub |" in page
    assert "| most growth of a launch: open files, threads, child processes | +0, +0, +0 |" in page
    assert "+0.0 MB an hour (private: +0.0)" in page
    assert (tmp_path / "reliability_soak.png").read_bytes()[:4] == b"\x89PNG"


def test_the_results_in_the_repository_are_those_of_their_samples():
    found = json.loads(reliability.SOAK.read_text(encoding="utf-8"))
    assert found["verdict"] == "ok"
    assert growth.verdict(copy.deepcopy(found)) == []
    assert json.loads(json.dumps(growth.launches_growth(found["samples"], len(found["launches"])))) == found["growth"]
    assert found["faults"] == found["faults_planned"]


@pytest.mark.slow
def test_a_short_soak(tmp_path):
    """Every kind of fault at least once, to a real run; its end is that of an uninterrupted one."""
    done = run_command(
        sys.executable, "benchmarks/soak.py", "--minutes", "0.2", "--out", tmp_path / "soak.json", check=False, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "soak.json").read_text(encoding="utf-8"))
    kinds = set(FAULTS) - ({"full disk"} if "no small disk can be mounted" in done.stdout else set())
    assert (found["verdict"], found["differences"]) == ("ok", [])
    assert found["faults"] == found["faults_planned"] == dict.fromkeys(sorted(kinds), 1)
    assert found["exit_codes"]["0"] == 1
    assert set(found["exit_codes"]) <= {"0", "2", "75"}
    assert found["steps"] / 4 < found["checkpoints_seen"] <= found["steps"] / 2 + len(found["launches"])
    assert found["checkpoints_pushed"] >= 1
    assert found["tracker_posts"] >= 1
    assert all(sample["rss_bytes"] > 0 for sample in found["samples"])
    assert "verdict: ok" in done.stdout
