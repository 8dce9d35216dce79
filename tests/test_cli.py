"""The command line: whole rounds on small tables, and mistakes that end in a sentence and exit code 2."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from mercer import GPRegressor
from mercer._tables import UserError, encode, encode_like
from mercer.cli import app

N = 40


@pytest.fixture
def table(tmp_path):
    """A table with a number, a text column, a gap, and one target for each task."""
    generator = np.random.default_rng(0)
    size, colour = generator.uniform(0, 4, N), generator.choice(["red", "blue"], N)
    height = np.sin(size) + (colour == "red") + 0.1 * generator.standard_normal(N)
    frame = pd.DataFrame({"size": size, "colour": colour, "height": height})
    frame["kind"] = np.where(height > height.mean(), "tall", "short")
    frame["visits"] = generator.poisson(np.exp(height))
    frame.loc[3, "size"] = np.nan
    path = tmp_path / "plants.csv"
    frame.to_csv(path, index=False)
    return path


def run(*arguments, code=0):
    """Run the command line and return its result; a wrong exit code shows the output."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def keep(table, *columns):
    """Write a copy of the table with some of its columns."""
    path = table.with_name("part.csv")
    pd.read_csv(table)[list(columns)].to_csv(path, index=False)
    return path


def test_regression_from_table_to_predictions(table):
    data = keep(table, "size", "colour", "height")
    fitted = run("fit", data, "--target", "height", "--test-size", 0.2)
    assert "1 of 40 rows dropped" in fitted.stderr
    assert "one indicator for each of its 2 values" in fitted.stderr
    assert "held-out rows: RMSE" in fitted.stdout
    model, out = data.with_suffix(".mercer"), data.with_name("out.csv")
    run("predict", model, data, "--output", out)
    predicted, truth = pd.read_csv(out), pd.read_csv(data)["height"]
    assert list(predicted.columns) == ["mean", "std"]
    assert predicted["mean"].isna().to_list() == [i == 3 for i in range(N)]
    assert (predicted["std"].dropna() > 0).all()
    assert (predicted["mean"] - truth).abs().mean() < 0.3
    shown = run("report", model).stdout
    assert "lengthscale [size=" in shown
    assert "findings" in shown


def test_predictions_go_to_standard_output_alone(table):
    data = keep(table, "size", "height")
    run("fit", data, "--target", "height", "--output", table.with_name("m.mercer"))
    result = run("predict", table.with_name("m.mercer"), data)
    lines = result.stdout.splitlines()
    assert lines[0] == "mean,std"
    assert len(lines) == N + 1
    assert "left empty" in result.stderr


def test_text_target_is_classified(table):
    data = keep(table, "size", "colour", "kind")
    fitted = run("fit", data, "--target", "kind", "--kernel", "rbf", "--test-size", 0.25)
    assert "this is classification" in fitted.stderr
    assert "log loss" in fitted.stdout
    lines = run("predict", data.with_suffix(".mercer"), data).stdout.splitlines()
    assert lines[0] == "probability_short,probability_tall"
    assert sum(map(float, lines[1].split(","))) == pytest.approx(1.0)


def test_count_target(table):
    data = keep(table, "size", "visits")
    run("fit", data, "--target", "visits", "--task", "count")
    lines = run("predict", data.with_suffix(".mercer"), data).stdout.splitlines()
    assert lines[0] == "mean,std"
    assert float(lines[1].split(",")[0]) > 0


def test_quick_demo_forecasts_and_draws(tmp_path):
    picture = tmp_path / "demo.png"
    result = run("demo", "--quick", "--output", picture)
    assert picture.stat().st_size > 20_000
    assert "RMSE" in result.stdout
    assert "inside the 50% interval" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "absent.csv", "--target", "y"], "absent.csv does not exist"),
        (["fit", "TABLE", "--target", "weight"], "'weight' is not a column"),
        (["fit", "TABLE", "--target", "kind", "--task", "regression"], "needs a numeric target"),
        (["fit", "TABLE", "--target", "height", "--kernel", "no-such-kernel"], "kernel"),
        (["fit", "TABLE", "--target", "height", "--output", "no-such-folder/m.mercer"], "no-such-folder; make it"),
        (["demo", "--output", "no-such-folder/demo.png"], "no-such-folder; make it"),
        (["report", "absent.mercer"], "absent.mercer"),
        (["report", "TABLE"], "plants.csv"),
    ],
)
def test_mistakes_end_in_one_sentence(table, arguments, message):
    result = run(*[table if argument == "TABLE" else argument for argument in arguments], code=2)
    assert "error: " in result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"y": ["same"] * 9}, "at least 2 classes"),
        ({"y": [""] * 9}, "column 'y' of"),
        ({"y": range(9), "empty": [""] * 9}, "'empty' has 9 gaps in 9 rows"),
        ({"y": range(30), "x": ["n/k", *range(29)]}, "such as 'n/k'"),
    ],
)
def test_tables_that_cannot_be_learned_from(tmp_path, columns, message):
    path = tmp_path / "bad.csv"
    pd.DataFrame({"x": range(len(columns["y"])), **columns}).to_csv(path, index=False)
    assert message in run("fit", path, "--target", "y", code=2).stderr
    assert list(tmp_path.iterdir()) == [path]


def test_rows_without_a_target_are_counted(table):
    frame = pd.read_csv(table)[["size", "height"]].dropna()
    frame.loc[7:9, "height"] = np.nan
    frame.to_csv(table, index=False)
    assert "3 of 39 rows dropped: no target" in run("fit", table, "--target", "height").stderr


def test_a_single_number_as_target_is_predicted(tmp_path):
    path = tmp_path / "flat.csv"
    pd.DataFrame({"x": range(9), "y": 4.0}).to_csv(path, index=False)
    assert "1 different number," in run("fit", path, "--target", "y").stderr
    lines = run("predict", path.with_suffix(".mercer"), path).stdout.splitlines()
    assert float(lines[1].split(",")[0]) == pytest.approx(4.0)


def test_classes_that_are_held_out_entirely_do_not_end_the_fit(tmp_path):
    path = tmp_path / "rare.csv"
    pd.DataFrame({"x": range(22), "y": ["a", "b"] * 10 + ["c", "d"]}).to_csv(path, index=False)
    fitted = run("fit", path, "--target", "y", "--test-size", 0.5)
    assert "classes held out entirely" in fitted.stdout
    assert path.with_suffix(".mercer").exists()


def test_models_of_python_with_several_outputs(tmp_path):
    generator = np.random.default_rng(0)
    frame = pd.DataFrame(generator.uniform(size=(12, 2)), columns=["p", "q"])
    path, data = tmp_path / "m.mercer", tmp_path / "d.csv"
    frame.to_csv(data, index=False)
    model = GPRegressor(optimizer=None).fit(frame, np.sin(frame.to_numpy()))
    model.save(path)
    assert "noise sd" in run("report", path).stdout
    out = tmp_path / "out.csv"
    run("predict", path, data, "--output", out)
    predicted = pd.read_csv(out)
    assert list(predicted.columns) == ["mean_0", "mean_1", "std_0", "std_1"]
    mean, std = model.predict(frame, return_std=True)
    np.testing.assert_allclose(predicted, np.column_stack([mean, std]), rtol=1e-12)


def test_models_without_column_names_are_reported_but_predict_in_python(tmp_path):
    path, data = tmp_path / "m.mercer", tmp_path / "d.csv"
    X = np.arange(8.0)[:, None]
    GPRegressor(optimizer=None).fit(X, X[:, 0]).save(path)
    pd.DataFrame({"x": [1.0]}).to_csv(data, index=False)
    assert "Matern52" in run("report", path).stdout
    assert "without names" in run("predict", path, data, code=2).stderr


def test_a_fit_that_did_not_converge_says_so_in_the_report_alone(table, monkeypatch, recwarn):
    monkeypatch.setattr("mercer.GPRegressor", partial(GPRegressor, max_iter=1))
    result = run("fit", keep(table, "size", "height"), "--target", "height")
    assert "did not converge" in result.stdout
    assert not [warning for warning in recwarn if "did not converge" in str(warning.message)]


def test_missing_input_column_is_named(table):
    run("fit", keep(table, "size", "height"), "--target", "height", "--output", table.with_name("m.mercer"))
    result = run("predict", table.with_name("m.mercer"), keep(table, "height"), code=2)
    assert "'size' is missing" in result.stderr


@pytest.mark.parametrize("content", ["", "a,b\n", 'a,b\n1,2,3,4\n"'])
def test_files_that_are_no_tables(tmp_path, content):
    path = tmp_path / "bad.csv"
    path.write_text(content)
    run("fit", path, "--target", "a", code=2)


def test_indicators_are_rebuilt_from_their_names(capsys):
    frame = pd.DataFrame({"colour": ["red", "blue", None], "size": [1, 2, 3], "new": [True, False, True]})
    coded = encode(frame)
    assert list(coded.columns) == ["colour=blue", "colour=red", "size", "new"]
    np.testing.assert_array_equal(coded.loc[:1, "colour=red"], [1.0, 0.0])
    assert coded.loc[2, ["colour=blue", "colour=red"]].isna().all()
    other = encode_like(frame.assign(colour="green")[["size", "new", "colour"]], list(coded.columns))
    assert list(other.columns) == list(coded.columns)
    assert not other[["colour=blue", "colour=red"]].to_numpy().any()
    assert "not seen: green" in capsys.readouterr().err


def test_text_with_many_values_is_refused():
    with pytest.raises(UserError, match="'id' is text with 30 different values"):
        encode(pd.DataFrame({"id": [f"plant {i}" for i in range(30)]}))


def test_text_in_a_numeric_column_is_shown():
    with pytest.raises(UserError, match="'size' must hold numbers; found 'big'"):
        encode_like(pd.DataFrame({"size": ["1", "big"]}), ["size"])
