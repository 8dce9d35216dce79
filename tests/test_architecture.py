"""The import contracts of pyproject.toml hold, and each of them refuses an import that it should refuse."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports('pyproject.toml', cache_dir=None))"


@pytest.fixture
def lint(tmp_path):
    """A function that adds imports, {file: line}, to a copy of the package and returns what lint-imports says."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "src" / "mercer", tmp_path / "mercer", ignore=shutil.ignore_patterns("__pycache__"))

    def run(additions):
        for name, line in additions.items():
            with open(tmp_path / "mercer" / name, "a") as file:
                file.write(f"\n{line}\n")
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        command = [sys.executable, "-c", LINT]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)

    return run


def test_the_package_keeps_its_contracts(lint):
    result = lint({})
    assert result.returncode == 0, result.stdout


def test_each_wrong_arrow_is_refused(lint):
    wrong = {
        "kernels/evaluate.py": "import mercer.families",
        "linalg/cholesky.py": "import mercer.kernels",
        "inference/hyper.py": "import mercer.resolve",
        "resolve.py": "import mercer",
        "estimators/regressor.py": "import mercer.display",
        "families/exact.py": "import mercer.likelihoods",
        "likelihoods/base.py": "import mercer.kernels",
        "estimators/persistence.py": "import gpytorch",
        "inference/base.py": "from linear_operator.operators import LinearOperator",
        "families/base.py": "import mercer.testing.kernel",
        "unplaced.py": "import math",
        "geometry/ordering.py": "from numba import njit",
    }
    result = lint(wrong)
    assert result.returncode == 1
    for arrow in [
        "mercer.kernels.evaluate -> mercer.families",
        "mercer.linalg.cholesky -> mercer.kernels",
        "mercer.inference.hyper -> mercer.resolve",
        "mercer.resolve -> mercer ",
        "mercer.estimators.regressor -> mercer.display",
        "mercer.families.exact -> mercer.likelihoods",
        "mercer.likelihoods.base -> mercer.kernels",
        "mercer.estimators.persistence -> gpytorch",
        "mercer.inference.base -> linear_operator",
        "mercer.families.base -> mercer.testing.kernel",
        "unplaced",
        "mercer.geometry.ordering -> numba",
    ]:
        assert arrow in result.stdout, f"{arrow} passes:\n{result.stdout}"
