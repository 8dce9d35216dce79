"""The command line: ``mercer demo | fit | predict | report``.

Calls the estimators and prints; mistakes of the user end in one sentence and exit code 2. Results go to
standard output, progress and notes to standard error. Heavy imports wait until a command needs them.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mercer._tables import UserError, check_writable, complete_rows, encode, encode_like, is_number, read_csv, say

if TYPE_CHECKING:
    import pandas as pd

app = typer.Typer(
    help="Gaussian processes: fit a table, predict with uncertainty, read what was fitted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Task(StrEnum):
    """What to predict."""

    auto = "auto"
    regression = "regression"
    classification = "classification"
    counts = "count"


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn mistakes of the user into one sentence and exit code 2."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        say(f"error: {error}")
        raise typer.Exit(2) from None


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Picture to write.")] = Path("mercer-demo.png"),
    quick: Annotated[bool, typer.Option(help="Quarterly instead of monthly means.")] = False,
) -> None:
    """Forecast ten held-out years of Mauna Loa CO₂, judge the forecast and draw it."""
    start = time.perf_counter()
    with user_errors():
        from mercer.demo import draw, forecast_co2, load_co2

        check_writable(output)
        series = load_co2(months=3 if quick else 1)
        say(f"fitting {len(series.y)} {series.label} up to {series.t[-1, 0]:.1f} …")
        forecast = forecast_co2(series)
        print_report(forecast.model, ["year"])
        scores = forecast.scores
        typer.echo(
            f"\nforecast of {len(series.y_test)} held-out {series.label}, "
            f"{series.t_test[0, 0]:.1f} to {series.t_test[-1, 0]:.1f}"
        )
        typer.echo(f"  RMSE {scores['rmse']:.2f} ppm, NLPD {scores['nlpd']:.2f} nats")
        typer.echo(f"  inside the 50% interval: {scores['coverage_50']:.0%}, 95%: {scores['coverage_95']:.0%}")
        draw(forecast, output)
    typer.echo(f"picture: {output} ({time.perf_counter() - start:.0f} s in all)")


@app.command()
def fit(
    data: Annotated[Path, typer.Argument(help="CSV file with a header.")],
    target: Annotated[str, typer.Option(help="Column to predict.")],
    task: Annotated[Task, typer.Option(help="auto: classes if text or two values, else regression.")] = Task.auto,
    kernel: Annotated[str, typer.Option(help="Kernel name, such as matern52 or rbf.")] = "matern52",
    output: Annotated[Path | None, typer.Option(help="Model file; by default the name of DATA with .mercer.")] = None,
    test_size: Annotated[float, typer.Option(min=0.0, max=0.9, help="Share of rows to hold out and judge on.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the held-out rows and of the fit.")] = 0,
) -> None:
    """Fit a table and save the model."""
    with user_errors():
        import numpy as np
        from sklearn.exceptions import ConvergenceWarning

        import mercer

        path = output or data.with_suffix(".mercer")
        check_writable(path)
        frame = read_csv(data)
        if target not in frame.columns:
            raise UserError(f"--target {target!r} is not a column of {data}; it has {', '.join(frame.columns)}.")
        known = frame[target].notna()
        if not known.any():
            raise UserError(f"column {target!r} of {data} is empty: there is nothing to learn from.")
        if not known.all():
            say(f"note: {int((~known).sum())} of {len(frame)} rows dropped: no target")
        X = encode(frame[known].drop(columns=target))
        complete = complete_rows(X, "dropped")
        X, y = X[complete], frame[target][known][complete]
        chosen = choose_task(task, y)
        classes = {
            Task.regression: mercer.GPRegressor,
            Task.classification: mercer.GPClassifier,
            Task.counts: mercer.GPCountRegressor,
        }
        model = classes[chosen](kernel=kernel, random_state=seed)
        order = np.random.default_rng(seed).permutation(len(y))
        held, kept = np.split(order, [round(test_size * len(y))])
        say(f"fitting {type(model).__name__} on {len(kept)} rows and {X.shape[1]} columns …")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the report says it
            model.fit(X.iloc[kept], y.iloc[kept].to_numpy())
        model.save(path)
        print_report(model, list(X.columns))
        if len(held):
            typer.echo(f"\n{len(held)} held-out rows: {judge(model, X.iloc[held], y.iloc[held].to_numpy())}")
    typer.echo(f"model: {path}")


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="Model file from `mercer fit`.")],
    data: Annotated[Path, typer.Argument(help="CSV file with the input columns.")],
    output: Annotated[Path | None, typer.Option(help="CSV file to write; standard output by default.")] = None,
) -> None:
    """Predict the rows of a table: mean and std of y, or class probabilities; rows with gaps stay empty."""
    with user_errors():
        import numpy as np
        import pandas as pd

        import mercer

        if output is not None:
            check_writable(output)
        fitted: Any = mercer.load(model)
        if not hasattr(fitted, "feature_names_in_"):
            raise UserError(f"{model} was fitted on columns without names; predict in Python with mercer.load.")
        X = encode_like(read_csv(data), list(fitted.feature_names_in_))
        complete = complete_rows(X, "left empty")
        if hasattr(fitted, "predict_proba"):
            columns = [f"probability_{label}" for label in fitted.classes_]
            values = fitted.predict_proba(X[complete])
        else:
            mean, std = fitted.predict(X[complete], return_std=True)
            outputs = [""] if mean.ndim == 1 else [f"_{i}" for i in range(mean.shape[1])]
            columns = [f"{name}{output}" for name in ("mean", "std") for output in outputs]
            values = np.column_stack([mean, std])
        out = pd.DataFrame(np.nan, index=X.index, columns=columns)
        out.loc[complete] = values
        text = out.to_csv(output, index=False)
    if output is None:
        typer.echo(text, nl=False)
    else:
        typer.echo(f"predictions: {output}")


@app.command()
def report(model: Annotated[Path, typer.Argument(help="Model file from `mercer fit`.")]) -> None:
    """Say what was fitted: report, kernel in the user's units, findings."""
    with user_errors():
        import mercer

        fitted = mercer.load(model)
        print_report(fitted, [str(name) for name in getattr(fitted, "feature_names_in_", [])])


def print_report(model: Any, names: list[str]) -> None:
    """Print fit report, kernel, noise and the findings of ``diagnose``."""
    import numpy as np

    from mercer.display._text import kernel_text

    typer.echo(str(model.fit_report_))
    typer.echo(f"\nkernel, in the units of the columns and of y²\n{kernel_text(model.kernel_, names)}")
    if getattr(model, "noise_variance_", None) is not None:
        spread = ", ".join(f"{value:.4g}" for value in np.sqrt(np.atleast_1d(model.noise_variance_)))
        typer.echo(f"  noise sd {spread}, in units of y")
    findings = model.diagnose()
    typer.echo("\nfindings: none" if not findings else "\nfindings")
    for finding in findings:
        typer.echo(f"  {finding.code}: {finding.message}\n    cure: {finding.cure}")


def choose_task(task: Task, y: pd.Series) -> Task:
    """Return the task asked for; for auto, classes for text and two-valued targets, else regression."""
    if task is Task.auto:
        text, values = not is_number(y), y.nunique()
        task = Task.classification if text or values == 2 else Task.regression
        reason = "text" if text else f"{values} different number{'s' if values > 1 else ''}"
        say(f"note: {y.name!r} holds {reason}, so this is {task.value} (--task overrides)")
    if task is not Task.classification and not is_number(y):
        raise UserError(f"--task {task.value} needs a numeric target; {y.name!r} holds text.")
    return task


def judge(model: Any, X: pd.DataFrame, y: Any) -> str:
    """Return the scores on held-out rows as a sentence."""
    import numpy as np

    if hasattr(model, "predict_proba"):
        error, seen = np.mean(model.predict(X) != y), np.isin(y, model.classes_)
        if not seen.all():
            return f"error {error:.3f}; no log loss, since {int((~seen).sum())} rows are of classes held out entirely"
        return f"error {error:.3f}, log loss {-np.mean(model.log_predictive_density(X, y)):.3f} nats"
    nlpd = -float(np.mean(model.log_predictive_density(X, y)))
    mean, std = model.predict(X, return_std=True)
    inside = np.mean(np.abs(y - mean) <= 1.96 * std)
    return f"RMSE {np.sqrt(np.mean((y - mean) ** 2)):.4g}, NLPD {nlpd:.4g} nats, {inside:.0%} within 1.96 std"
