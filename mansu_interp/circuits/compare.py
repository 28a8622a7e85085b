"""How the attribution graphs of two models differ, on the same forget prompts and in one metric.

With the scores of the original (s) and of another model (s'), over the original's circuit C (all
parts ours; we could not read the paper's formula):

    mass             ||s'_C||_1 / ||s_C||_1        how much still flows along the circuit
    projected share  <s'_C, s_C> / <s_C, s_C>      how much of the old flow is left, signed
    alignment        cos(s'_C, s_C)                whether what flows still takes the old way
    outside          ||s'_out||_1 / ||s||_1        what flows elsewhere

These numbers describe and do not decide. EAP-IG is complete, so mass follows the metric: a model
that no longer predicts the answers has an empty graph, whatever is left in its weights. Low
alignment is seen both in models that were never taught and in models that only hide the answers.
Whether knowledge is erased is decided by relearning (`audit.relearning`) and predicted by
`audit.cad`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace

import numpy as np
from jaxtyping import Bool, Float

from ..errors import CircuitError
from ..models.hooked import AnyModel, as_model
from ..tasks.pairs import PairSet
from ..utils.files import Json
from ..utils.ranges import entrance
from ..utils.words import Shown
from .attribution import attribute
from .circuit import Circuit
from .config import AttributionConfig, CircuitConfig
from .scores import Attribution

Given = AnyModel | AbstractContextManager[AnyModel]
REFERENCE = "never taught"
"""Name of the reference model among the compared ones."""


@dataclass(frozen=True)
class Divergence:
    """How one model's attribution graph compares with the original's."""

    mass: float
    """How much still flows along the circuit, as a share of the original's; at least 0."""
    projected_share: float
    """How much of the old flow is left; negative where it now works against the answer."""
    alignment: float
    """Cosine of the two models' scores over the circuit: 1 = the same way, -1 = reversed."""
    outside: float
    """What flows outside the circuit, as a share of all of the original's; at least 0."""
    metric: float = math.nan
    """Mean clean metric minus mean corrupt metric, as a share of the original's; NaN where only
    scores are compared."""


@dataclass(frozen=True, repr=False)
class GraphComparison(Shown):
    """Divergence of every compared model from the original."""

    models: dict[str, Divergence]
    """By name, in the order in which they were given; then the reference model, if any."""

    def told(self) -> dict[str, object]:
        """For its short form."""
        return {
            name: f"mass {d.mass:.3f}, projected share {d.projected_share:.3f}"
            for name, d in self.models.items()
        }

    def to_json(self) -> dict[str, Json]:
        """For report.json."""
        return asdict(self)


def divergence(
    before: Float[np.ndarray, "writers readers"],
    after: Float[np.ndarray, "writers readers"],
    edges: Bool[np.ndarray, "writers readers"],
) -> Divergence:
    """How two score matrices differ over a circuit (see the module for the formulas).

    Arguments:
        before: scores of the original model (metric units).
        after: scores of the other model, on the same pairs and in the same metric.
        edges: True for the circuit's edges.

    Raises:
        CircuitError: the original has no attribution on the circuit.
    """
    s, t = before[edges].astype(np.float64), after[edges].astype(np.float64)
    size = float(np.abs(s).sum())
    if size == 0:
        raise CircuitError("The original model has no attribution on this circuit.")
    norm = float(np.linalg.norm(s) * np.linalg.norm(t))
    return Divergence(
        mass=float(np.abs(t).sum() / size),
        projected_share=float(t @ s / (s @ s)),
        alignment=float(t @ s / norm) if norm else 0.0,
        outside=float(np.abs(after[~edges]).sum() / np.abs(before).sum()),
    )


@entrance(CircuitError)
def compare(
    circuit: Circuit,
    original: Given,
    models: Mapping[str, Given],
    pairs: PairSet,
    *,
    config: AttributionConfig | None = None,
    reference: AnyModel | None = None,
    on_step: Callable[[str, int, int], None] | None = None,
    on_scores: Callable[[str, Attribution], None] | None = None,
) -> GraphComparison:
    """Compare attribution graphs on the same forget pairs.

    Arguments:
        circuit: the original's circuit.
        original: the model before unlearning; or, as of all of them, the context in which it is
            there, entered for its own attribution alone.
        models: by name, such as the unlearned model and its quantized form.
        pairs: forget pairs; use a phrasing that unlearning never saw.
        config: attribution settings, except for the metric, which is ``logit_diff``; default:
            those of the circuit's discovery.
        reference: a model that was never taught the forget facts, if there is one; it appears
            among the result's models as ``never taught``.
        on_step: called with (model name, pairs done, pairs in all).
        on_scores: called with (``original`` or a model's name, its scores), to draw them.

    Returns:
        The numbers of every model, as shares of the original's.

    Raises:
        CircuitError: nothing to compare, another architecture, or a circuit of another original.
    """
    if not models:
        raise CircuitError("compare() needs at least one model besides the original.")
    settings = replace(config or circuit.meta.settings or CircuitConfig(), metric="logit_diff")
    note = on_step or (lambda *_: None)

    def graph_of(name: str, given: Given) -> Attribution:
        with given if isinstance(given, AbstractContextManager) else nullcontext(given) as there:
            model = as_model(there)
            if given is original:
                circuit.check_fits(model)
            if model.architecture != circuit.graph.architecture:
                raise CircuitError(f"{name} has another architecture than the circuit.")
            found = attribute(model, pairs, config=settings, on_batch=lambda d, n: note(name, d, n))
        if on_scores:
            on_scores(name, found)
        return found

    base = graph_of("original", original)
    gap = base.clean - base.corrupt
    out: dict[str, Divergence] = {}
    named = {**models, REFERENCE: reference} if reference else dict(models)
    for name, model in named.items():
        found = graph_of(name, model)
        share = (found.clean - found.corrupt) / gap
        out[name] = replace(divergence(base.scores, found.scores, circuit.edges), metric=share)
    return GraphComparison(out)
