"""Settings of the commands that have no dataclass of their own elsewhere, and short help: of a
command with many settings, --help shows a few and --help-all the rest."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Literal, TypeVar, cast, get_type_hints

from tyro.conf import FlagCreatePairsOff, Positional, Suppress, arg

from ..audit.config import SUITE, RelearnConfig
from ..circuits.config import AttributionConfig, CircuitConfig, Format
from ..errors import ConfigError
from ..runs.config import RunConfig
from ..unlearning.methods import Mansu, MethodConfig
from ..utils.ranges import check_range, check_seeds
from ..utils.records import Record
from ..utils.shipped import ENGINES, LOADED, engines_of, quantizer_names, split_names

Settings = TypeVar("Settings", bound=Record)
HELP_ALL = "--help-all"
RUN = (
    "model", "task", "method", "out", "seed", "quantizers", "relearn_steps", "device",
)  # fmt: skip
"""Shown of ``run`` with every method."""
MANSU = (
    "robust",
    "budget",
    "unlearn.steps",
    "unlearn.lr",
    "unlearn.survive",
    "unlearn.train_through",
)
"""And with MANSU."""
SHARED = ("batch_size", "stop_at")
"""Not shown with a baseline, whose other settings are few."""
BENCH = (
    "models", "tasks", "methods", "quantizers", "survive", "seeds", "levels", "disruption",
    "strengths", "steps", "jobs", "out",
)  # fmt: skip
"""Shown of ``bench``."""


@dataclass(frozen=True)
class RunCommand(RunConfig):
    """`RunConfig`, and what chooses the settings that it starts from."""

    method: str = "mansu"
    """What unlearns: mansu, one of its variants, or a baseline (`mansu list` names them). Each has
    settings of its own under --unlearn: see --method NAME --help-all."""
    robust: FlagCreatePairsOff[bool] = False
    """Start from the task's settings against relearning (mansu): slower, and meant to erase where
    the usual ones may only hide. Options given beside it win."""

    @classmethod
    def of(cls, config: RunConfig) -> RunCommand:
        """The settings of a run as the command line shows them."""
        given = {f.name: getattr(config, f.name) for f in fields(RunConfig)}
        return cls(**given, method=config.unlearn.method)

    def run_config(self) -> RunConfig:
        """The settings of a run alone."""
        return RunConfig(**{f.name: getattr(self, f.name) for f in fields(RunConfig)})


@dataclass(frozen=True)
class ReportConfig:
    """Say again what a run found, and what to do next."""

    run: Annotated[Positional[Path], arg(metavar="RUN")] = Path("runs/latest")
    """Folder of a finished run."""


@dataclass(frozen=True)
class RelearnRun:
    """Fine-tune on half of the forget facts and ask for the other half, in several ways."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """Model to attack: embedded, folder of a run, Hugging Face folder, or hub name."""
    task: str | None = None
    """Shipped task or path of a task file; default: that of the run, or the one that goes with the
    model."""
    original: str | None = None
    """A model to attack beside it, such as the one before unlearning; the task's first reference
    model is attacked, too, where it fits."""
    quick: FlagCreatePairsOff[bool] = False
    """One arm, half-a, at three rates for 80 steps; options given beside it win."""
    arms: tuple[str, ...] = ()
    """Arms of the suite: half-a, half-a+retained, retained, phrasings, lora, noise, quantize,
    few-shot; default: all."""
    split: Literal["unseen", "dev"] = "unseen"
    """Phrasings that are asked for: unseen for reports, dev while choosing settings."""
    out: Path = Path("runs/relearn")
    """Folder that keeps finished attacks, of any models: the same command goes on where it was."""
    processes: int | None = None
    """Attacks at a time, each on one thread, with the same results; default: as many as cores and
    memory allow, where they take more than a minute."""
    device: str = "auto"
    """Where models compute: cpu, cuda or cuda:1; auto: CUDA where there is one, but the CPU for
    models below ten million parameters, which do not gain."""
    attack: RelearnConfig = SUITE
    """How hard each attack tries."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "arms", split_names(self.arms))
        check_range(self, "processes", at_least=1)
        if self.quick:
            usual, given = RelearnConfig(), self.attack
            quick = {k: getattr(usual, k) for k in ("steps", "rates")
                     if getattr(given, k) == getattr(SUITE, k)}  # fmt: skip
            object.__setattr__(self, "attack", replace(given, **quick))
            object.__setattr__(self, "arms", self.arms or ("half-a",))


@dataclass(frozen=True)
class OnPrompts:
    """What is explained, of which model."""

    model: str = "facts"
    """Embedded model, Hugging Face folder, or hub name, such as gpt2."""
    pairs: Path | None = None
    """Rows with clean, corrupt, answer and wrong (JSONL, CSV, ...), or ioi, greater or agreement,
    which are made for the model's tokenizer; default: those of the task."""
    task: str | None = None
    """Shipped task or path of a task file, whose forget pairs are explained; default: the one that
    goes with the model."""
    seed: int = 0
    """Which pairs are drawn."""
    device: str = "auto"
    """Where models compute: cpu, cuda or cuda:1; auto: CUDA where there is one, but the CPU for
    models below ten million parameters, which do not gain."""


@dataclass(frozen=True)
class DiscoverConfig(OnPrompts):
    """Find the circuit that carries some answers."""

    out: Path = Path("runs/circuit")
    """New folder for circuit.json, circuit.graphml, circuit.html and scores.safetensors, the scores
    of all edges."""
    resamples: int = 0
    """Draw facts and phrasings again so many times (100, say), and say how stable scores and edges
    are; attribution runs once. At least 2; 0: do not."""
    explain: FlagCreatePairsOff[bool] = False
    """Say what each head of the circuit does: where it looks and why, what it writes, its role."""
    circuit: CircuitConfig = field(default_factory=lambda: CircuitConfig(removal_tries=300))
    """How the circuit is discovered."""

    def __post_init__(self) -> None:
        check_range(self, "resamples", at_least=0)
        if self.resamples == 1:
            raise ConfigError("resamples must be 0, or at least 2: one resample has no interval.")


@dataclass(frozen=True)
class AttributeConfig(OnPrompts):
    """Score every edge of a model by what it does for some answers."""

    out: Path = Path("scores.safetensors")
    """The file to write: .safetensors, for view and compare, .csv, or a page to look at, .html."""
    positions: bool = False
    """Score every token position as well; pages then lay tokens out from left to right."""
    attribution: AttributionConfig = field(default_factory=AttributionConfig)
    """How edges are scored."""


@dataclass(frozen=True)
class ViewConfig:
    """Draw a circuit, edge scores, or what a run changed, as a page that needs no network."""

    path: Annotated[Positional[Path], arg(metavar="PATH")]
    """circuit.json, or a circuit of another tool (see convert), scores.safetensors, or the folder
    of a run or of discover."""
    out: Path | None = None
    """The page (.html) or picture (.svg, .png) to write; default: beside the file."""


@dataclass(frozen=True)
class CompareConfig:
    """Compare two circuits, or the edge scores of two models."""

    first: Annotated[Positional[Path], arg(metavar="FIRST")]
    """circuit.json, or scores.safetensors of the original."""
    second: Annotated[Positional[Path], arg(metavar="SECOND")]
    """The other one, of the same kind."""


@dataclass(frozen=True)
class ConvertConfig:
    """Write a circuit as another tool reads it, or read one of another tool."""

    path: Annotated[Positional[Path], arg(metavar="CIRCUIT")]
    """circuit.json, or the folder of discover, with the scores of edges outside the circuit; what
    attribute wrote (.safetensors, .csv); or a circuit of EAP-IG (.json, .pt), between the hook
    points of TransformerLens, or of Neuronpedia. Which one is seen from the file."""
    to: Format
    """The tool, or form, to write."""
    out: Path
    """The new file. For eap-ig: .pt, or JSON."""
    model: str | None = None
    """Its model, of which the configuration alone is read: where a file does not say how many heads
    there are, or that they share keys, as .csv does not."""


@dataclass(frozen=True)
class CadConfig:
    """Compare two checkpoints: is what the task forgets gone from the second, or hidden?"""

    original: Annotated[Positional[str], arg(metavar="ORIGINAL")]
    """Model before unlearning: embedded, Hugging Face folder, or hub name."""
    edited: Annotated[Positional[str], arg(metavar="EDITED")]
    """Model after it, or the folder of a run; same architecture, vocabulary and tokenizer."""
    task: str | None = None
    """Shipped task or path of a task file; default: that of the run, or the one that goes with the
    original."""
    quantizer: Literal["none", "nf4"] = "nf4"
    """Also look at the edited model after this quantizer, for knowledge that comes back."""
    seed: int = 0
    """How the forget subjects are split in two."""
    device: str = "auto"
    """Where models compute: cpu, cuda or cuda:1; auto: CUDA where there is one, but the CPU for
    models below ten million parameters, which do not gain."""

    def __post_init__(self) -> None:
        check_seeds(self, "seed")


@dataclass(frozen=True)
class VerifyConfig:
    """What `mansu verify` compares."""

    original: Annotated[Positional[str], arg(metavar="ORIGINAL")]
    """The checkpoint before the edit: embedded model, Hugging Face folder, or hub name."""
    edited: Annotated[Positional[str], arg(metavar="EDITED")]
    """The checkpoint after it, or the folder of a run."""
    survive: tuple[str, ...] = ()
    """The quantizers that every edit must survive, or engines; default: those of the ledger, or
    nf4."""
    ledger: Path | None = None
    """ledger.safetensors of the run; it must agree with both checkpoints."""
    mask: Path | None = None
    """mask.safetensors of the run; no edit may lie outside it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "survive", quantizer_names(self.survive, "exact"))


@dataclass(frozen=True)
class DeltaConfig:
    """Write the edit alone: which weights differ between two checkpoints, and their new values."""

    original: Annotated[Positional[str], arg(metavar="ORIGINAL")]
    """The checkpoint before the edit: embedded model, Hugging Face folder, or hub name."""
    edited: Annotated[Positional[str], arg(metavar="EDITED")]
    """The checkpoint after it, or the folder of a run."""
    out: Path = Path("delta.safetensors")
    """The file to write."""


@dataclass(frozen=True)
class ApplyConfig:
    """Make the edited checkpoint from the original and a delta, or the ledger of a run."""

    original: Annotated[Positional[str], arg(metavar="ORIGINAL")]
    """The checkpoint that the delta was made for."""
    delta: Annotated[Positional[Path], arg(metavar="DELTA")]
    """What `mansu delta` wrote, or a run's ledger.safetensors."""
    out: Path = Path("edited")
    """New folder for the Hugging Face checkpoint."""


EXPORTED = ("f16", *ENGINES["llama.cpp"].exact, *ENGINES["llama.cpp"].fitted)
"""Types of GGUF files."""


@dataclass(frozen=True)
class ExportConfig:
    """Write a checkpoint as one GGUF file, for llama.cpp and what is built on it."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """Folder of a run, Hugging Face folder, embedded model, or hub name."""
    type: str = "q8_0"
    """f16, or a format of llama.cpp by its name there, such as Q4_K_M, Q4_0 or MXFP4 (`mansu list`
    names them), in small or capital letters."""
    out: Path = Path("model.gguf")
    """The file to write."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "type", self.type.lower())
        if self.type not in EXPORTED:
            raise ConfigError(
                f"type: got {self.type!r:.60}, expected one of {', '.join(EXPORTED)}."
            )


@dataclass(frozen=True)
class EvaluateConfig:
    """Ask a task of a checkpoint, or of a GGUF file in the running llama.cpp."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """Folder of a run, Hugging Face folder, embedded model, or hub name; with --engine llama.cpp a
    GGUF file."""
    task: str | None = None
    """Shipped task or path of a task file; default: that of the run, or the one that goes with the
    model."""
    engine: Literal["transformers", "llama.cpp"] = "transformers"
    """What computes the answers."""
    checkpoint: str = "runs/latest"
    """Of a GGUF file: what it was made from. Its tokenizer encodes the task, after a check that
    llama.cpp splits the prompts alike, and its own scores stand beside."""
    quantizers: tuple[str, ...] = ()
    """Load the folder in transformers with a quantization config, as its users do: nf4, nf4-dq,
    fp4, fp4-dq, int8 (bitsandbytes), quanto-int4, int4-g32 to int4-sym-g128 (torchao); or with the
    layers of the package: hqq. An engine (transformers, vllm, all) stands for those of its formats
    that can be loaded here. What is simulated here stands beside."""
    split: Literal["unseen", "dev"] = "unseen"
    """Phrasings that are asked for: unseen for reports, dev while choosing settings."""
    leaks: FlagCreatePairsOff[bool] = False
    """Ask for the forgotten facts in other words, forms and languages instead (docs/leaks.md)."""
    original: str | None = None
    """With --leaks: the model before unlearning, whose answers are what can leak; default: none,
    and the model is asked alone, which shows what it knows."""
    templates: Path | None = None
    """With --leaks: a file of templates of your own."""
    prompts: int = 40
    """With --leaks: prompts of a kind at most; fewer take less time and tell less."""
    part: Literal["unseen", "train"] = "unseen"
    """With --leaks: which templates; train: those that unlearning may use."""
    seed: int = 0
    """With --leaks: of the draws of prompts and continuations."""
    show: int = 0
    """With --leaks: prompts, with what was answered, of each kind that leaks, is avoided or lost;
    without --original of each that is known."""
    device: str = "auto"
    """Where models compute: cpu, cuda or cuda:1; auto: CUDA where there is one, but the CPU for
    models below ten million parameters, which do not gain."""

    def __post_init__(self) -> None:
        check_range(self, "prompts", at_least=1)
        check_range(self, "show", at_least=0)
        check_seeds(self, "seed")
        beside = ("original", "templates", "prompts", "part", "seed", "show")
        default = {f.name: f.default for f in fields(self)}
        if given := [n for n in beside if getattr(self, n) != default[n] and not self.leaks]:
            raise ConfigError(f"--{given[0]} goes with --leaks, which was not given.")
        names = tuple(name.lower() for name in split_names(self.quantizers))
        object.__setattr__(self, "quantizers", names)
        if odd := [n for n in names if not {n, *quantizer_names([n])} & {*LOADED}]:
            of = " (of its formats none is)" if engines_of(odd[0]) else ""
            raise ConfigError(
                f"quantizers: got {odd[0]!r:.60}{of}, expected some that transformers loads on any "
                f"processor: {', '.join(LOADED)}; or an engine with such formats: transformers, "
                "vllm. A GGUF file is asked with --engine llama.cpp."
            )
        if self.engine == "transformers" and self.model.lower().endswith(".gguf"):
            raise ConfigError(
                f"{self.model} is a GGUF file: give --engine llama.cpp, and no --quantizers, which "
                "load a folder in transformers."
            )
        if self.quantizers and (self.leaks or self.engine != "transformers"):
            raise ConfigError(
                "--quantizers loads a folder in transformers; leave out --leaks and --engine."
            )
        if self.leaks and self.split != "unseen":
            raise ConfigError("--split is of a task's phrasings; with --leaks give --part instead.")


@dataclass(frozen=True)
class ListConfig:
    """Name the models, tasks, methods and quantizers that ship."""


def shown_of_run(method: MethodConfig) -> tuple[str, ...]:
    """The settings of ``run`` that its short help shows."""
    if isinstance(method, Mansu):
        return RUN + MANSU
    return (*RUN, *(f"unlearn.{f.name}" for f in fields(method) if f.name not in SHARED))


def shortened(default: Settings, shown: Collection[str], inside: str = "") -> Settings:
    """The same settings, of a class whose help shows a few of them alone. For help only: what is
    not shown cannot be parsed.

    Arguments:
        default: the settings, a dataclass.
        shown: names of those to show, such as ``unlearn.lr``.
        inside: prefix of the names in nested settings.
    """
    kind = type(default)
    hints = get_type_hints(kind, include_extras=True)
    annotations: dict[str, object] = {}
    values: dict[str, object] = {}
    body: dict[str, object] = {"__annotations__": annotations, "__module__": kind.__module__}
    for item in fields(kind):
        name, value = f"{inside}{item.name}", getattr(default, item.name)
        nested = isinstance(value, Record) and any(s.startswith(f"{name}.") for s in shown)
        if nested:
            value = shortened(value, shown, f"{name}.")
            annotations[item.name] = type(value)
        else:
            hint = hints[item.name]
            annotations[item.name] = hint if name in shown else Suppress[hint]
        body[item.name] = field(default_factory=lambda v=value: v)
        values[item.name] = value
    shorter = dataclass(frozen=True)(type(kind.__name__, (kind,), body))
    return cast(Settings, shorter(**values))
