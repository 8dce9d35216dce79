"""What is to be said of a solution, and against it: the report's figures and its warnings."""

from __future__ import annotations

import math

from mercer.pde.gauss_newton import STALLED, STOPPED
from mercer.pde.grid_posterior import SINGULAR
from mercer.pde.priors import Trial
from mercer.pde.problem import Problem
from mercer.pde.report import Report

_SUSPECT, _SUSPECT_STEPS = 1e-2, 1e-3  # check above which a solution is warned of; of equations that are not linear
_CLEAN = 1e-9  # check below which steps that did not converge were stopped by rounding
_OPEN = 1e-4  # share of the prior variance from which a solution is not determined
_PLAIN = {  # what SciPy's L-BFGS-B says
    "CONVERGENCE": "converged",
    "ABNORMAL": "no step raises the evidence",
    "STOP": "reached the most iterations",
}
_FAR = 6.0  # standard deviations of a mean of squares of noise


def judge(report: Report, trial: Trial, problem: Problem) -> None:
    """Fill in a report from a solution, and warn of all that is wrong with it."""
    posterior = trial.posterior
    report.nugget, report.scale, report.log_evidence = posterior.nugget, posterior.scale, posterior.log_evidence
    report.surprise = posterior.surprise
    report.residual, report.boundary_error = trial.check.residual, trial.check.boundary
    plain = [text for start, text in _PLAIN.items() if trial.status.startswith(start)]
    report.status = plain[0] if plain else trial.status
    report.n_steps, report.n_evaluations = trial.n_steps, trial.n_evaluations
    report.n_rows = len(posterior.noise_variance)
    features = getattr(posterior, "features", None)
    report.n_features = 0 if features is None else features.size
    if trial.n_pruned:
        report.notes.append(f"{trial.n_pruned} component(s) of the prior had less than 1e-8 of its variance: pruned.")
    if not problem.pde.linear and report.method not in ("grid", "sylvester"):
        report.notes.append("the posterior is that of the last linearisation (Laplace's approximation).")
    for sensor, variance in zip(problem.sensors, problem.sensor_variance(posterior), strict=True):
        if sensor.noise is None:
            report.noise = float(variance[0].sqrt())
    _say_what_is_wrong(report, trial, problem)
    if not problem.sensors:
        _say_what_is_open(report, trial, problem)


def _say_what_is_wrong(report: Report, trial: Trial, problem: Problem) -> None:
    """Warn of equations, conditions and sensors that are not met, and of steps that did not converge."""
    check, sensors, pde = trial.check, problem.sensors, problem.pde
    suspect = _SUSPECT if pde.linear else _SUSPECT_STEPS
    if not check.worst <= suspect:
        met = f"the equation is met to {check.residual:.2g} at shifted nodes and conditions to {check.boundary:.2g}"
        if sensors:
            why = "observations contradict them, or have more noise than is said, or nodes are too few"
        elif check.boundary > suspect and not check.residual > min(suspect, 0.1 * check.boundary):
            why = f"{check.condition} contradicts another condition, at a corner perhaps, or needs more nodes"
        else:
            why = "the solution is not resolved. Take more nodes, or another kernel or method"
        report.warn(f"{met}: {why}.")
    if not pde.linear and trial.status in (STALLED, STOPPED) and not check.worst <= _CLEAN:
        report.warn(
            f"Gauss–Newton ended after {trial.n_steps} steps: {trial.status}. It may be no solution, and its "
            "standard deviation is not to be trusted. Raise max_steps, or take a smaller domain or a shorter time; the "
            "equation may have no solution."
        )
    for sensor, misfit in zip(sensors, problem.misfits(trial.posterior), strict=True):
        if misfit > 1 + _FAR * math.sqrt(2 / len(sensor.y)):
            what = f"∂{sensor.derivative} {sensor.field}" if sensor.derivative else sensor.field
            report.warn(
                f"{len(sensor.y)} observation(s) of {what} are {math.sqrt(misfit):.3g} standard deviations of their "
                "noise away from the solution (root mean square): they contradict it, or have more noise than is said."
            )


def _say_what_is_open(report: Report, trial: Trial, problem: Problem) -> None:
    """Warn where equation and conditions do not determine the solution."""
    guess = "the solution is the prior's guess there, and its standard deviation can be far too small. Add conditions"
    if report.method in ("features", "dense"):
        report.left_open = problem.left_open(trial.posterior, trial.kernels)
    # a prior with few waves leaves nothing open that conditions do not reach, so that they are counted too
    if lacking := problem.lacking():
        report.warn(f"fewer conditions than the equation has derivatives along {', '.join(lacking)}: {guess}.")
    elif report.left_open > _OPEN:
        share = f"{report.left_open:.1g} of the prior's variance of the solution"
        cause = "a constant or an eigenfunction is free, no condition reaches, or nodes are too few"
        report.warn(f"equation and conditions leave {share} somewhere ({cause}): {guess}.")
    if trial.status == SINGULAR:
        report.warn(
            "equation and conditions leave a constant open, or nearly so: values may be far off by one. Add a "
            "Dirichlet condition."
        )
