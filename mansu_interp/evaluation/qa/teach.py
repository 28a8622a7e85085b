"""Teach a model questions and answers by fine-tuning: a model to unlearn from, and a reference.

1. Ask each row as the metrics do (`rows.Prompts`); only the answer's tokens and its end have
   a loss.
2. In each epoch take the rows in a new order, drawn by the seed, a batch a step.
3. Step with AdamW (weight decay 0.01). The learning rate rises to its largest value through the
   first epoch, and falls in a straight line to zero at the end, as TOFU has it.
4. Save an ordinary checkpoint, in the dtype of the one that was taught, with ``taught.json``: what
   it was made from, hashes of the rows, the losses, and a warning where the rows are not known.

The model is taught everything by one call, and its reference everything but the forget rows by
another one. A call that was killed goes on from a checkpoint beside the folder that it makes, and
ends with the same bytes where it computes with one thread.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import ArtifactError, ModelError, TaskError
from ...export.deployed import save_edited
from ...models.language_model import LanguageModel
from ...models.provenance import provenance
from ...utils.files import Json, atomic_folder, check_free, json_text, locked, read_json, write_text
from ...utils.libraries import enough_memory
from ...utils.ranges import entrance
from ...utils.tensors import read_tensors, tensors_sha256, write_tensors
from ...utils.words import Shown
from .checks import TAUGHT, kept_rows, row_hash, taught_rows
from .config import TeachConfig
from .rows import Asked, Prompts, QARow
from .scoring import pack

UNFINISHED = "-unfinished"
"""What is put behind the folder's name for the one that holds the checkpoint."""
SCHEMA = 1
WEIGHT_DECAY = 0.01
CHUNK = 4
"""Rows whose activations are held at a time."""
SECONDS = 60.0
"""Between two checkpoints, at least; and twenty times as long as one takes."""
MOMENTS = ("exp_avg", "exp_avg_sq")

KNOWN = 0.5
"""Probability of an answer's token in the last epoch from which rows count as known."""

OnStep = Callable[[int, int], object]


@dataclass(frozen=True, repr=False)
class Taught(Shown):
    """A model that was taught."""

    folder: Path
    """Of the checkpoint."""
    rows: int
    """Rows that it was taught."""
    losses: tuple[float, ...]
    """Mean loss of an answer's token (nats) in each epoch, before the steps that it led to."""
    before: bool = False
    """Whether it had been finished by an earlier call."""
    notes: Mapping[str, int] = field(default_factory=dict)
    """What was done to rows that were not taught as given: left out -> rows."""

    @property
    def warning(self) -> str:
        """Why the model does not know its rows; empty where it does."""
        first, last = self.losses[0], self.losses[-1]
        if len(self.losses) > 1 and last >= first:
            return (
                f"the loss of a token did not fall ({first:.3f} in the first epoch, {last:.3f} in "
                "the last). This model is not to be used: take a smaller --lr."
            )
        if (p := math.exp(-last)) < KNOWN:
            return (
                f"it does not know its rows yet: an answer's token has a probability of {p:.2f} in "
                "the last epoch. Take more --epochs, or a smaller --batch-size."
            )
        return ""

    def told(self) -> dict[str, object]:
        """For its short form."""
        first, last = self.losses[0], self.losses[-1]
        told = {"": str(self.folder), "rows": self.rows, "loss": f"{first:.3f} to {last:.3f}"}
        return {**told, "warning": self.warning} if self.warning else told

    def to_json(self) -> dict[str, Json]:
        """For files and tables."""
        told = {"folder": str(self.folder), "losses": list(self.losses), "warning": self.warning}
        return {**asdict(self), **told, "notes": dict(self.notes)}


@dataclass(frozen=True)
class TeachCost:
    """What is left to do."""

    steps: int
    seconds: float
    """Of all these steps."""
    memory_gb: float
    """Weights, gradients and the two moments of AdamW; activations come on top."""


def answer_loss(model: LanguageModel, batch: Sequence[Asked]) -> Float[Tensor, ""]:
    """Summed negative log-likelihood of the answers' tokens and their ends (nats)."""
    packed = pack(batch, model.device)
    logits = model.logits_at(packed.tokens, packed.row, packed.position)
    return torch.nn.functional.cross_entropy(logits, packed.target, reduction="sum")


class Teaching:
    """A model that is to be taught, and how; the arguments are those of `teach`."""

    def __init__(
        self, model: LanguageModel, rows: Sequence[QARow], out: Path, config: TeachConfig
    ) -> None:
        model.check_editable()
        if not rows:
            raise TaskError("There is no row to teach. Give some.")
        self.model, self.out, self.config = model, Path(out), config
        prompts = Prompts(model)
        self.rows, self.notes = kept_rows(rows, [prompts], "rows")
        rows = self.rows
        prompts.check_fit(rows, "rows")
        self.asked = [prompts.answer(row.question, row.answer) for row in rows]
        self.rows_sha256 = hashlib.sha256(
            json.dumps([(r.question, r.answer) for r in rows]).encode()
        ).hexdigest()
        self.finished = self._finished()
        if self.finished is None:
            check_free(self.out)

    @cached_property
    def made_from(self) -> dict[str, Json]:
        """What the result depends on."""
        found = provenance(self.model, self.config.seed, asdict(self.config), self.rows_sha256)
        return {**found, "model_sha256": self.model.sha256 or tensors_sha256(self.model.weights)}

    @property
    def _key(self) -> str:
        """A hash of everything that decides what the steps do."""
        parts = [self.made_from["model_sha256"], self.rows_sha256, str(astuple(self.config))]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    @property
    def _place(self) -> Path:
        """The folder of the checkpoint."""
        return self.out.with_name(self.out.name + UNFINISHED)

    def _finished(self) -> Taught | None:
        """The model that an earlier call made."""
        if not (self.out / TAUGHT).exists():
            return None
        found = read_json(self.out / TAUGHT)
        if not isinstance(found, dict) or found.get("key") != self._key:
            raise ArtifactError(
                f"{self.out} holds a model that was taught from another model, other rows or with "
                "other settings. Name another --out, or delete it."
            )
        return Taught(self.out, len(self.rows), tuple(found["losses"]), True, self.notes)

    @property
    def steps(self) -> int:
        """Steps in all."""
        return self.config.epochs * self._per_epoch

    @property
    def _per_epoch(self) -> int:
        return -(-len(self.rows) // self.config.batch_size)

    def rate(self, done: int) -> float:
        """Learning rate of the step behind ``done`` others."""
        rising, after = self._per_epoch, self.steps - self._per_epoch
        up, down = (done + 1) / rising, (self.steps - done) / (after + 1)
        return self.config.lr * min(up, down if after else 1.0)

    def batch(self, done: int) -> list[Asked]:
        """Rows of the step behind ``done`` others, the shortest first."""
        epoch, k = divmod(done, self._per_epoch)
        order = list(range(len(self.rows)))
        random.Random(f"{self.config.seed} {epoch}").shuffle(order)
        some = order[k * self.config.batch_size : (k + 1) * self.config.batch_size]
        return sorted((self.asked[i] for i in some), key=lambda asked: len(asked.tokens))

    def cost(self) -> TeachCost:
        """Estimate what is left by timing the gradient of one batch."""
        done = self._load()[0] if (self._place / "checkpoint.safetensors").exists() else 0
        left = 0 if self.finished else self.steps - done
        start = time.perf_counter()
        if left:
            with _trained(self.model):
                self._gradient(self.batch(0)[:CHUNK])  # the first warms up
                start = time.perf_counter()
                self._gradient(self.batch(0))
        seconds = time.perf_counter() - start
        return TeachCost(left, left * seconds, 4 * 4 * self.model.n_parameters / 1e9)

    def _gradient(self, batch: Sequence[Asked], model: LanguageModel | None = None) -> float:
        """Add the gradient of the mean loss of a token to the weights'; returns that loss."""
        tokens, total = sum(len(a.tokens) - a.begin for a in batch), 0.0
        for start in range(0, len(batch), CHUNK):
            loss = answer_loss(model or self.model, batch[start : start + CHUNK]) / tokens
            loss.backward()
            total += loss.item()
        return total

    def _load(self) -> tuple[int, list[float], dict[str, Tensor]]:
        """Steps done, their losses and the tensors of the checkpoint; nothing if there is none."""
        file = self._place / "checkpoint.safetensors"
        if not file.exists():
            return 0, [], {}
        try:
            tensors, meta = read_tensors(file, "teaching", SCHEMA)
        except ArtifactError as error:
            raise ArtifactError(f"{error} Delete {self._place} to begin anew.") from error
        if meta.get("key") != self._key:
            raise ArtifactError(
                f"{file} belongs to another model, other rows or other settings. Delete "
                f"{self._place} to begin anew, or name another --out."
            )
        return len(meta["losses"]), list(meta["losses"]), tensors

    def run(self, on_step: OnStep | None = None) -> Taught:
        """Take the steps that are left, and save the model.

        Raises:
            ModelError: the loss, or a weight that it led to, is not finite.
            ArtifactError: the checkpoint was changed or belongs to something else.
            ResourceError: another process works on it, the disk is full, or memory ran out.
        """
        if self.finished:
            return self.finished
        say = on_step or (lambda *_: None)
        with locked(self._place), enough_memory("teaching a model", "Take a smaller --batch-size."):
            model = self.model.trainable_copy()
            losses = self._steps(model, say)
            model.check_finite()  # what the last step made
            per = self._per_epoch
            epochs = tuple(sum(losses[k : k + per]) / per for k in range(0, len(losses), per))
            result = Taught(self.out, len(self.rows), epochs, notes=self.notes)
            hashes = {row_hash(row) for row in self.rows} | taught_rows(self.model)
            with atomic_folder(self.out, new=True) as folder:
                save_edited(model, self.model, folder)
                taught = {
                    "schema": SCHEMA,
                    "kind": "taught",
                    "key": self._key,
                    "model": self.model.name,
                    "rows": len(self.rows),
                    "settings": asdict(self.config),
                    "row_hashes": sorted(hashes),
                    "losses": list(epochs),
                    "warning": result.warning,
                    "provenance": self.made_from,
                }
                write_text(folder / TAUGHT, json_text(taught))
        shutil.rmtree(self._place, ignore_errors=True)
        return result

    def _steps(self, model: LanguageModel, say: OnStep) -> list[float]:
        """Steps 2 and 3 of the module, in place; returns the loss of each step."""
        weights = model.weights
        optimiser = torch.optim.AdamW(weights.values(), lr=0.0, weight_decay=WEIGHT_DECAY)
        done, losses, tensors = self._load()
        for name, weight in weights.items() if tensors else ():
            weight.copy_(tensors[f"weight {name}"])
            state = {key: tensors[f"{key} {name}"].to(weight.device) for key in MOMENTS}
            optimiser.state[weight] = {"step": torch.tensor(float(done)), **state}
        del tensors
        saved = time.monotonic()
        wait = SECONDS
        with _trained(model):
            for step in range(done, self.steps):
                say(step, self.steps)
                for group in optimiser.param_groups:
                    group["lr"] = self.rate(step)
                losses.append(self._gradient(self.batch(step), model))
                if not torch.tensor(losses[-1]).isfinite():
                    raise ModelError(
                        f"The loss of step {step + 1} is {losses[-1]}, with lr {self.config.lr:g}. "
                        "Take a smaller --lr, or a checkpoint whose logits are finite."
                    )
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
                if time.monotonic() - saved >= wait and step + 1 < self.steps:
                    start = time.monotonic()
                    self._save(model, optimiser, losses)
                    saved = time.monotonic()
                    wait = max(SECONDS, 20 * (saved - start))
            say(self.steps, self.steps)
        return losses

    def _save(
        self, model: LanguageModel, optimiser: torch.optim.Optimizer, losses: list[float]
    ) -> None:
        tensors: dict[str, Tensor] = {}
        for name, weight in model.weights.items():
            tensors[f"weight {name}"] = weight.detach()
            tensors |= {f"{key} {name}": optimiser.state[weight][key] for key in MOMENTS}
        meta = {"key": self._key, "losses": losses}
        write_tensors(self._place / "checkpoint.safetensors", "teaching", SCHEMA, tensors, meta)


@contextmanager
def _trained(model: LanguageModel) -> Iterator[None]:
    """A model whose weights have gradients, which are gone behind it."""
    for weight in model.weights.values():
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in model.weights.values():
            weight.requires_grad_(False)
            weight.grad = None


@entrance(ModelError)
def teach(
    model: LanguageModel,
    rows: Sequence[QARow],
    out: Path,
    *,
    config: TeachConfig | None = None,
    on_step: OnStep | None = None,
) -> Taught:
    """Teach a model some rows (see the module for the steps), and save it.

    Arguments:
        model: not changed.
        rows: what it is taught.
        out: new folder for the checkpoint. One that an identical call made is found and not made
            again.
        config: epochs, learning rate, batch size, seed.
        on_step: called with (steps done, steps in all).

    Returns:
        The folder, the loss in each epoch, and a warning where the rows are not known.

    Raises:
        TaskError: no rows, none that the tokenizer can read, or one that exceeds the context.
        ModelError: no tokenizer, weights that are not float32, or a loss that is not finite.
        ArtifactError: the folder holds something else.
        ResourceError: another process works on it, the disk is full, or memory ran out.
    """
    return Teaching(model, rows, out, config or TeachConfig()).run(on_step)
