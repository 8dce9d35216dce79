"""The engine contract and the loop that runs it at fixed hyperparameters.

An engine moves Gaussian sites. ``init`` conditions the family on starting sites, ``step`` makes one accepted
move, and ``objective`` is the engine's log evidence (exact, a lower bound, or the approximation that it names),
differentiable in the hyperparameters at a converged state.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from mercer._typing import Data, Info, Sites
from mercer.linalg.threads import lapack_first

if TYPE_CHECKING:
    from mercer.model import Model


@dataclass(frozen=True)
class State:
    """Where an engine stands: sites, the posterior they give, the objective there (nats) and the step size.

    ``target`` are the sites the engine would move to, ``history`` its own memory of past steps.
    """

    sites: Sites
    posterior: Any
    value: float
    step_size: float = 1.0
    target: Sites | None = None
    history: tuple[Any, ...] = ()


class Engine(Protocol):
    """How sites move.

    ``evidence`` names what ``objective`` is: "exact", "lower bound" or "approximation". ``requires`` lists what
    a likelihood must offer ("conjugate", "single_latent", …); `mercer.resolve` checks it.
    """

    name: ClassVar[str]
    evidence: ClassVar[str]

    def init(self, model: Model, plan: Any, data: Data, sites: Sites | None = None) -> State:
        """Return the state at given sites (a warm start) or at the engine's own starting sites."""

    def step(self, model: Model, plan: Any, state: State, data: Data) -> tuple[State, Info]:
        """Make one move; ``Info`` holds ``converged`` (bool), ``change`` and engine-specific counts."""

    def objective(self, model: Model, plan: Any, state: State, data: Data) -> Tensor:
        """Return the engine's log evidence, a scalar in nats, with its gradient in the hyperparameters."""


@dataclass(frozen=True)
class Inference:
    """Outcome of the inner loop: the state, how many steps it took, and whether and how it ended."""

    state: State
    n_steps: int
    converged: bool
    notes: tuple[str, ...] = ()


def latent_shape(model: Model, data: Data) -> tuple[int, ...]:
    """Return the shape (*b, n) of the latents: C latents, or one per output."""
    if model.likelihood.n_latents > 1:
        return (model.likelihood.n_latents, data.n_rows)
    return tuple(data.y.shape)


def zero_sites(model: Model, data: Data) -> Sites:
    """Return sites that say nothing: the posterior is the prior."""
    zeros = data.X.new_zeros(latent_shape(model, data))
    return Sites(zeros, zeros.clone())


def threads_for(model: Model, data: Data) -> AbstractContextManager:
    """Let LAPACK have the threads where the family's work is LAPACK's; sparse families keep torch's."""
    return lapack_first(data.n_rows, data.X.device) if model.family.dense else nullcontext()


@torch.no_grad()
def run(model: Model, plan: Any, data: Data, sites: Sites | None = None) -> Inference:
    """Step the engine until it converges at the current hyperparameters.

    Parameters
    ----------
    model, plan, data
        The model, its family's plan for ``data.X``, and the data.
    sites : Sites, optional
        Warm start.

    Returns
    -------
    Inference
        ``converged`` is False when ``policy.max_inner`` steps were not enough; never silent, the fit report
        repeats it.
    """
    notes: dict[str, None] = {}
    info: Info = {"converged": False}
    n_steps = halvings = 0
    with threads_for(model, data):
        state = model.engine.init(model, plan, data, sites)
        while n_steps < model.policy.max_inner and not (info["converged"] or info.get("stalled", False)):
            state, info = model.engine.step(model, plan, state, data)
            n_steps += 1
            notes.update(dict.fromkeys(info.get("notes", ())))
            halvings += info.get("halvings", 0)
    said = (*notes, *_in_words(info, n_steps, halvings))
    return Inference(state, n_steps, bool(info["converged"]), said)


def _in_words(info: Info, n_steps: int, halvings: int) -> list[str]:
    """Return what is to be reported of how the loop went; nothing where nothing was odd."""
    found = []
    if halvings:
        found.append(f"steps of the sites were halved {halvings} time(s) in {n_steps} step(s), or the bound would fall")
    if not info["converged"]:
        how = "stalled" if info.get("stalled", False) else "did not converge"
        gap = f", where one more would move them by {info['residual']:.1g} of their size" if "residual" in info else ""
        found.append(f"the sites {how} after {n_steps} step(s){gap}")
    return found
