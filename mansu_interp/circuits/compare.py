"""Circuit Attribution Divergence: is the circuit gone, or only its effect?

The attribution graphs of the original (s), and of an edited model (s'), on the same forget pairs
and in the same metric. Over the original's circuit C (all parts ours; the paper's formula is not
public):

    mass        ||s'_C||_1 / ||s_C||_1          how much still flows along the circuit
    projection  <s'_C, s_C> / <s_C, s_C>        how much of the old flow is left, signed
    alignment   cos(s'_C, s_C)                  whether what flows still takes the old way
    outside     ||s'_out||_1 / ||s||_1          what flows elsewhere

EAP-IG is complete: mass follows the metric, so mass alone is behaviour in disguise. A model that
never learnt the facts has low mass *and* low alignment (0.1 to 0.2 on small models); models whose
output was merely suppressed keep an alignment of 0.45 or more. The thresholds below lie between
those measurements; they are a first proposal and are **not calibrated**. The never-taught reference_models
that ship here reach an alignment of 0.57 and 0.87, so where one is at hand it can veto a verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from ..errors import CircuitError
from ..models.hooked import AnyModel, as_model
from ..tasks.pairs import PairSet
from .attribution import Attribution, attribute
from .circuit import Circuit
from .config import AttributionConfig, CircuitConfig

UNCHANGED_PROJECTION = 0.7
SUPPRESSED_ALIGNMENT = 0.45
ERASED_ALIGNMENT = 0.25
ERASED_PROJECTION = 0.15
RELOCATED_OUTSIDE = 0.5
RECOVERED_PROJECTION = 0.2
REFERENCE = "never taught"


@dataclass(frozen=True)
class Divergence:
    """How one model's attribution graph compares with the original's."""

    mass: float
    projection: float
    alignment: float
    outside: float
    metric: float
    """Mean clean metric minus mean corrupt metric, as a share of the original's."""


@dataclass(frozen=True)
class CAD:
    """Divergence of every compared model, and the verdict on the first of them."""

    verdict: str
    """unchanged, suppressed, erased, relocated, recovered or undecided."""
    sentence: str
    models: dict[str, Divergence]

    def to_json(self) -> dict[str, Any]:
        """For report.json."""
        return {"confidence": None, **asdict(self)}


def divergence(
    before: Float[np.ndarray, "w r"],
    after: Float[np.ndarray, "w r"],
    edges: Bool[np.ndarray, "w r"],
) -> tuple[float, float, float, float]:
    """mass, projection, alignment and outside of two score matrices over a circuit.

    Raises:
        CircuitError: the original has no attribution on the circuit.
    """
    s, t = before[edges].astype(np.float64), after[edges].astype(np.float64)
    size = float(np.abs(s).sum())
    if size == 0:
        raise CircuitError("The original model has no attribution on this circuit.")
    norm = float(np.linalg.norm(s) * np.linalg.norm(t))
    return (
        float(np.abs(t).sum() / size),
        float(t @ s / (s @ s)),
        float(t @ s / norm) if norm else 0.0,
        float(np.abs(after[~edges]).sum() / np.abs(before).sum()),
    )


def judge(
    edited: Divergence, quantized: Divergence | None = None, reference: Divergence | None = None
) -> tuple[str, str]:
    """Verdict and a plain sentence, by the thresholds of this module.

    Arguments:
        edited: the unlearned model.
        quantized: its quantized form, for ``recovered``.
        reference: a model that was never taught; where it keeps the old alignment too, alignment
            proves nothing and the verdict is ``undecided``.
    """
    d = edited
    if quantized and quantized.projection - d.projection > RECOVERED_PROJECTION:
        return "recovered", "Quantization moved the attribution graph back towards the original."
    if d.projection >= UNCHANGED_PROJECTION:
        return "unchanged", "The circuit still carries the answer much as it did."
    if abs(d.alignment) >= SUPPRESSED_ALIGNMENT:
        if reference and abs(reference.alignment) >= SUPPRESSED_ALIGNMENT:
            return (
                "undecided",
                "What still flows takes the old circuit, but so it does in a model never taught.",
            )
        return (
            "suppressed",
            "What still flows takes the old circuit, so the knowledge may be hidden, not gone.",
        )
    if d.outside >= RELOCATED_OUTSIDE:
        return "relocated", "The old circuit is quiet, but much flows elsewhere."
    if abs(d.alignment) <= ERASED_ALIGNMENT and abs(d.projection) <= ERASED_PROJECTION:
        return "erased", "The circuit no longer carries the answer, and nothing else took over."
    return "undecided", "The attribution graphs do not settle it."


def compare(
    circuit: Circuit,
    original: AnyModel,
    models: Mapping[str, AnyModel],
    pairs: PairSet,
    config: AttributionConfig | None = None,
    on_step: Callable[[str, int, int], None] | None = None,
    reference: AnyModel | None = None,
    on_scores: Callable[[str, Attribution], None] | None = None,
) -> CAD:
    """Compare attribution graphs on the same forget pairs.

    Arguments:
        circuit: the original's circuit.
        original: the model before unlearning.
        models: the unlearned model first, then its quantized form; the verdict is on the first,
            ``recovered`` looks at the second.
        pairs: forget pairs; use a phrasing that unlearning never saw.
        config: attribution settings; default: those of the discovery.
        reference: a twin that was never taught the forget facts, if there is one; it appears
            among the result's models as ``never taught``.
        on_step: called with (model name, pairs done, pairs in all).
        on_scores: called with (``original`` or a model's name, its scores), to draw them.

    Raises:
        CircuitError: nothing to compare, another architecture, or a circuit of another original.
    """
    if not models:
        raise CircuitError("compare() needs at least one model besides the original.")
    config = config or CircuitConfig(**circuit.meta.get("settings", {}))
    config = replace(config, metric="logit_diff")
    note = on_step or (lambda *_: None)

    def graph_of(name: str, model: AnyModel) -> Any:
        model = as_model(model)
        if model.architecture != circuit.graph.architecture:
            raise CircuitError(f"{name} has another architecture than the circuit.")
        found = attribute(model, pairs, config, on_batch=lambda d, n: note(name, d, n))
        if on_scores:
            on_scores(name, found)
        return found

    circuit.check_fits(original)
    base = graph_of("original", original)
    gap = base.clean - base.corrupt
    out: dict[str, Divergence] = {}
    named = {**models, REFERENCE: reference} if reference else dict(models)
    for name, model in named.items():
        found = graph_of(name, model)
        parts = divergence(base.scores, found.scores, circuit.edges)
        out[name] = Divergence(*parts, metric=(found.clean - found.corrupt) / gap)
    edited, quantized = [*(out[n] for n in models), None][:2]
    assert edited is not None
    verdict, sentence = judge(edited, quantized, out.get(REFERENCE))
    return CAD(verdict, sentence, out)
