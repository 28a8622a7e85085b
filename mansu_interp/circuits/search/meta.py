"""What is known of a circuit beside its edges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from ...errors import ConfigError
from ...models.provenance import Provenance
from ...utils.files import Json
from ..config import CircuitConfig

NECESSARY = 0.5
"""Completeness above which a circuit is said not to be necessary."""


@dataclass(frozen=True)
class CircuitMeta:
    """What a circuit was made with. What is not known is None, or empty."""

    model: str = ""
    """Name of its model."""
    model_sha256: str = ""
    """Hash of the model's weights."""
    settings: CircuitConfig | None = None
    """Settings of the discovery."""
    provenance: Provenance | None = None
    """Hashes, seed and versions."""
    pairs_per_batch: int | None = None
    """Pairs per forward pass that fitted into memory."""
    gb_per_pair: float | None = None
    """What attribution of one pair takes beyond the model's own passes (GB)."""
    faithfulness: float | None = None
    """Ablate-outside faithfulness; 0: as the empty circuit, 1: as the whole model."""
    curve: tuple[tuple[int, float], ...] = ()
    """(edges asked for, faithfulness) of every circuit that the search tried, ascending."""
    irreducible: bool | None = None
    """Whether no single edge can be left out at the target of faithfulness. None: not tried; False:
    the circuits that might be tried were used up before that was known."""
    completeness: float | None = None
    """Faithfulness of all other edges, the circuit's being ablated: 0 without anything left of the
    metric, so that the circuit is necessary, to 1 where it is not missed."""
    random_completeness: float | None = None
    """The same with as many edges at random ablated, mean over several draws."""
    metric_clean: float | None = None
    """Mean metric of the clean runs."""
    metric_corrupt: float | None = None
    """Mean metric of the corrupt runs."""
    made_by: str = ""
    """``union``, ``intersection``, ``difference`` or ``selection``; the tool from whose file it was
    read; empty for a discovered one."""

    caveat: str = ""
    """What to know when reading the scores; empty: nothing."""

    def of_parts(self, made_by: str, other: CircuitMeta | None = None) -> CircuitMeta:
        """What stays true of a circuit that is made from others; of two models it is of neither."""
        other = other or self
        same = (self.model, self.model_sha256) == (other.model, other.model_sha256)
        model = (self.model, self.model_sha256) if same else ("", "")
        caveats = dict.fromkeys(filter(None, (self.caveat, other.caveat)))
        return CircuitMeta(*model, made_by=made_by, caveat="; ".join(caveats))

    def to_json(self) -> dict[str, Json]:
        """JSON values, without what is not known."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.settings is not None:
            values["settings"] = asdict(self.settings)
        return {k: v for k, v in values.items() if v is not None and v not in ("", ())}

    @classmethod
    def from_json(cls, data: Mapping[str, Json]) -> CircuitMeta:
        """What `to_json` wrote, already checked against the file's schema; other keys are left out.

        Raises:
            ValueError: unknown settings, settings out of range, or a curve that is none.
        """
        known = {k: v for k, v in data.items() if k in {f.name for f in fields(cls)}}
        if (settings := known.get("settings")) is not None:
            if odd := sorted(settings.keys() - {f.name for f in fields(CircuitConfig)}):
                raise ValueError(f"the settings have an unknown {odd[0][:80]!r}")
            try:
                known["settings"] = CircuitConfig(**settings)
            except ConfigError as error:
                raise ValueError(f"its settings are out of range ({error})") from error
        if any(len(point) != 2 for point in known.get("curve", ())):
            raise ValueError("the curve is no list of (edges, faithfulness)")
        known["curve"] = tuple((int(n), float(f)) for n, f in known.get("curve", ()))
        return cls(**known)

    def remarks(self) -> list[str]:
        """Sentences on how small and how necessary it is, of what is known."""
        out = []
        if self.irreducible:
            out.append(
                "It is the smallest found: no single edge can be left out, though a smaller "
                "circuit may exist."
            )
        elif self.irreducible is not None and self.settings is not None:
            out.append(
                f"Leaving edges out ended after {self.settings.removal_tries:,} circuits: more may "
                "be left out (removal_tries)."
            )
        if self.completeness is not None:
            out.append(necessity(self.completeness, self.random_completeness, self.faithfulness))
        return out


def necessity(completeness: float, of_random: float | None, faithfulness: float | None) -> str:
    """What is left without a circuit, in words.

    Arguments:
        completeness: see `CircuitMeta`.
        of_random: the same without as many edges at random, if known.
        faithfulness: see `CircuitMeta`.
    """
    left = f"{round(100 * completeness)}%"
    beside = "" if of_random is None else f", {round(100 * of_random)}% without as many at random"
    out = f"Completeness: {left} of the metric is left without these edges{beside}."
    if completeness > NECESSARY:
        enough = "sufficient but " if (faithfulness or 0) > NECESSARY else ""
        out += f" The circuit is {enough}not necessary: other paths carry the answer, too."
    return out
