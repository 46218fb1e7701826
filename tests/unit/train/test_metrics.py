import json

import pytest
import torch
from accelerate import Accelerator
from conftest import metrics_row

from isoflop.train.metrics import MetricsLog, layer_norms, peak_memory_bytes
from isoflop.train.plots import draw_curve
from isoflop.train.records import TrainingCurve, read_rows
from isoflop.train.run_folder import RunFolder


def row(step, val_loss=None):
    return metrics_row(step, tokens=step * 8, loss=5.0 / step, val_loss=val_loss)


def claimed(path):
    folder = RunFolder(str(path))
    folder.claim()
    return folder


def test_rows_after_the_checkpoint_and_lines_cut_short_are_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(row(step)) + "\n" for step in range(1, 8)) + '{"step": 8, "lo')
    assert [r["step"] for r in read_rows(file, last_step=99)] == [1, 2, 3, 4, 5, 6, 7]
    log = MetricsLog(claimed(tmp_path), Accelerator(cpu=True), resumed_step=5, num_steps=10)
    assert not log.lacks(5)
    assert log.lacks(6)
    log.write(row(6, val_loss=1.5))
    log.close()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(r["step"], r["val_loss"]) for r in rows] == [(1, None), (2, None), (3, None), (4, None), (5, None), (6, 1.5)]


def test_a_new_log_lacks_nothing_at_step_zero(tmp_path):
    log = MetricsLog(claimed(tmp_path), Accelerator(cpu=True), resumed_step=0, num_steps=10)
    assert not log.lacks(0)
    log.close()


def test_layer_norms_by_hand():
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(2, 2), "layers": torch.nn.ModuleList([torch.nn.Linear(2, 1)])})
    with torch.no_grad():
        model["embed"].weight.fill_(1.0)
        model["layers"][0].weight.fill_(3.0)
        model["layers"][0].bias.fill_(0.0)
    model["layers"][0].weight.grad = torch.tensor([[3.0, 4.0]])
    norms = layer_norms(model)
    assert norms.by_layer(norms.squares.tolist()) == {
        "grad_norms": {"layers.0": 5.0},
        "param_norms": {"embed": 2.0, "layers.0": pytest.approx(18**0.5)},
    }


def test_peak_memory_of_this_process_is_of_the_right_size():
    assert 50e6 < peak_memory_bytes(torch.device("cpu")) < 24e9


def test_the_curve_is_a_picture_and_replaces_the_one_before(tmp_path):
    rows = [row(step, val_loss=2.0 if step % 5 == 0 else None) for step in range(1, 21)]
    for _ in range(2):
        draw_curve(TrainingCurve(rows), tmp_path / "loss.png", "toy", unigram_entropy=4.0)
    assert [file.name for file in tmp_path.iterdir()] == ["loss.png"]
    assert (tmp_path / "loss.png").stat().st_size > 10_000
