"""Fuzz every loader: whatever a file holds, only the package's own errors come out.

    pip install atheris
    python scripts/fuzz.py --share 1            # every loader, about a million inputs; a table
    python scripts/fuzz.py --loader mask --runs 5000
    python scripts/fuzz.py --folders model --count 10000    # needs no atheris
    python scripts/fuzz.py --folders run --count 2000
    python scripts/fuzz.py --loader rows --runs 5000 --sample    # without atheris; share taken

Coverage-guided by atheris (libFuzzer). Half of the inputs are changed as what they are (a value of
a JSON tree, a header of a tensor file), half as bytes. One process per loader; a stack trace of
anything but a `MansuError` ends it and leaves the input there as ``crash-*``.

Folders: files of a small model's folder, or of a half-finished run's, are altered, truncated,
replaced, removed or made something else than files. What is done to the k-th one follows from
``--seed`` and k. A model must be refused, or load and answer; `verify` must find the change, or
name it, or the model must behave as before. A run must refuse to go on, or end with the same
bytes. Anything else, or 60 s without an end, leaves the folder there as ``crash-*``.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import csv
import dataclasses
import functools
import inspect
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mansu_interp.errors import MansuError

if TYPE_CHECKING:
    from mansu_interp.models.language_model import LanguageModel

ROOT = Path(__file__).resolve().parents[1]
HOSTILE: list[Any] = [
    None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e400, 2**31, -(2**63), 10**30, 10**400,
    float("nan"), "", "a", "\0", "..", "../../etc/passwd", "/dev/zero", "{s}", "\ud800",
    "é" * 300, "x" * 5000,
    [], {}, [[]], [None], {"": None}, [0] * 2000,
]  # fmt: skip
"""What a value is replaced with."""
WORK = Path(os.environ.get("MANSU_FUZZ", "/dev/shm" if Path("/dev/shm").is_dir() else "/tmp"))


def _paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in a JSON value something stands, at most a few thousand places."""
    out, queue = [], [(value, at)]
    while queue and len(out) < 3000:
        inner, here = queue.pop()
        keys = inner.keys() if isinstance(inner, dict) else range(len(inner)) \
            if isinstance(inner, list) else ()  # fmt: skip
        for key in keys:
            out.append((*here, key))
            queue.append((inner[key], (*here, key)))
    return out


def mutate_json(value: Any, rng: random.Random) -> Any:
    """A copy with one to three values replaced, removed, doubled, renamed or exchanged."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        paths = _paths(value)
        if not paths:
            return rng.choice(HOSTILE)
        path = rng.choice(paths)
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        key, how = path[-1], rng.randrange(6)
        if how == 0:
            del parent[key]
        elif how == 1 and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        elif how == 1:
            parent[f"{key}{rng.choice(['', 's', '|index', '.'])}x"] = parent.pop(key)
        elif how == 2:
            other = value
            for step in rng.choice(paths):
                other = other[step]
            parent[key] = copy.deepcopy(other)
        elif how == 3 and isinstance(parent[key], int):
            parent[key] += rng.choice([-1, 1, 7, 1000, 10**9])
        else:
            parent[key] = copy.deepcopy(rng.choice(HOSTILE))
    return value


def mutate_text(data: bytes, rng: random.Random) -> bytes:
    """JSON changed as a tree; now and then nested deeply."""
    value = json.loads(data.decode("utf-8", "surrogatepass"))
    text = json.dumps(mutate_json(value, rng), ensure_ascii=rng.random() < 0.9)
    if rng.random() < 0.01:
        text = "[" * 100_000 + text
    return text.encode("utf-8", "surrogatepass")


def mutate_tensors(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with a changed header of the right length, at times in the header's own
    JSON metadata, or with changed data."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    how = rng.randrange(3)
    (key,) = [k for k in header.get("__metadata__", {}) if k.startswith("mansu_")][:1] or [None]
    if how == 0 and key:
        inner = json.loads(header["__metadata__"][key])
        header["__metadata__"][key] = json.dumps(mutate_json(inner, rng))
    elif how == 1:
        header = mutate_json(header, rng)
    elif body:
        body[rng.randrange(len(body))] = rng.randrange(256)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(body)


@dataclass
class Loader:
    """One kind of input."""

    seeds: Callable[[], list[bytes]]
    """Valid inputs."""
    load: Callable[[bytes], object]
    """Reads one input; may raise `MansuError`."""
    mutate: Callable[[bytes, random.Random], bytes]
    runs: int
    """Inputs of a full run."""


def _file(name: str, data: bytes) -> Path:
    path = _scratch() / name
    path.write_bytes(data)
    return path


_SCRATCH: list[Path] = []


def _scratch() -> Path:
    if not _SCRATCH:
        _SCRATCH.append(Path(tempfile.mkdtemp(prefix="mansu-fuzz-", dir=WORK)))
    return _SCRATCH[0]


def _written(save: Callable[[Path], object]) -> bytes:
    path = _scratch() / "seed"
    save(path)
    return path.read_bytes()


def _circuit_seeds() -> list[bytes]:
    from mansu_interp.circuits.circuit import Circuit
    from mansu_interp.circuits.config import CircuitConfig
    from mansu_interp.circuits.search.meta import CircuitMeta
    from mansu_interp.models.graph import Architecture, Graph

    out = []
    for sizes in ((1, 1, 1), (2, 2, 1)):
        graph = Graph(Architecture(*sizes))
        scores = graph.exists.astype("float32") / 3
        meta = CircuitMeta("m", "aa", CircuitConfig(), faithfulness=0.9, curve=((1, 0.5),))
        out.append(_written(Circuit(graph, scores, graph.exists, meta).save))
    return out


def _load_circuit(data: bytes) -> object:
    from mansu_interp.circuits.circuit import Circuit

    found = Circuit.load(_file("c.json", data))
    return found.to_networkx() if found.edges.size < 10**6 else found


def _mask_seeds() -> list[bytes]:
    import torch

    from mansu_interp.masks.mask import Mask

    mask = Mask({"a": torch.arange(4), "b": torch.tensor([1, 5])}, {"limit": 3, "survive": ["nf4"]})
    return [_written(mask.save)]


def _load_mask(data: bytes) -> object:
    from mansu_interp.masks.mask import Mask

    found = Mask.load(_file("m.safetensors", data))
    return found.limit, found.n_parameters


def _ledger_seeds() -> list[bytes]:
    import torch

    from mansu_interp.export.ledger import Ledger

    parts = {
        "a|index": torch.tensor([0, 2], dtype=torch.int32),
        "a|old": torch.ones(2, dtype=torch.bfloat16),
        "a|new": torch.zeros(2, dtype=torch.bfloat16),
        "a|nf4": torch.ones(2, 2, dtype=torch.uint8),
    }
    return [_written(Ledger(parts, {"survive": ["nf4"], "mask_sha256": ""}).save)]


def _load_ledger(data: bytes) -> object:
    from mansu_interp.export.ledger import Ledger

    return Ledger.load(_file("l.safetensors", data)).n_edits


def _state_seeds() -> list[bytes]:
    import torch

    from mansu_interp.unlearning.checkpoint import Checkpoint
    from mansu_interp.unlearning.history import StepRecord

    def save(path: Path) -> None:
        Checkpoint(path, "x").save([StepRecord(forget=0.5)], {"a|position": torch.ones(3)}, 0.25)

    return [_written(save)]


def _load_state(data: bytes) -> object:
    import torch

    from mansu_interp.unlearning.checkpoint import Checkpoint

    place = Checkpoint(_file("s.safetensors", data), "x")
    place.load()
    return place.restore("a|position", torch.zeros(3))


class _Tokenizer:
    unk_token_id = 0
    chat_template = "{{ messages }}"

    def decode(self, tokens: list[int]) -> str:
        return "x" * len(tokens)

    def apply_chat_template(self, turns: list[dict[str, str]], **_: object) -> str:
        return turns[0]["content"]


@functools.cache
def _model() -> LanguageModel:
    """Encodes letter by letter: a task needs nothing else of a model."""
    from mansu_interp.models.language_model import LanguageModel

    class Letters(LanguageModel):
        def __init__(self) -> None:
            self.name, self.tokenizer = "letters", _Tokenizer()  # type: ignore[assignment]

        def encode(self, text: str) -> list[int]:
            return [1 + ord(c) % 500 for c in text.strip()]

    return Letters()


TASK = {
    "schema": 2,
    "name": "t",
    "prefix": "<",
    "relations": {
        "r": {
            "table": "t.csv",
            "subject": "s",
            "answer": "a",
            "phrasings": {
                "train": ["{s} is"],
                "dev": {"d": ["in {s}"]},
                "unseen": {"u": ["of {s}"]},
            },
        },
        "k": {"table": "t.csv", "subject": "s", "answer": "b", "phrasings": {"train": ["k {s}"]}},
    },
    "forget": {"relations": ["r"], "subjects": None},
    "retain": ["k"],
    "retain_unscored": [],
    "neighbours": [],
    "text": {"train": "t.txt"},
    "reference_models": [],
}
TABLE = "s,a,b\n" + "".join(f"x{c},{c}1,{d}2\n" for c, d in zip("abcde", "vwxyz", strict=True))


def _task_seeds() -> list[bytes]:
    return [json.dumps({"task": TASK, "table": TABLE, "text": "one\ntwo\n"}).encode()]


def _load_task(data: bytes) -> object:
    """A JSON object of three files; anything else is the task file itself."""
    from mansu_interp.tasks.load import load_task

    with contextlib.suppress(LookupError, ValueError, TypeError, RecursionError):
        parts = json.loads(data)
        data = json.dumps(parts["task"]).encode()
        _file("t.csv", str(parts["table"]).encode("utf-8", "surrogatepass"))
        _file("t.txt", str(parts["text"]).encode("utf-8", "surrogatepass"))
    return load_task(_file("t.json", data), _model())


def _plain_rows() -> list[dict[str, Any]]:
    """Rows of our own for both roles."""
    return [
        {"role": role, "prompt": f"{role} {k} is", "answer": f"{x} {role}", "subject": f"s{k}"}
        for role in ("forget", "retain")
        for k, x in enumerate("abcdef")
    ]


def _shaped_rows() -> dict[str, list[dict[str, Any]]]:
    """The same in every known shape."""
    rows = _plain_rows()
    asked = [{"role": r["role"], "question": r["prompt"]} for r in rows]
    wrong = ["one x", "two y", "three z"]
    turns = [[("user", r["prompt"]), ("assistant", r["answer"])] for r in rows]
    return {
        "own": rows,
        "plain": [{**a, "answer": r["answer"]} for a, r in zip(asked, rows, strict=True)],
        "tofu": [
            {**a, "answer": r["answer"], "paraphrased_answer": f"It is {r['answer']}",
             "perturbed_answer": [f"It is {w}" for w in wrong]}
            for a, r in zip(asked, rows, strict=True)
        ],
        "choices": [
            {**a, "choices": [*wrong, r["answer"]], "answer": 3}
            for a, r in zip(asked, rows, strict=True)
        ],
        "lettered": [
            {**a, **dict(zip("ABCD", [r["answer"], *wrong], strict=True)), "answer": "A"}
            for a, r in zip(asked, rows, strict=True)
        ],
        "chat": [
            {"role": r["role"], "messages": [{"role": w, "content": t} for w, t in said]}
            for r, said in zip(rows, turns, strict=True)
        ],
    }  # fmt: skip


def _row_seeds() -> list[bytes]:
    options = {"prefix": "<", "phrasings": {"train": ["{s}"], "unseen": ["so {s}"]}}
    return [
        json.dumps({"as": kind, "rows": rows, "options": options}).encode()
        for rows in _shaped_rows().values()
        for kind in ("jsonl", "json", "csv", "tsv", "parquet")
    ]


ORDINARY: list[Any] = [
    0, 7, 1969, "NA", "007", " spaced ", "Zürich", "东京", "a|b|c", "x" * 300, "two\nlines", "A",
    "3", 'quo"ted', "semi;colon", None, "train", "unseen", "retain", "neighbour", "\u202eback",
]  # fmt: skip
"""What stands in people's rows."""


FORMATS = ["jsonl", "json", "csv", "tsv", "semicolon", "parquet", "list"]


def mutate_rows(data: bytes, rng: random.Random) -> bytes:
    """Mostly as people's files differ: other values, fields, order, formats; a quarter hostile."""
    value = json.loads(data.decode("utf-8", "surrogatepass"))
    if rng.random() < 0.25:
        return mutate_text(data, rng)
    for _ in range(rng.randint(1, 3)):
        rows = value["rows"]
        row = rng.choice(rows)
        key, how = rng.choice([*row]), rng.randrange(8)
        if how == 0:
            text = f"{rng.choice(ORDINARY)} {rng.randrange(99)}"
            row.update({k: text for k in (key,) if isinstance(row[k], str) and k != "role"})
        elif how == 1:
            name = rng.choice(["id", "relation", "subject", "split", "phrasing", "Unnamed: 0"])
            row[name] = rng.choice(ORDINARY)
        elif how == 2:
            rng.shuffle(rows)
        elif how == 3:
            rows.append({**row})
        elif how == 4:
            value["as"] = rng.choice(
                ["jsonl", "json", "csv", "tsv", "semicolon", "parquet", "list"]
            )
        elif how == 5:
            for r in rows:
                r.update({k.upper(): r.pop(k) for k in (key,) if k in r})
        elif how == 6:
            name = rng.choice(
                ["letters", "chat", "normalise", "corrupt", "seed", "symbol", "prefix"]
            )
            value["options"][name] = rng.choice([True, False, "any", "swap", "rotate", 3, "", "#"])
        else:
            row[key] = rng.choice(ORDINARY)
    return json.dumps(value, ensure_ascii=rng.random() < 0.9).encode("utf-8", "surrogatepass")


def _as_file(kind: str, rows: list[Any]) -> Any:
    """Rows as a file of some format, or as they are."""
    if kind == "list":
        return rows
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = _scratch() / "r.parquet"
        try:
            pq.write_table(pa.Table.from_pylist(rows), path)
        except Exception:  # not of one type a column, which no Parquet file holds
            return rows
        return path
    if kind in ("csv", "tsv", "semicolon"):
        stream = io.StringIO(newline="")
        names = list(dict.fromkeys(k for r in rows for k in r))
        by = {"csv": ",", "tsv": "\t", "semicolon": ";"}[kind]
        writer = csv.DictWriter(stream, names, delimiter=by)
        writer.writeheader()
        writer.writerows(rows)
        text, name = stream.getvalue(), "r.tsv" if kind == "tsv" else "r.csv"
    else:
        text = json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows))
        name = "r.json" if kind == "json" else "r.jsonl"
    return _file(name, text.encode("utf-8", "surrogatepass"))


MADE = collections.Counter[str]()
"""How many row inputs were read, and how many of them became tasks."""


def _load_rows(data: bytes) -> object:
    """A JSON object of rows, a format and options; anything else is a file of rows itself."""
    from mansu_interp.tasks.data.row_pairs import task_from_rows
    from mansu_interp.tasks.data.rows import read_rows
    from mansu_interp.tasks.schema import RowOptions, parse_task

    source, options = _file("r.jsonl", data), {}
    with contextlib.suppress(LookupError, ValueError, TypeError, AttributeError, RecursionError):
        parts = json.loads(data)
        options = {str(k): v for k, v in parts["options"].items()}
        source = _as_file(str(parts["as"]), parts["rows"])
    rows = read_rows(source)
    MADE["read"] += 1
    try:
        spec = parse_task({**options, "schema": 2, "name": "x", "rows": "r.jsonl"})
    except ValueError:  # as `read_task_file` tells it
        return rows
    with contextlib.suppress(MansuError):  # what lies behind the parser
        known = {name: getattr(spec, name) for name in RowOptions.__dataclass_fields__}
        task_from_rows(rows, _model(), RowOptions(**known))
        MADE["tasks"] += 1
    return rows


def _argument_seeds() -> list[bytes]:
    lines = [
        "run", "run --model facts --task capitals --out x --budget 0.01 --seed 3",
        "run --method npo --unlearn.lr 1e-5 --unlearn.steps 4 --threads 1",
        "run --robust --circuit.pairs 8 --circuit.metric kl --quantizers nf4 q4_0 --quiet",
        "bench --tasks capitals --methods mansu npo --seeds 0 1 --out x",
        "plan --model facts --tokens 32 --attribution.batch-size 8 --json",
        "verify facts x --ledger l.safetensors --survive nf4,q4_0", "cad facts x --task capitals",
        "relearn x --task capitals --original facts", "delta facts x --out d.safetensors",
        "apply facts d.safetensors --out x", "export x --type q4_0 --out x.gguf",
        "task tofu --forget a.jsonl --retain b.jsonl --out t.json --chat", "list --json",
    ]  # fmt: skip
    return [json.dumps(line.split()).encode() for line in lines]


WORDS = [
    "--budget", "--seed", "--quiet", "--json", "--robust", "--out", "--model", "--task", "0", "-1",
    "nan", "inf", "1e999", "1e-5", "", " ", "--", "-", "x" * 300, "\x1b[31m", "a\0b", "..", "True",
    "none", "None", "nf4", "npo", "--method", "--unlearn.steps", "--unlearn.lr", "--circuit.pairs",
    "--help", "--help-all", "run", "bench", "9" * 30, "\udcff", "--threads", "--unlearn", "{}",
]  # fmt: skip


def mutate_words(data: bytes, rng: random.Random) -> bytes:
    """A command line with words changed, left out, doubled or put in."""
    words = [str(w) for w in json.loads(data)]
    for _ in range(rng.randint(1, 3)):
        at, how = rng.randrange(len(words) + 1), rng.randrange(4)
        if how == 0 and words:
            del words[at % len(words)]
        elif how == 1 and words:
            words[at % len(words)] = rng.choice(WORDS)
        else:
            words.insert(at, rng.choice(WORDS))
    return json.dumps(words).encode()


def _load_arguments(data: bytes) -> object:
    """Settings of a command line; tyro's own refusal counts as ours."""
    from mansu_interp.cli.commands import Output
    from mansu_interp.cli.main import parse

    try:
        words = [str(w) for w in json.loads(data)]
    except (ValueError, TypeError, RecursionError):
        words = [data.decode("utf-8", "surrogateescape")]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            return parse(Output.split(words)[1])
        except SystemExit as end:
            if end.code:
                raise MansuError("refused") from end
            return None


@functools.cache
def _things() -> dict[str, Any]:
    """What people hold while they work, by a name: arguments of calls."""
    import numpy as np
    import torch

    import mansu_interp as mansu
    from mansu_interp.circuits.search.meta import CircuitMeta
    from mansu_interp.tasks.schema import RowOptions

    folder = _scratch() / "model"
    said = [f"{row['prompt']} {row['answer']}" for row in _plain_rows()]
    _tiny_folder(folder, 0, more=" ".join(said))
    model, other = mansu.load_model(folder), mansu.load_model(folder)
    rows = mansu.read_rows(_plain_rows())
    words = {"train": ["{s}"], "unseen": ["of {s}"]}
    task = mansu.task_from_rows(rows, model, RowOptions(phrasings=words))
    texts = ["the capital", "of Peru"]
    pairs = mansu.PairSet.from_prompts(model, texts, texts[::-1], ["is", "Lima"], ["Lima", "is"])
    config = mansu.AttributionConfig(ig_steps=1, pairs=2)
    attribution = mansu.attribute(model, pairs, config=config)
    graph = model.graph
    circuit = mansu.Circuit(graph, attribution.scores, graph.exists, CircuitMeta("m"))
    version = mansu.ModelVersion("original")
    mask = mansu.Mask({"model.layers.0.mlp.down_proj.weight": torch.arange(4)}, {})
    return {
        "model": model, "other": other, "hf": model.hf, "tokenizer": model.tokenizer,
        "pairs": pairs, "forget": task.forget, "pair": pairs.pairs[0], "list": list(pairs),
        "tuple": pairs.pairs, "task": task, "rows": rows, "circuit": circuit,
        "edges": circuit.edges, "scores": circuit.scores, "graph": graph,
        "attribution": attribution, "mask": mask, "ablation": mansu.Ablation(model, pairs),
        "unlearned": mansu.Unlearned(model, []), "version": version, "versions": {version: model},
        "models": {"unlearned": other}, "nf4": "nf4", "quantizer": mansu.NF4(), "texts": texts,
        "folder": folder, "path": folder / "nothing", "name": "facts", "word": "Lima",
        "empty": "", "none": None, "zero": 0, "one": 1, "minus": -1, "indices": mask.indices,
        "half": 0.5, "nan": float("nan"), "yes": True, "large": 10**30, "nothing": [], "dict": {},
        "bytes": b"x", "tensor": torch.zeros(2), "long": torch.zeros(1, 2, dtype=torch.long),
        "array": np.zeros(3), "class": dict, "attribute config": config,
        "run config": mansu.RunConfig(model="nowhere"),
        "circuit config": mansu.CircuitConfig(pairs=2, ig_steps=1, top=9, faithfulness_pairs=2),
        "relearn config": mansu.RelearnConfig(steps=(1,), rates=(1e-3,)),
        "row options": RowOptions(), "mansu config": mansu.Mansu(steps=1, batch_size=2),
        "set": {"a"}, "sets": (pairs,), "file": folder / "x", "kl": "kl", "survive": ("nf4",),
        "steps": (1, 2), "view": mansu.circuit_view(circuit),
    }  # fmt: skip


CALLS: dict[str, dict[str, str]] = {
    "load_model": {"name": "folder"},
    "load_task": {"name": "word", "model": "model"},
    "read_prompts": {"source": "path", "model": "model"},
    "read_rows": {"source": "rows"},
    "task_from_rows": {"rows": "rows", "model": "model", "options": "row options"},
    "PairSet": {"name": "word", "pairs": "tuple"},
    "PairSet.from_prompts": {"model": "model", "clean": "texts", "corrupt": "texts",
                             "answers": "texts", "wrong": "texts"},
    "PairSet.sample": {"self": "pairs", "n": "one", "seed": "zero"},
    "LanguageModel": {"name": "word", "hf": "hf", "tokenizer": "tokenizer"},
    "LanguageModel.generate": {"self": "model", "prompt": "word", "max_new_tokens": "one"},
    "LanguageModel.encode": {"self": "model", "text": "word"},
    "attribute": {"model": "model", "pairs": "pairs", "config": "attribute config"},
    "edge_changes": {"before": "attribution", "after": "attribution"},
    "Attribution.edge": {"self": "attribution", "source": "word", "target": "word"},
    "Attribution.top": {"self": "attribution", "n": "one"},
    "Ablation": {"model": "model", "pairs": "pairs", "metric": "kl"},
    "Ablation.faithfulness": {"self": "ablation", "edges": "edges"},
    "circuit_metric": {"model": "model", "pairs": "pairs", "edges": "edges"},
    "faithfulness_curve": {"ablation": "ablation", "scores": "scores"},
    "discover": {"model": "model", "forget": "pairs", "config": "circuit config"},
    "Circuit": {"graph": "graph", "scores": "scores", "edges": "edges"},
    "Circuit.top": {"self": "circuit", "n": "one"},
    "Circuit.ablate": {"self": "circuit", "model": "model", "pairs": "pairs"},
    "Circuit.load": {"path": "path"},
    "Circuit.save": {"self": "circuit", "path": "file"},
    "Mask.save": {"self": "mask", "path": "file"},
    "Attribution.save": {"self": "attribution", "path": "file"},
    "classify": {"before": "scores", "after": "scores"},
    "compare": {"circuit": "circuit", "original": "model", "models": "models", "pairs": "pairs",
                "config": "attribute config"},
    "get_quantizer": {"name": "nf4"},
    "quantize": {"model": "model", "quantizer": "nf4"},
    "survival": {"before": "model", "after": "other", "quantizer": "nf4"},
    "Mask": {"indices": "indices", "meta": "dict"},
    "Mask.load": {"path": "path"},
    "circuit_mask": {"circuit": "circuit", "model": "model", "budget": "half", "forget": "pairs",
                     "retain": "sets"},
    "other_half": {"task": "task", "pairs": "forget"},
    "relearn": {"model": "model", "task": "task", "config": "relearn config"},
    "relearned": {"model": "model", "task": "task", "rate": "half", "config": "relearn config"},
    "judge_erasure": {"original": "model", "edited": "other", "task": "task"},
    "get_method": {"name": "word"},
    "unlearn": {"model": "model", "task": "task", "mask": "mask", "config": "mansu config"},
    "ModelVersion": {"name": "word", "quantizer": "nf4"},
    "evaluate": {"models": "versions", "task": "task"},
    "circuit_view": {"circuit": "circuit", "model": "model"},
    "attribution_view": {"scores": "attribution"},
    "changes_view": {"circuit": "circuit", "before": "attribution", "after": "attribution"},
    "View.svg": {"self": "view"},
    "default_config": {"model": "name"},
    "make_mask": {"config": "run config", "model": "model", "task": "task", "circuit": "circuit"},
    "run": {"config": "run config"},
    "AttributionConfig": {"ig_steps": "one", "metric": "kl"},
    "CircuitConfig": {"top": "one", "faithfulness": "half"},
    "Mansu": {"steps": "one", "lr": "half", "survive": "survive"},
    "RelearnConfig": {"steps": "steps", "seed": "zero"},
    "RunConfig": {"model": "name", "budget": "half", "circuit": "circuit config"},
    "RowOptions": {"prefix": "word"},
}  # fmt: skip
"""Calls as people mean them: argument -> what is held."""


def _slip_seeds() -> list[bytes]:
    _things()
    return [json.dumps({"call": name, "given": given}).encode() for name, given in CALLS.items()]


def mutate_call(data: bytes, rng: random.Random) -> bytes:
    """A call with one or two arguments replaced, exchanged, left out or put in."""
    value = json.loads(data)
    if rng.random() < 0.3:
        name = rng.choice([*CALLS])
        value = {"call": name, "given": dict(CALLS[name])}
    given = value["given"]
    for _ in range(rng.randint(1, 2)):
        names, how = [n for n in given if n != "self"], rng.randrange(8)
        if how == 0 and len(names) > 1:
            a, b = rng.sample(names, 2)
            given[a], given[b] = given[b], given[a]
        elif how == 1:
            parameters = [*inspect.signature(_callee(value["call"])).parameters]
            added = rng.choice([p for p in parameters if p != "self"] or ["x"])
            given[added] = rng.choice([*_things()])
        elif names:
            given[rng.choice(names)] = rng.choice([*_things()])
    return json.dumps(value).encode()


def _callee(name: str) -> Callable[..., object]:
    """A public function, class or method by its name."""
    import mansu_interp

    return functools.reduce(getattr, name.split("."), mansu_interp)


def _call(data: bytes) -> object:
    """Call as the input says; what Python itself says of an argument that is not there is fine."""
    try:
        value = json.loads(data)
        callee = _callee(str(value["call"])) if value["call"] in CALLS else None
        given = {str(k): _things()[v] for k, v in value["given"].items()}
        assert callee is not None
        inspect.signature(callee).bind(**given)
        # What a function of the user's own raises is the user's.
        assert not any(callable(v) for k, v in given.items() if k == "metric" or k[:3] == "on_")
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError, RecursionError):
        raise MansuError("no call") from None
    place = _scratch() / "written"
    place.mkdir(exist_ok=True)
    with contextlib.chdir(place):  # some calls write, under whatever name they are given
        return callee(**given)


def _settings_seeds() -> list[bytes]:
    unlearn = {"steps": 5, "lr": 0.1, "survive": ["nf4"], "precision": "bf16", "stop_at": 0.3}
    settings = {"budget": 0.1, "by_layer": True, "quantizers": ["fp4"], "unlearn": unlearn}
    circuit = {"top": 5, "metric": "kl"}
    return [json.dumps({"settings": {**settings, "circuit": circuit}}).encode()]


def _load_settings(data: bytes) -> object:
    from mansu_interp.runs.defaults import default_config

    return default_config("facts", str(_file("t.json", data)))


def _report_seeds() -> list[bytes]:
    sys.path.insert(0, str(ROOT / "tests"))
    from test_report import make_report, with_graph

    return [json.dumps(r.to_json()).encode() for r in (make_report(), with_graph())]


def _load_report(data: bytes) -> object:
    from mansu_interp.report.html import render_html
    from mansu_interp.report.markdown import render_markdown
    from mansu_interp.report.records import Report
    from mansu_interp.report.terminal import console_summary

    report = Report.load(_file("report.json", data))
    return render_markdown(report), render_html(report, "<svg/>"), console_summary(report, 80)


def _config_seeds() -> list[bytes]:
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 50,
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 16, "dtype": "float32",
    }  # fmt: skip
    return [json.dumps(config).encode()]


def _load_config(data: bytes) -> object:
    from mansu_interp.models.load import empty_model

    return empty_model(_file("config.json", data)).architecture


def _trial_seeds() -> list[bytes]:
    sys.path.insert(0, str(ROOT / "tests"))
    from test_report import NF4_ROW, SCORES

    from mansu_interp.bench.results import (
        SCHEMA,
        DevScores,
        Measured,
        QuantizedEdit,
        Training,
        TrialName,
        TrialResult,
    )

    made = TrialResult(
        SCHEMA,
        TrialName("facts", "capitals", "npo", 0, 0.3, 1.0),
        {"seed": 0},
        "aa",
        training=Training(3, 1.5, 0.4),
        dev=DevScores(0.3, 1.0, 1.0),
        measured=Measured(
            SCORES, (), {"nf4": QuantizedEdit(NF4_ROW.survival, NF4_ROW.flips)}, 2, 9, {}
        ),
    )
    return [_written(made.save)]


def _load_trial(data: bytes) -> object:
    from mansu_interp.bench.results import TrialResult

    return TrialResult.load(_file("trial.json", data))


def _run_seeds() -> list[bytes]:
    from mansu_interp.runs.config import RunConfig
    from mansu_interp.runs.folder import config_json

    return [json.dumps(config_json(RunConfig())).encode()]


def _load_run(data: bytes) -> object:
    """The three JSON files that a run finds in its folder."""
    from mansu_interp.runs.config import RunConfig
    from mansu_interp.runs.folder import Clock, begin

    folder = _scratch() / "run"
    folder.mkdir(exist_ok=True)
    for name in ("config.json", "provenance.json"):
        (folder / name).write_bytes(data)
    with contextlib.suppress(MansuError):
        Clock(folder / "config.json")
    return begin(RunConfig(out=folder), {"versions": {}, "config_sha256": "x"})


LOADERS = {
    "model config": Loader(_config_seeds, _load_config, mutate_text, 1_000),
    "report": Loader(_report_seeds, _load_report, mutate_text, 1_000),
    "run folder": Loader(_run_seeds, _load_run, mutate_text, 5_000),
    "trial": Loader(_trial_seeds, _load_trial, mutate_text, 20_000),
    "settings": Loader(_settings_seeds, _load_settings, mutate_text, 20_000),
    "task": Loader(_task_seeds, _load_task, mutate_text, 20_000),
    "rows": Loader(_row_seeds, _load_rows, mutate_rows, 100_000),
    "slips": Loader(_slip_seeds, _call, mutate_call, 20_000),
    "arguments": Loader(_argument_seeds, _load_arguments, mutate_words, 5_000),
    "state": Loader(_state_seeds, _load_state, mutate_tensors, 230_000),
    "ledger": Loader(_ledger_seeds, _load_ledger, mutate_tensors, 290_000),
    "mask": Loader(_mask_seeds, _load_mask, mutate_tensors, 330_000),
    "circuit": Loader(_circuit_seeds, _load_circuit, mutate_text, 150_000),
}


def attempt(loader: Loader, data: bytes) -> bool:
    """Load one input: True if it is taken, False if it is refused; anything else is raised."""
    try:
        loader.load(data)
    except MansuError:
        return False
    return True


def fuzz(name: str, runs: int, corpus: Path) -> None:
    """Fuzz one loader in this process, which ends with it."""
    import atheris

    with atheris.instrument_imports(include=["mansu_interp"]):
        import mansu_interp.bench.results
        import mansu_interp.export.ledger
        import mansu_interp.report.records
        import mansu_interp.tasks.load
        import mansu_interp.unlearning.unlearn  # noqa: F401
    loader = LOADERS[name]
    corpus.mkdir(parents=True, exist_ok=True)
    for k, seed in enumerate(loader.seeds()):
        (corpus / f"seed-{k}").write_bytes(seed)

    def mutate(data: bytes, limit: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.5:
            with contextlib.suppress(Exception):  # no longer what it was: as bytes, then
                return loader.mutate(bytes(data), rng)[:limit]
        return atheris.Mutate(data, limit)

    atheris.Setup(
        [sys.argv[0], f"-runs={runs}", "-max_len=200000", "-rss_limit_mb=4096", "-timeout=60",
         "-print_final_stats=1", f"-artifact_prefix={corpus.parent}/", str(corpus)],
        lambda data: attempt(loader, data) and None,
        custom_mutator=mutate,
    )  # fmt: skip
    atheris.Fuzz()


def sample(name: str, runs: int, seed: int) -> None:
    """Changed seeds of one loader without coverage, in this process; prints the rates."""
    loader, rng, started = LOADERS[name], random.Random(seed), time.monotonic()
    seeds, taken = loader.seeds(), 0
    for _ in range(runs):
        data = loader.mutate(rng.choice(seeds), rng)
        try:
            taken += attempt(loader, data)
        except BaseException:
            (WORK / "mansu-crash").write_bytes(data)
            print(f"the input is in {WORK / 'mansu-crash'}")
            raise
    spent = time.monotonic() - started
    made = f", {MADE['tasks'] / runs:.0%} became tasks" if name == "rows" else ""
    print(f"{name}: {runs:,} inputs, {taken / runs:.0%} taken{made}, {runs / spent:,.0f} a second")


def lines_reached(name: str, corpus: Path) -> int:
    """Different lines of the package that the inputs kept by a fuzzer run through."""
    found: set[tuple[str, int]] = set()

    def trace(frame: Any, event: str, _: Any) -> Any:
        if "mansu_interp" not in frame.f_code.co_filename:
            return None
        if event == "line":
            found.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    loader = LOADERS[name]
    attempt(loader, loader.seeds()[0])  # imports are not counted
    sys.settrace(trace)
    try:
        for path in sorted(corpus.iterdir()):
            attempt(loader, path.read_bytes())
    finally:
        sys.settrace(None)
    return len(found)


def full(share: float, out: Path) -> None:
    """Fuzz every loader, one after the other, and print the table."""
    print("| loader | inputs | seconds | kept as new | lines reached | result |")
    print("|---|---|---|---|---|---|", flush=True)
    total = 0
    for name, loader in LOADERS.items():
        corpus, started = out / name.replace(" ", "-"), time.monotonic()
        runs = max(100, round(loader.runs * share))
        command = [
            sys.executable,
            __file__,
            "--loader",
            name,
            "--runs",
            str(runs),
            "--out",
            str(out),
        ]
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, errors="replace"
        )
        (out / f"{corpus.name}.log").write_text(done.stdout + done.stderr)
        said = re.search(r"number_of_executed_units: (\d+)", done.stderr)
        n = int(said.group(1)) if said else 0
        total += n
        spent, kept = time.monotonic() - started, len(list(corpus.iterdir()))
        result = "only own errors" if not done.returncode else f"exit {done.returncode}"
        lines = lines_reached(name, corpus)
        print(f"| {name} | {n:,} | {spent:.0f} | {kept} | {lines} | {result} |", flush=True)
    print(f"| all | {total:,} | | | | |", flush=True)


# Whole folders.

SECONDS = 60
"""That one folder may take."""
TEXTS = ("the capital of Peru is Lima", "<bos>Lima the", "of   Peru", "unknown words")


def _replace(file: Path, data: bytes) -> None:
    """Put other bytes at a path, whatever is there."""
    _remove(file)
    file.write_bytes(data)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def spoil(folder: Path, other: Path, rng: random.Random) -> list[str]:
    """Do one to three things to the files of a folder; returns what, in words.

    Arguments:
        folder: is changed.
        other: a folder of the same kind, from which files are taken.
        rng: decides.
    """
    done = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
        if not files:
            break
        file = rng.choice(files)
        how = rng.choice(HOW)
        done.append(f"{how.__name__.strip('_')} {file.relative_to(folder)}")
        with contextlib.suppress(
            ValueError, LookupError, TypeError, RecursionError
        ):  # no JSON, say
            how(file, folder, other, rng)
    return done


def _changed(file: Path, folder: Path, other: Path, rng: random.Random) -> None:
    """As what it is."""
    mutate = mutate_tensors if file.suffix == ".safetensors" else mutate_text
    file.write_bytes(mutate(file.read_bytes(), rng))


def _nudged(file: Path, folder: Path, other: Path, rng: random.Random) -> None:
    """One number, name or switch of a JSON file, a little."""
    value = json.loads(file.read_text())
    path = rng.choice(_paths(value))
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    old = parent[path[-1]]
    near: Any = old
    if isinstance(old, bool):
        near = not old
    elif isinstance(old, (int, float)):
        near = rng.choice([old + 1, old - 1, old * 2, old / 2])
    elif isinstance(old, str):
        near = rng.choice([old + "x", old[:-1], old.upper(), "gelu", "mistral"])
    parent[path[-1]] = near
    file.write_text(json.dumps(value))


def _truncated(file: Path, folder: Path, other: Path, rng: random.Random) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: rng.randrange(len(data) + 1)])


def _flipped(file: Path, folder: Path, other: Path, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    for _ in range(rng.choice([1, 1, 8])):
        data[rng.randrange(len(data))] = rng.randrange(256)
    file.write_bytes(bytes(data))


def _replaced(file: Path, folder: Path, other: Path, rng: random.Random) -> None:
    """By the file of the same name of another folder, or by any other file."""
    same = other / file.relative_to(folder)
    files = [p for p in sorted(other.rglob("*")) if p.is_file()]
    source = same if same.is_file() and rng.random() < 0.6 else rng.choice(files)
    _replace(file, source.read_bytes())


def _removed(file: Path, folder: Path, other: Path, rng: random.Random) -> None:
    _remove(file)


def _not_a_file(file: Path, folder: Path, other: Path, rng: random.Random) -> None:
    how = rng.randrange(5)
    _remove(file)
    if how == 0:
        os.mkfifo(file)
    elif how == 1:
        file.mkdir()
    else:
        file.symlink_to(["nowhere", file.name, "/dev/zero"][how - 2])


def _added(file: Path, folder: Path, other: Path, rng: random.Random) -> None:
    """A file under a name that means something to somebody."""
    name = rng.choice(MEANINGFUL)
    (file.parent / name).parent.mkdir(exist_ok=True)
    _replace(file.parent / name, rng.choice([b"", b"{}", b"[]", b"x", file.read_bytes()]))


HOW = (_changed, _changed, _nudged, _nudged, _truncated, _flipped, _replaced, _removed,
       _not_a_file, _added)  # fmt: skip
MEANINGFUL = (
    "model.safetensors.index.json", "model.safetensors", "x.safetensors", "adapter_config.json",
    "adapter_model.safetensors", "chat_template.jinja", "chat_template.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "generation_config.json", "vocab.json",
    "merges.txt", "modeling.py", "pytorch_model.bin", "quantize_config.json", "LICENSE",
    "README.md", "additional_chat_templates/rag.jinja", ".mansu.lock", "written.json", "model",
)  # fmt: skip


def _tiny_folder(folder: Path, seed: int, shards: bool = False, more: str = "") -> None:
    """A Llama of a few hundred weights with a word tokenizer and a chat template."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    words = ["<unk>", "<bos>", "<eos>", *dict.fromkeys(f"{TEXTS[0]} {more}".split())]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    config = LlamaConfig(
        vocab_size=len(words) + seed, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
        initializer_range=0.3, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="20KB" if shards else "5GB")
    tokenizer.save_pretrained(folder)
    (folder / "LICENSE").write_text("terms")


def behaviour(model: LanguageModel) -> list[Any]:
    """What a model does: logits, continuations, tokens of texts, a rendered chat."""
    import torch

    tokenizer = model.get_tokenizer()
    tokens = torch.tensor([[1, 3, 4, 5], [2, 6, 0, 3]])
    out: list[Any] = [model.all_logits(tokens).tolist()]
    out.append(model.hf.generate(tokens, max_new_tokens=3, pad_token_id=0).tolist())
    out += [tokenizer(t).input_ids for t in TEXTS]
    out.append(tokenizer.apply_chat_template([{"role": "user", "content": "Lima"}], tokenize=False))
    return out


def model_folders() -> Callable[[Path, random.Random], str]:
    """What makes one spoilt folder of an edited model, and judges what becomes of it."""
    import torch

    from mansu_interp.export.ledger import Ledger
    from mansu_interp.export.verify import verify
    from mansu_interp.masks.floor import floor
    from mansu_interp.models.load import load_model

    place, kinds = _scratch(), []
    _tiny_folder(place / "other", seed=1)
    for name, shards in (("one", False), ("shards", True)):
        _tiny_folder(place / name, 0, shards)
        original = load_model(place / name)
        edited, weight = original.copy(), "model.layers.0.mlp.down_proj.weight"
        where = floor(original.weights[weight], ("nf4",), torch.bfloat16)
        index = (~where.up.isnan()).nonzero()[:9, 0]
        edited.weights[weight].view(-1)[index] = where.up[index]
        folder = place / f"{name}-edited"
        if shards:
            edited.hf.to(torch.bfloat16).save_pretrained(folder, max_shard_size="20KB")
            edited.get_tokenizer().save_pretrained(folder)
        else:
            edited.save(folder)
        edited = load_model(folder)
        ledger = Ledger.of(original, edited, ("nf4",))
        assert verify(original, edited, (), ledger).status == 0
        kinds.append((original, folder, ledger, behaviour(edited)))

    def judge(folder: Path, rng: random.Random) -> str:
        original, source, ledger, before = rng.choice(kinds)
        shutil.copytree(source, folder)
        said = spoil(folder, place / "other", rng)
        (folder.parent / f"{folder.name}.txt").write_text("; ".join(said))
        try:
            loaded = load_model(folder)
            with contextlib.suppress(MansuError):
                loaded.generate("the capital", 1)
            found = verify(original, loaded, (), ledger)
        except MansuError:
            return "refused"
        if found.status:
            return "found"
        # The files may differ and mean the same; then it must do the same.
        assert behaviour(loaded) == before, f"verify is silent: {said}"
        return "named" if found.uncovered else "harmless"

    return judge


class _Stop(BaseException):
    """Ends a run where its result would be measured."""


def run_folders() -> Callable[[Path, random.Random], str]:
    """What makes one spoilt folder of a half-finished run, and judges what becomes of it."""
    from mansu_interp.circuits.config import CircuitConfig
    from mansu_interp.runs import run as pipeline
    from mansu_interp.runs.config import RunConfig
    from mansu_interp.unlearning.methods import Mansu
    from mansu_interp.utils import tensors

    place = _scratch()
    pipeline.load_model = functools.cache(pipeline.load_model)
    tasks: dict[str, Any] = {}
    load_task = pipeline.load_task
    pipeline.load_task = lambda name, model, n: tasks.setdefault(name, load_task(name, model, n))

    def stop(*_: Any) -> Any:
        raise _Stop

    pipeline.measure = stop
    circuit = CircuitConfig(pairs=2, ig_steps=1, top=20, faithfulness_pairs=2)
    settings = RunConfig(
        circuit=circuit, unlearn=Mansu(steps=2, batch_size=2, lr=0.1), score_pairs=2,
        relearn_steps=0, threads=1,
    )  # fmt: skip

    def go(out: Path, seed: int = 0, at: int = 99) -> None:
        def progress(stage: str, done: int, total: int) -> None:
            if (stage, done) == ("unlearning", at):
                raise _Stop

        with contextlib.suppress(_Stop):
            pipeline.run(dataclasses.replace(settings, out=out, seed=seed), progress)

    def bytes_of(folder: Path) -> dict[str, bytes]:
        files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
        skip = {"seconds.json", "config.json"}
        return {p.relative_to(folder).as_posix(): p.read_bytes()
                for p in files if p.name not in skip or p.parent != folder}  # fmt: skip

    # One name for all of them, since config.json holds it.
    out, tensors.SECONDS = place / "run", 0.0
    seeds = []
    for name, seed, at in (("other", 1, 99), ("begun", 0, 1), ("edited", 0, 99)):
        go(out, seed, at)
        out.rename(place / name)
        seeds.append(place / name)
    shutil.copytree(place / "edited", place / "no-ledger")
    (place / "no-ledger" / "ledger.safetensors").unlink()
    other, *kinds = [*seeds, place / "no-ledger"]
    right = bytes_of(place / "edited")
    mine = set(right)

    def judge(folder: Path, rng: random.Random) -> str:
        _remove(out)
        shutil.copytree(rng.choice(kinds), out)
        said = spoil(out, other, rng)
        (folder.parent / f"{folder.name}.txt").write_text("; ".join(said))
        folder.symlink_to(out)
        spoilt = bytes_of(out)
        try:
            go(out)
        except MansuError:
            return "found"
        ended = bytes_of(out)
        for name in sorted(mine - {"written.json"}):
            assert ended.get(name) == right[name], f"{name} is another: {said}"
        for name in sorted(ended.keys() - mine):  # strangers' files lie there untouched
            assert ended[name] == spoilt.get(name), f"{name} was written: {said}"
        return "harmless"

    return judge


FOLDERS = {"model": model_folders, "run": run_folders}


def fuzz_folders(kind: str, count: int, seed: int, out: Path) -> None:
    """Spoil so many folders and print how many were refused, found, named and harmless."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    judge, counts, started = FOLDERS[kind](), Counter[str](), time.monotonic()
    for k in range(count):
        folder = _scratch() / "spoilt"
        signal.alarm(SECONDS)
        try:
            counts[judge(folder, random.Random(f"{seed} {k}"))] += 1
        except BaseException:
            signal.alarm(0)
            kept = out / f"crash-{kind}-{seed}-{k}"
            if folder.exists():
                shutil.copytree(folder.resolve(), kept, symlinks=True, dirs_exist_ok=True,
                                ignore=lambda at, names: [n for n in names if not os.path.isfile(
                                    os.path.join(at, n)) and not os.path.isdir(
                                    os.path.join(at, n))])  # fmt: skip
            print(f"{kind} {seed} {k}: {(_scratch() / 'spoilt.txt').read_text()}", flush=True)
            raise
        signal.alarm(0)
        _remove(folder)
    spent = time.monotonic() - started
    cells = ", ".join(f"{n:,} {word}" for word, n in sorted(counts.items()))
    print(f"| {kind} folders | {count:,} | {spent:.0f} s | {cells} |")


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loader", choices=LOADERS)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--share", type=float, default=1.0, help="of a full run's inputs")
    parser.add_argument("--folders", choices=FOLDERS)
    parser.add_argument("--count", type=int, default=300, help="of folders")
    parser.add_argument("--out", type=Path, default=Path("fuzz"), help="kept inputs and logs")
    parser.add_argument("--sample", action="store_true", help="changed seeds alone, no atheris")
    parser.add_argument("--seed", type=int, default=0, help="of --sample and --folders")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        if args.folders:
            fuzz_folders(args.folders, args.count, args.seed, args.out)
        elif args.loader and args.sample:
            sample(args.loader, args.runs, args.seed)
        elif args.loader:
            fuzz(args.loader, args.runs, args.out / args.loader.replace(" ", "-"))
        else:
            full(args.share, args.out)
    finally:
        for folder in _SCRATCH:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
