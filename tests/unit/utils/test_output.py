"""What a log file holds of progress: plain lines now and then, few however long a run takes; a terminal has its bars."""

import os
import pty
import re
import sys
import termios

import pytest
from conftest import ROOT, launch, run_command

from isoflop.utils.output import BarLines, seconds_between_lines

BARS = """
import sys, time
from isoflop.utils.output import guard_output
guard_output()
from datasets.utils import tqdm as of_datasets
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map
for _ in tqdm(range(3000), desc="own", mininterval=0): time.sleep(0.0001)
for _ in of_datasets(range(3000), desc="of a library", mininterval=0): time.sleep(0.0001)
for _ in tqdm(iter(range(30)), desc="no total", mininterval=0): pass
thread_map(lambda _: None, range(9), desc="threads")
for outer in tqdm(range(30), desc="outer", mininterval=0):
    for _ in tqdm(range(30), desc="inner", mininterval=0, leave=False): pass
with tqdm(total=9, desc="above", file=sys.stdout, mininterval=0) as bar:
    bar.update(4)
    tqdm.write("a line among it")
    print("another", flush=True)
    bar.update(5)
sys.stderr.write("half a line")
sys.stderr.write("\\n")
"""


def test_bars_of_any_library_are_plain_lines_where_there_is_no_terminal():
    done = run_command("python", "-c", BARS)
    assert "\r" not in done.stdout + done.stderr
    lines = [re.sub(r" \[.*", "", line) for line in done.stderr.splitlines()]
    assert lines == [
        "own: 100% 3000/3000", "of a library: 100% 3000/3000", "no total: 30it", "threads: 100% 9/9", "outer: 100% 30/30",
        "half a line",
    ]  # fmt: skip
    assert [re.sub(r" \[.*", "", line) for line in done.stdout.splitlines()] == [
        "a line among it", "another", "above: 100% 9/9",
    ]  # fmt: skip


def in_a_terminal(*command):
    """What a command writes to a terminal."""
    pid, terminal = pty.fork()
    if pid == 0:
        termios.tcsetwinsize(1, (24, 100))
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, *map(str, command)])
    written = b""
    try:
        while part := os.read(terminal, 65536):
            written += part
    except OSError:  # closed by the command's end
        pass
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, written.decode()
    return written.decode()


def test_a_terminal_has_a_bar_and_a_file_has_lines(write_recipe):
    shown = in_a_terminal("scripts/pretrain.py", write_recipe("terminal"))
    assert re.search(r"\rpretrain: .*\| 10/10 \[.*loss=", shown)
    assert " of 10: loss" not in shown
    done = run_command("python", "scripts/pretrain.py", write_recipe("file"))
    check_lines(done.stdout + done.stderr)


@pytest.mark.distributed
def test_a_log_of_two_ranks_has_each_line_once(write_recipe):
    done = launch("2cpu_ddp", write_recipe())
    check_lines(done.stdout + done.stderr)


def check_lines(log):
    """Lines of the first step and the last, each once, and no bar."""
    assert "\r" not in log
    assert "%|" not in log
    number = r"[\d,.e-]+"
    rows = rf"step (\d+) of 10: loss {number}, learning rate {number}, {number} tokens/s, MFU n/a(?:, \d+:\d\d left)?"
    steps = [int(step) for step in re.findall(rf"^{rows}$", log, flags=re.MULTILINE)]
    assert steps[0] == 1
    assert steps[-1] == 10
    assert steps == sorted(set(steps))
    assert re.search(r"^step 5: validation loss [\d.]+, training loss [\d.]+$", log, flags=re.MULTILINE)


def test_preparing_and_evaluating_print_few_lines(write_recipe, tmp_path):
    recipe = write_recipe(data__prepared_dir=str(tmp_path / "data"))
    for command in (["prepare.py", recipe], ["plan.py", recipe, "--measure"]):
        done = run_command("python", f"scripts/{command[0]}", *command[1:])
        assert "\r" not in done.stdout + done.stderr
        assert "%|" not in done.stderr
        assert "100%" in done.stderr


def lines_of(days, step_s):
    """Lines of a run of some days with steps of some seconds."""
    elapsed, printed, lines = 0.0, 0.0, 1
    while elapsed < days * 86400:
        elapsed += step_s
        if elapsed - printed >= seconds_between_lines(elapsed):
            printed, lines = elapsed, lines + 1
    return lines


def test_sixteen_days_take_a_quarter_of_a_megabyte():
    assert lines_of(16, step_s=2.0) * 120 < 0.35e6
    assert 5 <= lines_of(1 / 24 / 60, step_s=0.1) <= 7  # a minute: a line each ten seconds


def test_a_bar_of_hours_is_bounded_too(monkeypatch):
    """Redrawn each second for a day."""
    now = [1.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    lines, written = BarLines(), ""
    for second in range(86400):
        now[0] += 1.0
        written += lines(f"\rdownload: {second / 864:3.0f}%|####2     | {second}/86400 [00:01<00:02, 1.00s/it]")
    assert "\r" not in written
    assert "|" not in written
    assert 144 < written.count("\n") < 500
