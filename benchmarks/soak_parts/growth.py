"""What the samples of a soak say: slopes of memory, open files and threads; the verdict, and the table."""

from __future__ import annotations

import statistics
from collections import Counter
from typing import Any

from soak_parts.disturbed import EXPECTED_CODES

# The warm-up of a launch: its first evaluation, picture and push load what they need. In short soaks a third of it.
WARM_UP_S, WARM_UP_SHARE = 180.0, 1 / 3
SHORTEST_S, FEWEST = 300.0, 12  # of a launch, behind its warm-up, whose slope is judged
# glibc's allocator gives pages back, or keeps them, in steps of some MB. A leak of 100 bytes a step is over this.
MB_PER_HOUR = 20.0
CONSTANT = ("open_files", "threads", "children")


def launches_growth(samples: list[dict[str, Any]], launches: int) -> list[dict[str, Any]]:
    """Growth of each launch behind its warm-up, of those with enough samples."""
    by_launch = [[sample for sample in samples if sample["launch"] == number] for number in range(launches)]
    return [growth for seen in by_launch if (growth := growth_of(behind_warm_up(seen)))]


def behind_warm_up(seen: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The samples of a launch without those of its warm-up, and without the last ones, when it was ending."""
    if not seen:
        return []
    first, last = seen[0]["s"], seen[-1]["s"]
    start = first + min(WARM_UP_S, WARM_UP_SHARE * (last - first))
    return [sample for sample in seen[:-3] if sample["s"] >= start]


def growth_of(seen: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Slopes of memory (Theil-Sen), and by how much the number of open files, threads and children at rest grew; None of too few.

    A save in flight, half of the time here, has a file open, and a request a thread at work: the lower deciles of the first and
    the last third are compared. A leak raises them; medians would say how often a save was in flight.
    """
    if len(seen) < FEWEST:
        return None
    hours = [sample["s"] / 3600 for sample in seen]
    third = len(seen) // 3
    slopes = {kind: theil_sen(hours, [sample[f"{kind}_bytes"] / 1e6 for sample in seen]) for kind in ("rss", "uss")}
    grown = {
        key: lower_decile([sample[key] for sample in seen[-third:]]) - lower_decile([sample[key] for sample in seen[:third]])
        for key in CONSTANT
    }
    seconds = seen[-1]["s"] - seen[0]["s"]
    return {
        "launch": seen[0]["launch"],
        "minutes": round(seconds / 60, 1),
        "steps": seen[-1]["step"] - seen[0]["step"],
        "judged": seconds >= SHORTEST_S,
        "rss_mb": round(seen[-1]["rss_bytes"] / 1e6, 1),
        **{f"{kind}_mb_per_hour": round(slope, 2) for kind, slope in slopes.items()},
        **grown,
    }


def lower_decile(counts: list[int]) -> int:
    """The count that a tenth of the samples do not exceed."""
    return sorted(counts)[len(counts) // 10]


def theil_sen(x: list[float], y: list[float]) -> float:
    """The median of the slopes between all pairs of points."""
    pairs = ((i, j) for i in range(len(x)) for j in range(i + 1, len(x)) if x[j] > x[i])
    return statistics.median((y[j] - y[i]) / (x[j] - x[i]) for i, j in pairs)


def pooled(growth: list[dict[str, Any]], key: str) -> float | None:
    """A slope of all judged launches: the mean, by their minutes. None where no launch was long enough."""
    judged = [one for one in growth if one["judged"]]
    minutes = sum(one["minutes"] for one in judged)
    return round(sum(one[key] * one["minutes"] for one in judged) / minutes, 2) if judged else None


def verdict(result: dict[str, Any]) -> list[str]:
    """What is not as it should be; nothing of a good run."""
    wrong = [f"differs from the uninterrupted run: {name}" for name in result["differences"]]
    wrong += [f"exit code {code}, {count} x" for code, count in result["exit_codes"].items() if int(code) not in EXPECTED_CODES]
    wrong += [f"{kind}: {result['faults'].get(kind, 0)} of {count}" for kind, count in result["faults_planned"].items()
              if result["faults"].get(kind, 0) != count]  # fmt: skip
    for one in result["growth"]:
        wrong += [f"launch {one['launch']}: {one[key]:+} {key}" for key in CONSTANT if one["judged"] and one[key] > 0]
    slope = result["rss_mb_per_hour"]
    return wrong + ([f"memory grows by {slope} MB an hour"] if slope is not None and slope > MB_PER_HOUR else [])


def counted(faults: list[dict[str, Any]]) -> dict[str, int]:
    """Faults by kind."""
    return dict(Counter(fault["kind"] for fault in faults))


def table(result: dict[str, Any]) -> str:
    """The result on a screen."""
    faults = ", ".join(f"{count} x {kind}" for kind, count in result["faults"].items())
    codes = ", ".join(f"{count} x {code}" for code, count in result["exit_codes"].items())
    growth = "\n".join(
        f"{one['launch']:>6} {one['minutes']:>8} {one['steps']:>8,} {one['rss_mb']:>8}"
        + (
            f" {one['rss_mb_per_hour']:>+10} {one['uss_mb_per_hour']:>+10} {one['open_files']:>+6} {one['threads']:>+8}"
            f" {one['children']:>+9}"
            if one["judged"]
            else "  too short to judge"
        )
        for one in result["growth"]
    )
    slope = result["rss_mb_per_hour"]
    return (
        f"verdict: {result['verdict']}\n"
        f"{result['steps']:,} steps in {result['lasted_s'] / 60:.1f} min and {len(result['launches'])} launches (exit codes"
        f" {codes}); checkpoints seen: {result['checkpoints_seen']:,}, pushed: {result['checkpoints_pushed']};"
        f" posts of the tracker: {result['tracker_posts']:,}\nfaults: {faults}\n"
        f"differences from the uninterrupted run: {len(result['differences'])}\n\n"
        "launch  minutes    steps   RSS MB   RSS MB/h   USS MB/h  files  threads  children\n"
        f"{growth}\nRSS of all launches that are long enough:"
        f" {'none is' if slope is None else f'{slope:+} MB an hour (flat: up to {MB_PER_HOUR:g})'}"
    )
