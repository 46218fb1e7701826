"""Tables as people have them: every form and name of column, and each fault by its row, column and remedy."""

import csv
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import ROOT

from isoflop.scaling.options import FitOptions
from isoflop.scaling.table import read_table
from isoflop.utils.errors import UserError

SHARED = ROOT.parent / "shared/data"
shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no reference data beside the checkout")
SIZES = (1e8, 2e8, 4e8)
ROWS = [
    {"parameters": n, "tokens": d, "loss": round(1.7 + 400 / n**0.34 + 2000 / d**0.36, 6)}
    for n in SIZES
    for d in (2e9, 8e9, 3e10)
]


def renamed(rows, **names):
    return [{names.get(key, key): value for key, value in row.items()} for row in rows]


def write_csv(file, rows):
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(file)


def changed(number, **cells):
    """The rows with some cells of one, counted from 1, set."""
    return [row | cells if i == number else dict(row) for i, row in enumerate(ROWS, start=1)]


def test_every_form_reads_alike(tmp_path):
    files = [tmp_path / name for name in ("t.csv", "t.parquet", "t.json", "t.jsonl")]
    write_csv(files[0], ROWS)
    pa.parquet.write_table(pa.Table.from_pylist(ROWS), files[1])
    files[2].write_text(json.dumps(ROWS))
    files[3].write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for file in files:
        measured = read_table(str(file))
        for name, values in zip(("parameters", "tokens", "loss"), np.array([list(row.values()) for row in ROWS]).T, strict=True):
            assert getattr(measured.points, name).tolist() == values.tolist(), file
        assert measured.points.flops.tolist() == [6 * row["parameters"] * row["tokens"] for row in ROWS]
        assert measured.points.weights.tolist() == [1.0] * 9
        assert measured.notes == [f"FLOPs are 6 N D: {file.name} has no column of them"]
        assert (measured.origin, measured.counts, measured.curves) == (f"9 points of {file.name}", "total", [])


@pytest.mark.parametrize(
    ("names", "counts"),
    [
        ({"parameters": "Model Size", "tokens": "Training Tokens", "loss": "final_loss"}, "total"),
        ({"parameters": "n", "tokens": "throughput/total_tokens", "loss": "Validation-Loss"}, "total"),
        ({"parameters": "num_parameters", "tokens": "D", "loss": "val_loss"}, "total"),
        ({"parameters": "non_embedding_params", "tokens": "tokens", "loss": "loss"}, "without_vocabulary"),
    ],
)
def test_common_names_are_known(names, counts, tmp_path):
    measured = read_table(write_csv(tmp_path / "t.csv", renamed(ROWS, **names)))
    assert measured.points.tokens[1] == 8e9
    assert measured.counts == counts


def test_tokens_follow_from_flops_and_given_flops_stay(tmp_path):
    rows = [
        {"n": row["parameters"], "Training FLOPs": 6.6 * row["parameters"] * row["tokens"], "loss": row["loss"]} for row in ROWS
    ]
    measured = read_table(write_csv(tmp_path / "t.csv", rows))
    assert measured.points.tokens == pytest.approx([1.1 * row["tokens"] for row in ROWS])
    assert measured.points.flops.tolist() == [row["Training FLOPs"] for row in rows]
    assert measured.notes == ["tokens are C / (6 N): t.csv has no column of them"]


def test_weights_and_unique_tokens_are_taken_along(tmp_path):
    rows = [row | {"weight": i, "unique_tokens": 1e9} for i, row in enumerate(ROWS, start=1)]
    points = read_table(write_csv(tmp_path / "t.csv", rows)).points
    assert points.weights.tolist() == list(range(1, 10))
    assert points.unique_tokens.tolist() == [1e9] * 9


def test_a_column_can_be_named_and_rows_chosen(tmp_path):
    rows = [row | {"N_noemb": row["parameters"] / 2, "set": name} for name in ("c4", "web") for row in ROWS]
    file = write_csv(tmp_path / "t.csv", renamed(rows, parameters="N"))
    with pytest.raises(UserError, match=r"t\.csv: columns N and N_noemb may both be the parameters; say which by --parameters"):
        read_table(file)
    measured = read_table(file, FitOptions(parameters="N_noemb", where=("set=web",)))
    assert measured.points.parameters[0] == 0.5e8
    assert measured.counts == "without_vocabulary"
    assert measured.origin == "9 points of t.csv where set=web"


def test_several_rows_of_a_run_are_its_curve(tmp_path):
    rows = [
        {"run": f"run {i}", "N": row["parameters"], "tokens": row["tokens"] * share, "loss": row["loss"] + 1 - share}
        for i, row in enumerate(ROWS)
        for share in (1.0, 0.25, 0.5)
    ]
    measured = read_table(write_csv(tmp_path / "t.csv", rows))
    assert measured.points.tokens.tolist() == [row["tokens"] for row in ROWS]
    assert measured.points.loss == pytest.approx([row["loss"] for row in ROWS])
    assert len(measured.curves) == 9
    curve = measured.curves[1]
    assert (curve.name, curve.parameters, curve.tokens.tolist()) == ("run 1", 1e8, [2e9, 4e9, 8e9])
    assert curve.loss == pytest.approx([ROWS[1]["loss"] + gap for gap in (0.75, 0.5, 0)])
    assert "its last row is its point (9 points of 27 rows)" in measured.notes[-1]


def test_a_name_over_several_sizes_is_no_run(tmp_path):
    measured = read_table(write_csv(tmp_path / "t.csv", [row | {"name": "sweep"} for row in ROWS]))
    assert (len(measured.points.loss), measured.curves) == (9, [])


def test_repeated_rows_count_once_and_seeds_are_kept(tmp_path):
    seed = ROWS[2] | {"loss": ROWS[2]["loss"] + 0.01}
    measured = read_table(write_csv(tmp_path / "t.csv", [*ROWS, ROWS[0], seed, ROWS[0], ROWS[4]]))
    assert len(measured.points.loss) == 10
    assert measured.warnings == ["t.csv: rows 10, 12, 13 repeat an earlier row's N, D and loss; each is counted once"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (changed(3, loss="n/a"), "t.csv: row 3: loss = 'n/a' is not a number; correct or remove it"),
        (changed(3, loss="NaN"), "t.csv: row 3: loss = nan is not finite"),
        (changed(3, tokens="inf"), "t.csv: row 3: tokens = inf is not finite"),
        (changed(3, parameters=0), "t.csv: row 3: parameters = 0 is not positive"),
        (changed(3, loss=-2.5), "t.csv: row 3: loss = -2.5 is not positive"),
        (changed(3, loss=""), "t.csv: row 3: loss is empty"),
        (
            [row | {"loss": 0} for row in ROWS],
            "rows 1, 2, 3, 4, 5, 6, 7, 8 and 1 more: loss = 0 is not positive; correct or",
        ),
        (ROWS[:5], "t.csv has 5 points, and a law of 5 coefficients needs 6 or more; add runs"),
        (renamed(ROWS, loss="c4"), "t.csv has no column of losses by name; name it by --loss-column; its columns: parameters"),
        (renamed(ROWS, parameters="size"), "t.csv has no column of model sizes by name; name it by --parameters, or add one"),
        (renamed(ROWS, tokens="seen"), "t.csv has no column of tokens or FLOPs by name; name one by --tokens or --flops"),
        ([row | {"val_loss": 3} for row in ROWS], "columns loss and val_loss may both be the loss; say which by --loss-column"),
        ([row | {"weight": 1, "weights": 1} for row in ROWS], "weight and weights may both be the weight; keep one of them"),
    ],
)
def test_a_fault_is_named_by_row_column_and_remedy(rows, message, tmp_path):
    with pytest.raises(UserError) as error:
        read_table(write_csv(tmp_path / "t.csv", rows))
    assert message in str(error.value)


def scaled(key, factor, **more):
    return [row | {key: row[key] * factor} | {name: make(row) for name, make in more.items()} for row in ROWS]


def flops(factor):
    return lambda row: 6 * row["parameters"] * row["tokens"] * factor


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (scaled("tokens", 1e-9), "tokens (2 to 30) looks like billions, and parameters, tokens and FLOPs are counted in ones:"
         " multiply it by 1e+09"),
        (scaled("tokens", 1e-6, C=flops(1)), "tokens (2000 to 3e+04) looks like millions"),
        (scaled("parameters", 1e-6), "parameters (100 to 400) looks like millions"),
        (scaled("parameters", 1e-6, C=flops(1)), "parameters (100 to 400) looks like millions"),
        (scaled("parameters", 1e-9, C=flops(1)), "parameters (0.1 to 0.4) looks like billions"),
        (scaled("tokens", 1, C=flops(1e-18)), "C (1.2 to 72) looks like EFLOPs"),
        (scaled("tokens", 1, C=flops(1 / 8.64e19)), "looks like PF-days, and parameters, tokens and FLOPs are counted in ones:"
         " multiply it by 8.64e+19"),
        (scaled("tokens", 1, C=flops(1 / 3)), "C is 0.333 of 6 N D in most rows, and training costs about 6 N D;"
         " multiply it by 3"),
        (changed(4, tokens=8.0), "row 4: D/N = 4e-08, and the other rows have"),
        ([row | {"C": flops(100 if i == 6 else 1)(row)} for i, row in enumerate(ROWS)],
         "row 7: C = 4.8e+20, but 6 N D = 4.8e+18; the other rows agree within a factor of 3"),
    ],
)  # fmt: skip
def test_mixed_units_name_the_column_and_the_factor(rows, message, tmp_path):
    with pytest.raises(UserError) as error:
        read_table(write_csv(tmp_path / "t.csv", rows))
    assert message in str(error.value)


def test_budgets_in_other_units_are_noticed_without_tokens(tmp_path):
    rows = [{"n": row["parameters"], "compute": flops(1e-21)(row), "loss": row["loss"]} for row in ROWS]
    with pytest.raises(UserError, match=r"compute \(0\.0012 to 0\.072\) looks like ZFLOPs"):
        read_table(write_csv(tmp_path / "t.csv", rows))


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (FitOptions(tokens="token"), "--tokens token: t.csv has no such column; did you mean tokens?"),
        (FitOptions(where=("set",)), "--where set: not COLUMN=VALUE of a column of t.csv"),
        (FitOptions(where=("loss=7",)), "--where loss=7: no row of t.csv has it"),
    ],
)
def test_a_selection_that_fits_nothing_is_refused(selection, message, tmp_path):
    with pytest.raises(UserError) as error:
        read_table(write_csv(tmp_path / "t.csv", ROWS), selection)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", b"", "is neither a table (.csv, .parquet, .json, .jsonl) nor a folder of runs"),
        ("t.csv", b"n,d,loss\n", "has no rows"),
        ("t.csv", b"n,d,loss\n1,2,3,4\n", "row 1 has more cells than the header has names"),
        ("t.csv", b"n,d,loss\n1,\xff,3\n", "byte 11 is not UTF-8 text"),
        ("t.json", b'{"n": [1]', "t.json is not JSON"),
        (
            "t.json",
            b'[{"n": 1, "d": 2, "loss": 3, "n": 4}]',
            "t.json is not JSON (the key n is given twice; delete one",
        ),
        ("t.jsonl", b'{"n": 1, "d": 2, "n": 4}', "t.jsonl is not JSON (the key n is given twice"),
        ("t.csv", b"n,loss,d,loss\n1,2,3,4\n", "t.csv: the header names the column loss twice; rename or delete one of the two"),
        ("t.json", b"[1, 2]", "t.json: not a list of objects"),
        ("t.parquet", b"no table", "t.parquet is no Parquet file"),
    ],
)
def test_a_file_that_is_no_table_is_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read_table(str(tmp_path / name))
    assert message in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.csv cannot be read: No such file or directory; give a table or folders of runs"):
        read_table(str(tmp_path / "gone.csv"))


@shared
def test_published_tables_are_read_or_refused_by_name():
    points = read_table(str(SHARED / "isoflops_curves.json")).points
    assert (len(points.loss), points.flops.min(), points.flops.max()) == (72, 6e18, 3e21)
    chosen = FitOptions(parameters="N", loss="loss_c4_val", where=("dataset=c4_original",))
    assert len(read_table(str(SHARED / "gadre_points.csv"), chosen).points.loss) == 34
    with pytest.raises(UserError, match=r"no column of model sizes by name; name it by --parameters"):
        read_table(str(SHARED / "olmo_ladder_points.csv"), FitOptions(loss="c4_loss"))
