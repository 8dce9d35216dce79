"""Tables for the command line: reading CSV, text columns as indicators, and the same columns again later.

The names of the inputs carry the encoding (``colour=red``), so a saved model needs no other record of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    import pandas as pd

MAX_CATEGORIES = 20  # more indicator columns than this are rarely what a kernel should see


class UserError(ValueError):
    """A mistake in a file or an option, with its cure."""


def say(text: str) -> None:
    """Print progress or a note to standard error."""
    typer.echo(text, err=True)


def read_csv(path: Path) -> pd.DataFrame:
    """Read a CSV file with a header; raise UserError with the reason when it cannot be read."""
    import pandas as pd

    if not path.exists():
        raise UserError(f"{path} does not exist.")
    try:
        frame = pd.read_csv(path, skipinitialspace=True)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as reason:
        raise UserError(f"{path} is not a CSV table: {reason}") from None
    if frame.empty:
        raise UserError(f"{path} has no rows.")
    return frame


def check_writable(path: Path) -> None:
    """Raise UserError if ``path`` cannot be a file, before the work whose result it is to hold."""
    if path.is_dir():
        raise UserError(f"--output {path} is a folder; name a file in it.")
    if not path.resolve().parent.is_dir():
        raise UserError(f"--output {path}: there is no folder {path.resolve().parent}; make it first.")


def complete_rows(X: pd.DataFrame, fate: str) -> Any:
    """Return which rows have a finite number in every column, (n,) bool; say how many are ``fate`` for lack of one.

    Raises
    ------
    UserError
        No row is complete.
    """
    import numpy as np

    finite = np.isfinite(X.to_numpy())
    complete = finite.all(axis=1)
    if not complete.any():
        gaps = (~finite).sum(axis=0)
        raise UserError(
            f"no row is complete; input column {X.columns[gaps.argmax()]!r} has {gaps.max()} gaps in {len(X)} rows. "
            "Fill them or remove the column."
        )
    if not complete.all():
        say(f"note: {int((~complete).sum())} of {len(X)} rows {fate}: a missing or infinite input")
    return complete


def encode(frame: pd.DataFrame) -> pd.DataFrame:
    """Return float columns; text columns become indicators named ``column=value``.

    Raises
    ------
    UserError
        A text column has more than 20 values, or no column is left.
    """
    names: list[str] = []
    for name in frame.columns:
        if is_number(frame[name]):
            names.append(str(name))
            continue
        values = sorted(frame[name].dropna().astype(str).unique())
        if len(values) > MAX_CATEGORIES:
            raise UserError(
                f"column {name!r} is text with {len(values)} different values (such as {_not_a_number(values)!r}); "
                "remove it or turn it into numbers."
            )
        say(f"note: column {name!r} is text: one indicator for each of its {len(values)} values")
        names += [f"{name}={value}" for value in values]
    if not names:
        raise UserError("the table has no input column beside the target.")
    return encode_like(frame, names)


def encode_like(frame: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """Return the columns ``names`` as floats, rebuilding the indicators that :func:`encode` named.

    Raises
    ------
    UserError
        A column is missing, or is text where numbers are needed.
    """
    import pandas as pd

    columns: dict[str, Any] = {}
    for name in names:
        source, value = _source(name, frame)
        if source is None:
            present = ", ".join(map(str, frame.columns))
            raise UserError(f"input column {name!r} is missing; the table has {present}.")
        column = frame[source]
        if value is not None:
            columns[name] = (column.astype(str) == value).astype(float).where(column.notna())
        elif is_number(column):
            columns[name] = column.astype(float)
        else:
            raise UserError(f"column {name!r} must hold numbers; found {_not_a_number(column.dropna())!r}.")
    for source in {_source(name, frame)[0] for name in names if name not in frame.columns}:
        pairs = [_source(name, frame) for name in names]
        new = set(frame[source].dropna().astype(str)) - {value for column, value in pairs if column == source}
        if new:
            examples = ", ".join(sorted(new)[:5])
            say(f"note: column {source!r} holds values that the model has not seen: {examples}")
    return pd.DataFrame(columns, index=frame.index)


def is_number(column: pd.Series) -> bool:
    """Return whether a column holds numbers or booleans."""
    import pandas as pd

    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_complex_dtype(column)


def _not_a_number(values: Any) -> str:
    """Return the first of some texts that is no number, or else the first: what to repair in a column of numbers."""
    import pandas as pd

    texts = pd.Series(values, dtype=object)
    bad = texts[pd.to_numeric(texts, errors="coerce").isna()]
    return str((texts if bad.empty else bad).iloc[0])


def _source(name: str, frame: pd.DataFrame) -> tuple[str | None, str | None]:
    """Return the table's column behind an input, and the category it indicates (None for a number)."""
    if name in frame.columns:
        return name, None
    cuts = [i for i, letter in enumerate(name) if letter == "="]
    for i in cuts:
        if name[:i] in frame.columns:
            return name[:i], name[i + 1 :]
    return None, None
