"""Profiles of steps: arithmetic on synthetic events of a GPU, real traces of a CPU, runs that end early or cannot write."""

import gc
import gzip
import json
import re
import resource
from pathlib import Path

import pytest
import torch
from conftest import curve_of, launch, weights_of
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from isoflop.config.loading import load_recipe
from isoflop.train.profiling import SKIPPED_STEPS, profile_steps
from isoflop.train.step_time import Span, busy_us, category_of, summarize
from isoflop.utils.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("spans", "busy"),
    [
        ([], 0),
        ([(10, 20)], 10),
        ([(10, 20), (30, 40)], 20),
        ([(10, 30), (20, 40)], 30),
        ([(10, 40), (20, 30)], 30),
        ([(30, 40), (10, 20), (20, 30)], 30),
        ([(-10, 5), (95, 200)], 10),
        ([(-10, 200)], 100),
        ([(100, 200), (-5, 0)], 0),
        ([(10, 10)], 0),
    ],
)
def test_busy_time_is_the_union_of_spans_within_the_window(spans, busy):
    assert busy_us([Span(*span) for span in spans], Span(0, 100)) == busy


@pytest.mark.parametrize(
    ("name", "callers", "category"),
    [
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", (), "communication"),
        (
            "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>",
            ("FSDP::all_gather",),
            "communication",
        ),
        ("gloo:all_reduce", ("c10d::allreduce_",), "communication"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>", (), "optimizer and clipping"),
        (
            "void at::native::vectorized_elementwise_kernel<4>",
            ("aten::mul_", "Optimizer.step#Muon.step"),
            "optimizer and clipping",
        ),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_TNT", ("aten::mm", "Optimizer.step#Muon.step"), "optimizer and clipping"),
        ("aten::_foreach_norm", (), "optimizer and clipping"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_TNT", ("aten::mm", "_ChunkedCrossEntropySum"), "loss and head"),
        ("triton_red_fused_exp_logsumexp_sub_0", (), "loss and head"),
        ("liger_cross_entropy_kernel", (), "loss and head"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, cutlass::bfloat16_t>>", (), "attention"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", (), "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", (), "attention"),
        ("triton_tem_fused_flex_attention_0", (), "attention"),
        ("aten::softmax", ("aten::_scaled_dot_product_attention_math",), "attention"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_TNT", ("aten::mm", "MmBackward0"), "matrix products"),
        ("sm80_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", (), "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>", (), "matrix products"),
        ("triton_tem_fused_mm_0", (), "matrix products"),
        ("aten::addmm", ("aten::linear",), "matrix products"),
        ("aten::bmm", (), "matrix products"),
        ("Memcpy DtoH (Device -> Pinned)", ("aten::copy_",), "copies and fills"),
        ("Memset (Device)", (), "copies and fills"),
        ("aten::copy_", ("aten::to",), "copies and fills"),
        ("triton_poi_fused__to_copy_mul_silu_3", (), "norms, element-wise, other"),
        ("triton_poi_fused_addmm_gelu_1", (), "norms, element-wise, other"),
        ("aten::mul", ("aten::rms_norm", "ProfilerStep*"), "norms, element-wise, other"),
        ("ProfilerStep*", (), "Python"),
    ],
)
def test_kernels_and_operators_have_the_category_of_their_name_or_callers(name, callers, category):
    assert category_of(name, callers) == category


class Trace:
    """Events as torch's profiler gives them, of steps that are written down."""

    def __init__(self):
        self.events = []

    def host(self, name, start_us, end_us, parent=None, **more):
        event = FunctionEvent(len(self.events), name, 1, start_us, end_us, device_type=DeviceType.CPU, use_device="cuda", **more)
        event.trace_name = name
        if parent is not None:
            parent.append_cpu_child(event)
            event.set_cpu_parent(parent)
        self.events.append(event)
        return event

    def step(self, number, start_us, end_us):
        event = self.host("ProfilerStep*", start_us, end_us, is_user_annotation=True)
        event.trace_name = f"ProfilerStep#{number}"
        return event

    def kernel(self, name, start_us, end_us, launched_by=None, **more):
        event = FunctionEvent(len(self.events), name, 7, start_us, end_us, device_type=DeviceType.CUDA, use_device="cuda", **more)
        if launched_by is not None:
            launched_by.append_kernel(name, 0, end_us - start_us)
        self.events.append(event)


def two_gpu_steps():
    """Two steps of 1 ms, whose kernels run for 1,340 us of it; the last ends 100 us after the host has finished."""
    trace = Trace()
    for number, start in ((3, 1000), (4, 2000)):
        step = trace.step(number, start, start + 1000)
        loss = trace.host("_ChunkedCrossEntropySum", start + 50, start + 90, step)
        trace.kernel("nvjet_tst", start + 100, start + 300, trace.host("aten::mm", start + 10, start + 20, step))
        trace.kernel("nvjet_tst", start + 300, start + 400, trace.host("aten::mm", start + 60, start + 70, loss))
        trace.kernel("nvjet_tst", start + 400, start + 500)  # of a CUDA graph
        trace.kernel(
            "ncclDevKernel_ReduceScatter", start + 450, start + 600, trace.host("c10d::reduce_scatter_", start + 95, start + 96)
        )
        trace.kernel("Memcpy HtoD", start + 880, start + 1000 + (100 if number == 4 else 0))
        trace.kernel("ProfilerStep*", start + 100, start + 1100, is_user_annotation=True)
        for number_of_launch in range(5):
            trace.host("cudaLaunchKernel", start + 10 * number_of_launch, start + 10 * number_of_launch + 5, step)
        trace.host("cuLaunchKernelEx", start + 98, start + 99, step)
        trace.host("cudaStreamSynchronize", start + 500, start + 620, step)
    return trace


def test_a_trace_of_a_gpu_is_summed_up_exactly():
    profile = summarize(two_gpu_steps().events, 2)
    # The window is 2,100 us long, since the last copy ends behind the host. Busy: [100, 600] and [880, 1000] of each, +100.
    assert profile.num_steps == 2
    assert profile.step_ms == pytest.approx(1.05)
    assert (profile.fastest_step_ms, profile.slowest_step_ms) == pytest.approx((1.0, 1.0))
    assert profile.gpu.busy_share == pytest.approx(1340 / 2100)
    assert profile.gpu.exposed_communication_share == pytest.approx(200 / 2100)  # 50 of 150 us overlap with a product
    assert profile.gpu.kernel_launches == 6
    assert profile.gpu.synchronizations == 1
    assert profile.gpu.synchronization_ms == pytest.approx(0.12)
    assert [(row.name, row.ms, row.calls) for row in profile.top] == [
        ("nvjet_tst", pytest.approx(0.4), 3),
        ("Memcpy HtoD", pytest.approx(0.17), 1),
        ("ncclDevKernel_ReduceScatter", pytest.approx(0.15), 1),
    ]
    assert {row.name: row.ms for row in profile.categories} == pytest.approx(
        {"matrix products": 0.3, "loss and head": 0.1, "communication": 0.15, "copies and fills": 0.17}
    )
    assert sum(row.share for row in profile.categories) == pytest.approx(1)
    assert profile.categories[0].share == pytest.approx(300 / 720)
    assert profile.lines() == [
        "1.1 ms per step over 2 traced (fastest 1.0, slowest 1.0; tracing adds to them)",
        "GPU busy 63.8% of the time, idle 36.2%; 9.5% is communication that no computation overlaps",
        "host: 6 kernel launches per step; it waits 0.1 ms in 1 synchronizations",
    ]
    assert json.loads(json.dumps(profile.to_dict()))["gpu"]["kernel_launches"] == 6


def test_kernels_of_a_step_that_was_begun_are_left_out():
    trace = two_gpu_steps()
    step = trace.step(5, 3000, 3200)
    trace.kernel("unfinished", 3050, 3200, trace.host("aten::mm", 3010, 3020, step))
    profile = summarize(trace.events, 2)
    assert profile.num_steps == 2
    assert profile.step_ms == pytest.approx(1.0)
    assert profile.gpu.busy_share == pytest.approx(1240 / 2000)
    assert "unfinished" not in [row.name for row in profile.top]


def test_no_step_is_no_summary():
    trace = Trace()
    trace.host("aten::mm", 0, 10)
    assert summarize(trace.events, 2) is None
    trace.step(3, 20, 30)
    assert summarize(trace.events, 0) is None


def test_long_names_are_cut_and_ten_kernels_are_listed():
    trace = Trace()
    trace.step(3, 0, 1000)
    for number in range(12):
        trace.kernel(f"void kernel_{number:02}<{'x' * 300}>", 10 * number, 10 * number + number + 1)
    profile = summarize(trace.events, 1)
    assert [row.name[:14] for row in profile.top] == [f"void kernel_{number:02}" for number in range(11, 1, -1)]
    assert max(len(line) for line in profile.text().splitlines()) < 130
    assert "  kernel_11<xxx" in profile.text()


def train(folder, profiled_steps, num_steps, say=lambda text: None, rank=0, fails_after=None):
    """Losses of a small training loop."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Dropout(), torch.nn.Linear(64, 8))
    optimizer, losses = torch.optim.AdamW(model.parameters()), []
    with profile_steps(folder, profiled_steps, CPU, rank, say) as profiler:
        for _ in range(num_steps):
            loss = torch.nn.functional.cross_entropy(model(torch.randn(16, 32)), torch.randint(8, (16,)))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            profiler.step()
            if len(losses) == fails_after:
                raise RuntimeError("of the run")
    return losses


def traced_steps(file):
    with gzip.open(file, "rt") as stream:
        events = json.load(stream)["traceEvents"]
    return sorted({event["name"] for event in events if event.get("name", "").startswith("ProfilerStep#")})


def test_a_profile_writes_trace_and_summary_and_changes_no_loss(tmp_path):
    printed = []
    assert train(tmp_path, 2, 8, printed.append) == train(tmp_path, 0, 8)
    assert {file.name for file in (tmp_path / "profile").iterdir()} == {"rank-0.trace.json.gz", "summary.md", "summary.json"}
    assert traced_steps(tmp_path / "profile/rank-0.trace.json.gz") == ["ProfilerStep#3", "ProfilerStep#4"]
    summary = json.loads((tmp_path / "profile/summary.json").read_text())
    assert (summary["num_steps"], summary["gpu"]) == (2, None)
    assert {"matrix products", "loss and head", "optimizer and clipping", "Python"} <= {
        row["name"] for row in summary["categories"]
    }
    # On one thread, operators and Python between them take the whole of the steps.
    assert sum(row["ms"] for row in summary["categories"]) == pytest.approx(summary["step_ms"], rel=0.02)
    products = next(row for row in summary["top"] if row["name"] == "aten::addmm")
    assert products["calls"] == 2
    assert not [row for row in summary["top"] if row["name"].startswith("ProfilerStep")]
    (text,) = printed
    assert text.startswith("profile of rank 0: ")
    assert "over 2 traced" in text
    assert "a CPU has no memory snapshot" in text
    assert "| matrix products |" in (tmp_path / "profile/summary.md").read_text()


def test_no_steps_are_no_profile(tmp_path, capfd):
    train(tmp_path, 0, 8)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_other_ranks_write_their_trace_and_say_nothing(tmp_path):
    printed = []
    train(tmp_path, 2, 8, printed.append, rank=3)
    assert [file.name for file in (tmp_path / "profile").iterdir()] == ["rank-3.trace.json.gz"]
    assert printed == []


def test_a_run_that_ends_while_tracing_writes_what_there_is(tmp_path):
    printed = []
    train(tmp_path, 10, SKIPPED_STEPS + 2, printed.append)
    assert json.loads((tmp_path / "profile/summary.json").read_text())["num_steps"] == 2
    assert traced_steps(tmp_path / "profile/rank-0.trace.json.gz")[:2] == ["ProfilerStep#3", "ProfilerStep#4"]
    assert "over 2 traced" in printed[0]


def test_an_exception_of_the_run_is_raised_behind_the_profile(tmp_path):
    with pytest.raises(RuntimeError, match="of the run"):
        train(tmp_path, 10, 8, fails_after=SKIPPED_STEPS + 1)
    assert json.loads((tmp_path / "profile/summary.json").read_text())["num_steps"] == 1


@pytest.mark.parametrize("num_steps", range(SKIPPED_STEPS))
def test_a_run_that_ends_before_says_that_nothing_was_recorded(tmp_path, num_steps):
    printed = []
    train(tmp_path, 2, num_steps, printed.append)
    assert printed == [f"profile: nothing was recorded: the run ended after {num_steps} steps, and tracing starts after 3"]
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_ends_with_the_skipped_steps_says_that_no_step_was_finished(tmp_path):
    printed = []
    train(tmp_path, 2, SKIPPED_STEPS, printed.append)
    assert printed == [f"profile: no traced step was finished; the trace in {tmp_path}/profile holds a part of one"]


def test_a_folder_that_cannot_be_made_is_reported_and_training_continues(tmp_path, capfd):
    (tmp_path / "profile").write_text("a file in the way")
    printed = []
    assert train(tmp_path, 2, 8, printed.append) == train(tmp_path, 0, 8)
    reported = capfd.readouterr().err
    assert "rank 0: profile: folder: FileExistsError" in reported
    assert "rank 0: profile: summary: NotADirectoryError" in reported
    assert "over 2 traced" in printed[0]  # reported nevertheless


def test_a_full_disk_is_reported_and_leaves_no_part_of_a_trace(tmp_path, capfd):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        losses = train(tmp_path, 2, 8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(losses) == 8
    assert "rank 0: profile: trace: OSError" in capfd.readouterr().err
    assert {file.name for file in (tmp_path / "profile").iterdir()} == {"summary.md", "summary.json"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--profile", "2", "--dry-run"],
            "--profile traces training steps after the first 3, and --dry-run trains one at most",
        ),
        (
            ["--profile", "2", "--eval-only"],
            "--profile traces training steps after the first 3, and --eval-only trains one at most",
        ),
        (["--profile", "0"], "--profile 0: STEPS is the number of steps to trace, 1 or more"),
        (["--profile", "-1"], "--profile -1: STEPS is the number of steps to trace, 1 or more"),
        (["--profile", "two"], "argument --profile: invalid int value: 'two'"),
    ],
)
def test_the_flag_is_refused_where_it_can_trace_nothing(options, message):
    from isoflop.cli.pretrain import main

    with pytest.raises(UserError, match=re.escape(message)):
        main(["recipes/quickstart.yaml", *options], "isoflop pretrain")


# --- through the training command ---------------------------------------------------------------------------


def test_a_profiled_run_trains_as_one_that_is_not(toy_recipe, run_in_process, uninterrupted, capsys):
    recipe = toy_recipe("profiled")
    assert run_in_process(recipe, profile_steps=2) == 0
    assert curve_of(recipe) == curve_of(uninterrupted["llama"])
    assert weights_of(recipe) == weights_of(uninterrupted["llama"])
    folder = Path(recipe.output.run_dir) / "profile"
    assert {file.name for file in folder.iterdir()} == {"rank-0.trace.json.gz", "summary.md", "summary.json"}
    assert traced_steps(folder / "rank-0.trace.json.gz") == ["ProfilerStep#3", "ProfilerStep#4"]
    categories = {row["name"] for row in json.loads((folder / "summary.json").read_text())["categories"]}
    assert {"matrix products", "attention", "loss and head", "optimizer and clipping"} <= categories
    assert capsys.readouterr().out.count("profile of rank 0: ") == 1
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_a_profile_longer_than_the_run_has_the_steps_that_were_trained(toy_recipe, run_in_process):
    recipe = toy_recipe("short")
    assert run_in_process(recipe, profile_steps=50) == 0
    summary = json.loads((Path(recipe.output.run_dir) / "profile/summary.json").read_text())
    assert summary["num_steps"] == 10 - SKIPPED_STEPS


@pytest.mark.distributed
def test_each_rank_writes_its_trace_and_one_prints(write_recipe):
    file = write_recipe("two")
    done = launch("2cpu_ddp", file, "--profile", "1")
    folder = Path(load_recipe(file).output.run_dir) / "profile"
    traces = {f"rank-{rank}.trace.json.gz" for rank in (0, 1)}
    assert {path.name for path in folder.iterdir()} == traces | {"summary.md", "summary.json"}
    assert (done.stdout + done.stderr).count("profile of rank 0: ") == 1
    assert "communication" in {row["name"] for row in json.loads((folder / "summary.json").read_text())["categories"]}
