"""Tensors in safetensors files, with a checked JSON header that carries a hash of them; the
checkpoint of a long loop, which is such a file; and prompts laid out as trees."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ArtifactError, ResourceError
from .distributed import rank
from .files import Json, atomic_path, check_regular, expect, finite, parse_json, unread, writing
from .words import shown

MAX_BYTES = 1 << 34
"""Size of the largest file that is opened: the ledger of a model of 200 billion weights."""
MAX_HEADER = 16 << 20
DTYPES = {"I32", "I64", "U8", "BF16", "F16", "F32", "F64"}
SECONDS = 60.0
"""Between two checkpoints of a loop."""
ANEW = "Delete it to begin this stage anew."


def dtype_name(dtype: torch.dtype) -> str:
    """Without the package's name, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def tensors_sha256(tensors: dict[str, Tensor], dtype: torch.dtype | None = None) -> str:
    """Hash of names, dtypes, shapes and values, whatever the order.

    Arguments:
        tensors: by name.
        dtype: to which each is turned first, one at a time; default: its own.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().to("cpu", dtype).contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _sha256(header: dict[str, Json], tensors: dict[str, Tensor]) -> str:
    """Hash of a whole file: of its header, but for this hash, and of its tensors."""
    text = json.dumps(header, sort_keys=True) + tensors_sha256(tensors)
    return hashlib.sha256(text.encode()).hexdigest()


def write_tensors(
    path: Path, kind: str, schema: int, tensors: dict[str, Tensor], meta: Mapping[str, object]
) -> None:
    """Write tensors atomically; the header is JSON: schema, ``meta``, and a hash of all of it.

    Raises:
        ResourceError: the disk is full, or the like.
    """
    here = {n: t.detach().cpu() for n, t in tensors.items()}
    header = finite({"schema": schema, **meta})
    text = json.dumps({**header, "sha256": _sha256(header, here)}, allow_nan=False)
    with atomic_path(path) as temporary:
        save_file(here, temporary, {f"mansu_{kind}": text})


def read_tensors(path: Path, kind: str, schema: int) -> tuple[dict[str, Tensor], dict[str, Json]]:
    """The tensors and the header of a file of one kind.

    Raises:
        ArtifactError: missing, damaged, too large, of another kind or schema, or changed since it
            was written.
    """
    try:
        tensors, meta = _read(Path(path), kind)
    except (OSError, SafetensorError, ValueError) as error:
        raise ArtifactError(f"{path} is not a readable {kind}: {unread(error)}.") from error
    if meta.get("schema") != schema:
        raise ArtifactError(
            f"{path} has the {kind} schema {shown(meta.get('schema'))}; this version reads "
            f"{schema}. Make it again."
        )
    sha = meta.pop("sha256", None)
    if sha != _sha256(meta, tensors):
        raise ArtifactError(f"{path} was changed after it was written: its hash does not match.")
    del meta["schema"]
    return tensors, meta


def _read(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Json]]:
    check_regular(path, MAX_BYTES)
    if not path.stat().st_size:
        raise ValueError("it is empty; make it again")
    with path.open("rb") as stream:
        if int.from_bytes(stream.read(8), "little") > MAX_HEADER:
            raise ValueError(f"its header is longer than {MAX_HEADER:,} bytes")
    with safe_open(path, "pt") as file:
        header = (file.metadata() or {}).get(f"mansu_{kind}")
        if header is None:
            raise ValueError(f"it holds no mansu_{kind}")
        meta = parse_json(header)
        if not isinstance(meta, dict):
            raise ValueError("its header is no object")
        names = list(file.keys())
        for name in names:
            dtype = file.get_slice(name).get_dtype()
            if dtype not in DTYPES:
                raise ValueError(f"{name} has the dtype {dtype}, not one of {sorted(DTYPES)}")
        return {n: file.get_tensor(n) for n in names}, meta


def make_folder(folder: Path) -> None:
    """Make the folder of a checkpoint.

    Raises:
        ResourceError: it cannot be made.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


@dataclass
class Checkpoint:
    """How far a loop has come, in one file, so that one that was killed goes on there."""

    SCHEMA: ClassVar[int]
    """Version of the file's format."""
    META: ClassVar[dict[str, object]]
    """What is checked of its header."""
    OF: ClassVar[str]
    """What decides what the loop does, in words."""

    path: Path | None = None
    """The file; None: nothing is written."""
    made_of: str = ""
    """A hash of what the loop works on."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """What was found in the file."""
    saved: float = field(default_factory=time.monotonic)
    """When it was written last."""

    def read(self) -> dict[str, Json] | None:
        """The header of the file, whose tensors are then at hand; None if there is no file.

        Raises:
            ArtifactError: the file is damaged, or of another loop.
            ResourceError: its folder is not there.
        """
        if self.path is None:
            return None
        self._check_folder(self.path.parent)
        if not self.path.exists():
            return None
        try:
            self.tensors, meta = read_tensors(self.path, "checkpoint", self.SCHEMA)
            expect(meta, {"made_of": str, **self.META}, "its header")
        except ArtifactError as error:
            raise ArtifactError(f"{error} {ANEW}") from error
        except ValueError as error:
            raise self.unreadable(error) from error
        if meta["made_of"] != self.made_of:
            raise ArtifactError(
                f"{self.path} was written by a run of another {self.OF}. With what it was written "
                f"for, the same command goes on. {ANEW}"
            )
        return meta

    def unreadable(self, why: ValueError) -> ArtifactError:
        """The error over a header that does not hold what it should."""
        return ArtifactError(f"{self.path} is not a readable checkpoint: {why}. {ANEW}")

    def _check_folder(self, folder: Path) -> None:
        """Raise ResourceError unless it is there: whoever names a checkpoint makes its folder."""
        if not folder.is_dir():
            raise ResourceError(
                f"There is no folder {folder}: it was removed while it was in use, or never made. "
                "Make it, or name another."
            )

    def restore(self, name: str, into: Tensor) -> None:
        """Copy a tensor of the file into one of the loop's.

        Raises:
            ArtifactError: it is missing or of another shape.
        """
        found = self.tensors.get(name)
        if found is None or found.shape != into.shape or found.dtype != into.dtype:
            raise ArtifactError(f"{self.path} lacks {name}. {ANEW}")
        into.copy_(found)

    def is_due(self) -> bool:
        """Whether it is time to write the checkpoint again."""
        return self.path is not None and time.monotonic() - self.saved >= SECONDS

    def write(self, tensors: dict[str, Tensor], meta: Mapping[str, object]) -> None:
        """Write the file, whole or not at all; of several processes the first one does.

        Raises:
            ResourceError: the disk is full, or the folder was removed meanwhile.
        """
        if self.path is not None and rank() == 0:
            self._check_folder(self.path.parent)
            header = {"made_of": self.made_of, **meta}
            write_tensors(self.path, "checkpoint", self.SCHEMA, tensors, header)
            self.saved = time.monotonic()


TREE = 64
"""Tokens of a `Trees` row, about: longer rows share more, and cost more attention."""


@dataclass(frozen=True)
class Trees:
    """Prompts in rows of trees: what several of a row begin with stands there once."""

    tokens: Int[Tensor, "trees pos"]
    depth: Int[Tensor, "trees pos"]
    """Each token's position in its prompt."""
    seen: Bool[Tensor, "trees pos pos"]
    """Which tokens of its row each one sees: those before it in its prompt, and itself."""
    tree: Int[Tensor, " n"]
    """The row of each position that was asked for."""
    at: Int[Tensor, " n"]
    """Where it is in that row."""


def plant(prompts: Sequence[Sequence[int]], rows: Sequence[int], at: Sequence[int]) -> Trees:
    """Lay out prompts as trees.

    Arguments:
        prompts: token ids; padding and whatever else follows the last position read is left out.
        rows: of which prompt a position is read, one or several of each.
        at: the positions.
    """
    lengths: dict[int, int] = {}
    for row, position in zip(rows, at, strict=True):
        lengths[row] = max(lengths.get(row, 0), position + 1)
    # Sorted, prompts that begin alike are neighbours, and each shares most with the one before.
    used = sorted((tuple(prompts[row][:n]), row) for row, n in lengths.items())
    before = [(), *(prompt for prompt, _ in used[:-1])]
    new = [len(p) - _alike(p, q) for (p, _), q in zip(used, before, strict=True)]
    size = sum(new) / max(1, round(sum(new) / TREE))
    tokens: list[list[int]] = []
    depth: list[list[int]] = []
    parents: list[list[int]] = []
    place: dict[int, tuple[int, list[int]]] = {}
    path, last, done = list[int](), tuple[int, ...](), 0
    for (prompt, row), more in zip(used, new, strict=True):
        if done >= size * len(tokens):  # equal shares, for rows of little padding
            tokens, depth, parents = [*tokens, []], [*depth, []], [*parents, []]
            path, last = [], ()
        path = path[: _alike(prompt, last)]
        for position in range(len(path), len(prompt)):
            parents[-1].append(path[-1] if path else -1)
            path.append(len(tokens[-1]))
            tokens[-1].append(prompt[position])
            depth[-1].append(position)
        place[row], last, done = (len(tokens) - 1, list(path)), prompt, done + more
    width = max(map(len, tokens))
    seen = torch.eye(width, dtype=torch.bool).repeat(len(tokens), 1, 1)
    for mask, above in zip(seen.numpy(), parents, strict=True):
        for child, parent in enumerate(above):
            if parent >= 0:
                mask[child] |= mask[parent]
    padded = ([[*r, *[0] * (width - len(r))] for r in each] for each in (tokens, depth))
    return Trees(
        *map(torch.tensor, padded),
        seen=seen,
        tree=torch.tensor([place[row][0] for row in rows]),
        at=torch.tensor([place[r][1][n] for r, n in zip(rows, at, strict=True)]),
    )


def _alike(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    """How many leading tokens two prompts share."""
    pairs = zip(first, second, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
