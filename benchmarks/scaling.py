"""Do time and memory of the sparse inverse Cholesky family grow in proportion to the number of rows?

One evaluation of the evidence with its gradient, at hyperparameters that differ from those before, on points uniform
in the unit cube: Matérn-3/2, one lengthscale per dimension, 20 neighbours, float64. The response form is what Gaussian
data are fitted by; the latent form has sites, an incomplete factor and conjugate gradients, as other likelihoods do,
here for the sites of Gaussian data. Order and neighbours are planned once and timed apart. Every size runs in a process
of its own after an evaluation of few rows, which compiles; memory is its highest less what it was at that point.

Run ``python benchmarks/scaling.py [--n N ...] [--forms FORM ...] [--device DEVICE]``. Keys of the last line, with FORM
``response`` or ``latent`` and N such as ``1e5``: ``FORM_seconds_N``, ``FORM_plan_seconds_N``, ``FORM_mb_N`` (MiB); and
from each size to the next, per factor of ten, ``FORM_time_ratio_N`` and ``FORM_memory_ratio_N``; ``time_ratio_N`` and
``memory_ratio_N`` are the larger ones over the forms.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
from _harness import child, finish, parser, reset_peak, resident_mb, table, timed

from mercer._typing import Data
from mercer.families import SparseInverseCholesky
from mercer.families.base import Prior
from mercer.inference.conjugate import Conjugate
from mercer.inference.evidence import Evidence
from mercer.kernels import Matern32
from mercer.likelihoods import Gaussian
from mercer.model import Model
from mercer.policy import NumericalPolicy

FORMS = ("response", "latent")
D = 3
MIB = 2.0**20
WARM_UP = 500  # rows
MEASURED = ("seconds", "plan_seconds", "mb")


def evaluate(n: int, form: str, n_neighbors: int, device: str, repeats: int) -> dict[str, float]:
    """Plan and evaluate in this process; return seconds of both, the median of the latter."""
    generator = torch.Generator().manual_seed(0)
    policy = NumericalPolicy(device=torch.device(device))
    X = torch.rand(n, D, generator=generator, dtype=policy.dtype)
    y = torch.sin(6 * X[:, 0]) + X[:, 1] + 0.3 * torch.randn(n, generator=generator, dtype=policy.dtype)
    data = Data(X.to(device), y.to(device), torch.ones(n, dtype=policy.dtype, device=device))
    prior = Prior(Matern32([0.25 * (j + 1) for j in range(D)], outputscale=1.0).to(device))
    model = Model(prior, Gaussian(0.1).to(device), SparseInverseCholesky(n_neighbors, form=form), Conjugate(), policy)

    def finished(call):
        value = call()
        if device != "cpu":
            torch.cuda.synchronize(device)
        return value

    planning, plan = timed(lambda: finished(lambda: model.family.plan(model.prior, data.X, policy)))
    evidence = Evidence(model, plan, data)
    theta = evidence.vector.read()
    seconds = [timed(lambda i=i: finished(lambda: evidence(theta + 1e-3 * i)))[0] for i in range(repeats)]
    return {"seconds": statistics.median(seconds), "plan_seconds": planning}


def measure(n: int, form: str, n_neighbors: int, device: str, repeats: int) -> dict[str, float]:
    """Do the same after a warm-up, and measure memory too, in MiB: the device's where it has its own."""
    evaluate(WARM_UP, form, n_neighbors, device, 1)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        return evaluate(n, form, n_neighbors, device, repeats) | {"mb": torch.cuda.max_memory_allocated(device) / MIB}
    before = resident_mb()
    reset_peak()
    measured = evaluate(n, form, n_neighbors, device, repeats)
    return measured | {"mb": resident_mb("VmHWM") - before}


def label(n: int) -> str:
    """Return n as it stands in the keys: 1e5, 25e3, 300."""
    zeros = len(str(n)) - len(str(n).rstrip("0"))
    return f"{n // 10**zeros}e{zeros}" if zeros > 2 else str(n)


def ratios(form: str, sizes: Sequence[int], found: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return by what factor time and memory grow per factor of ten in n, from each size to the next."""
    out = {}
    for i in range(1, len(sizes)):
        decades = math.log10(sizes[i] / sizes[i - 1])
        for name, key in (("time", "seconds"), ("memory", "mb")):
            # temporaries of small problems may fit in what the warm-up left behind
            ratio = (found[i][key] / max(found[i - 1][key], 1e-3)) ** (1 / decades)
            out[f"{form}_{name}_ratio_{label(sizes[i])}"] = ratio
    return out


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure in child processes, print and finish with the JSON line."""
    options = parser(__doc__)
    options.add_argument("--n", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="numbers of rows")
    options.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="run these alone")
    options.add_argument("--n-neighbors", type=int, default=20, help="neighbours")
    options.add_argument("--repeats", type=int, default=3, help="evaluations of each size, fewer from a million on")
    options.add_argument("--device", default="cpu", help="cpu or cuda")
    options.add_argument("--child", action="store_true", help="only measure one size and form in this process")
    chosen = options.parse_args(arguments)
    if chosen.child:
        (n,), (form,) = chosen.n, chosen.forms
        finish(measure(n, form, chosen.n_neighbors, chosen.device, chosen.repeats))
        return
    sizes = sorted(chosen.n)
    values: dict[str, float] = {}
    for form in chosen.forms:
        found = []
        for n in sizes:
            repeats = min(chosen.repeats, max(1, 1_000_000 // n))
            same = ("--n-neighbors", str(chosen.n_neighbors), "--device", chosen.device, "--repeats", str(repeats))
            found.append(child(__file__, "--child", "--n", str(n), "--forms", form, *same))
            values |= {f"{form}_{key}_{label(n)}": found[-1][key] for key in MEASURED}
        title = f"{form} form, {chosen.n_neighbors} neighbours, d = {D}, {chosen.device}"
        rows = [[f"{n:,}", *[each[key] for key in MEASURED]] for n, each in zip(sizes, found, strict=True)]
        header = ["rows", "evaluation (s)", "plan (s)", "memory (MiB)"]
        table(f"{title}, {torch.get_num_threads()} threads", header, rows)
        values |= ratios(form, sizes, found)
    for name in [f"{each}_ratio_{label(n)}" for n in sizes[1:] for each in ("time", "memory")]:
        values[name] = max(values[f"{form}_{name}"] for form in chosen.forms)
    finish(values)


if __name__ == "__main__":
    main()
