"""A GGUF file asked in llama.cpp itself, in the place of the checkpoint that it was made from."""

from __future__ import annotations

import ctypes
import shlex
import weakref
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import ArtifactError, ConfigError, ModelError
from ..models.language_model import LanguageModel
from ..models.provenance import values_sha256
from ..quantizers.gguf import MADE_FROM, llama_cpp
from ..tasks.task import Task

ROOM = 1024
"""Bytes for a struct that is passed by value, more than any version of llama.cpp needs."""
SHORTEST = 64
"""Tokens that its context holds at least."""
TEXTS = 1000
"""Prompts on which both tokenizers must agree."""


class _Params(ctypes.Structure):
    """Parameters of a model, or of a context, which begin with three sizes."""

    _fields_ = (
        ("n_ctx", ctypes.c_uint32),
        ("n_batch", ctypes.c_uint32),
        ("n_ubatch", ctypes.c_uint32),
        ("rest", ctypes.c_uint8 * ROOM),
    )


class _Batch(ctypes.Structure):
    """``llama_batch``."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_SILENT = _LOG(lambda *_: None)


def _functions() -> ctypes.CDLL:
    """llama.cpp with the types of what is called.

    Raises:
        ConfigError: the wheel is missing, or of a build that does not export it.
    """
    found, pointer, whole = llama_cpp(), ctypes.c_void_p, ctypes.c_int32
    types = {
        "llama_model_default_params": (_Params, []),
        "llama_context_default_params": (_Params, []),
        "llama_model_load_from_file": (pointer, [ctypes.c_char_p, _Params]),
        "llama_init_from_model": (pointer, [pointer, _Params]),
        "llama_model_get_vocab": (pointer, [pointer]),
        "llama_model_meta_val_str": (
            whole,
            [pointer, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t],
        ),
        "llama_vocab_n_tokens": (whole, [pointer]),
        "llama_tokenize": (
            whole,
            [pointer, ctypes.c_char_p, whole, pointer, whole, ctypes.c_bool, ctypes.c_bool],
        ),
        "llama_batch_init": (_Batch, [whole] * 3),
        "llama_batch_free": (None, [_Batch]),
        "llama_decode": (whole, [pointer, _Batch]),
        "llama_get_memory": (pointer, [pointer]),
        "llama_memory_clear": (None, [pointer, ctypes.c_bool]),
        "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), [pointer, whole]),
        "llama_free": (None, [pointer]),
        "llama_model_free": (None, [pointer]),
        "llama_log_set": (None, [_LOG, pointer]),
    }
    try:
        for name, (result, arguments) in types.items():
            function = getattr(found, name)
            function.restype, function.argtypes = result, arguments
    except AttributeError as error:
        raise ConfigError(
            f"This build of xllamacpp lacks a function of llama.cpp ({error}). Install the tested "
            'version: pip install -c constraints.txt "mansu-interp[llama-cpp]".'
        ) from error
    found.llama_log_set(_SILENT, None)
    return found


def check_file(path: Path) -> None:
    """Raise ArtifactError unless there is a file to load."""
    if path.is_dir():
        raise ArtifactError(
            f"{path} is a folder, not a GGUF file. Write one of it and ask that: "
            f"{shlex.join(['mansu', 'export', str(path), '--out', 'model.gguf'])}."
        )
    if not path.is_file():
        raise ArtifactError(f"{path}: there is no such file. Write one: mansu export.")


@dataclass(repr=False)
class EngineModel(LanguageModel):
    """A checkpoint whose logits llama.cpp computes, from a GGUF file of it."""

    path: Path | None = None
    """The file."""
    made_from: str = ""
    """Hash of the weights that it was made from, by its own word; empty: it has none, as other
    converters write it."""

    @classmethod
    def open(cls, path: Path, checkpoint: LanguageModel) -> EngineModel:
        """Load a file.

        Arguments:
            path: of the file.
            checkpoint: what it was made from; names and tokenizer are its own.

        Raises:
            ArtifactError: no such file, llama.cpp cannot load it, its vocabulary is not the
                checkpoint's, or it was made from other weights, by its own word.
            ConfigError: the wheel is missing, or of a build that does not export it.
        """
        check_file(path)
        given = {f.name: getattr(checkpoint, f.name) for f in fields(LanguageModel) if f.init}
        model = cls(**{**given, "name": str(path)}, path=path)
        model._load()
        return model

    def _load(self) -> None:
        found = self._engine = _functions()
        handle = found.llama_model_load_from_file(
            str(self.path).encode(), found.llama_model_default_params()
        )
        if not handle:
            raise ArtifactError(
                f"llama.cpp cannot load {self.path}: no GGUF file, cut short, or of a kind of "
                "model that it does not know. Write it again: mansu export."
            )
        self._model = handle
        self._context, self._length = None, 0
        self._vocab = found.llama_model_get_vocab(handle)
        self._rows = found.llama_vocab_n_tokens(self._vocab)
        self._end = weakref.finalize(self, found.llama_model_free, handle)
        if self._rows != (rows := self.sizes[0]):
            raise ArtifactError(
                f"{self.path} has {self._rows:,} tokens, its checkpoint {rows:,}: they do not "
                "belong together. Name the one that the file was made from (--checkpoint)."
            )

        self.made_from = self._meta(MADE_FROM)
        if self.made_from and self.made_from != values_sha256(self):
            raise ArtifactError(
                f"{self.path} was made from other weights than the checkpoint's: what both answer "
                "says nothing of the file. Name the checkpoint that it was made from "
                "(--checkpoint), or write it again: mansu export."
            )

    def _meta(self, key: str) -> str:
        """A text in the file's metadata; empty: there is none."""
        room = ctypes.create_string_buffer(ROOM)
        self._engine.llama_model_meta_val_str(self._model, key.encode(), room, ROOM)
        return room.value.decode(errors="replace")

    def _room_for(self, length: int) -> None:
        """A context that holds a prompt of so many tokens."""
        if self._context and length <= self._length:
            return
        found, self._length = self._engine, max(length, SHORTEST, 2 * self._length)
        params = found.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = self._length
        if self._context:
            found.llama_free(self._context)
        self._end.detach()
        self._context = found.llama_init_from_model(self._model, params)
        self._end = weakref.finalize(self, _free, found, self._context, self._model)
        if not self._context:
            raise ModelError(
                f"llama.cpp gives {self.path} no context of {self._length:,} tokens: there is not "
                "enough memory. Ask shorter prompts, or free some."
            )

    @property
    def keeps_keys(self) -> bool:
        """No: every prompt is computed from its beginning."""
        return False

    def tokenize(self, text: str) -> list[int]:
        """Token ids as llama.cpp splits a text; special tokens are read, none is added."""
        raw = text.encode()
        ids = (ctypes.c_int32 * (len(raw) + 8))()
        n = self._engine.llama_tokenize(self._vocab, raw, len(raw), ids, len(ids), False, True)
        return ids[: max(n, 0)]

    def check_tokenizer(self, task: Task, split: str) -> None:
        """Compare how both split the prompts of a task.

        Raises:
            ModelError: the ids differ.
        """
        sets = [pairs for by in task.scored[split].values() for pairs in by.values()]
        prompts = dict.fromkeys(pair.prompt for pairs in sets for pair in pairs)
        step = max(1, len(prompts) // TEXTS)
        texts = list(prompts)[::step]
        odd = [text for text in texts if self.tokenize(text) != self.encode(text)]
        if odd:
            raise ModelError(
                f"llama.cpp splits {len(odd)} of {len(texts)} prompts otherwise than the "
                f"checkpoint's tokenizer: {odd[0]!r:.200} into {self.tokenize(odd[0])!s:.80}, not "
                f"{self.encode(odd[0])!s:.80}. Name the checkpoint that the file was made from "
                "(--checkpoint), or write the file again."
            )

    def logits_at(
        self,
        tokens: Int[Tensor, "batch pos"],
        rows: Int[Tensor, " n"],
        at: Int[Tensor, " n"],
    ) -> Float[Tensor, "n vocab"]:
        """See `LanguageModel.logits_at`; row by row, up to the last position that is asked for."""
        out = torch.empty(len(rows), self._rows)
        for row in rows.unique().tolist():
            mine = (rows == row).nonzero().flatten().cpu()
            places = at[mine.to(at.device)].cpu()
            wanted, where = places.unique(return_inverse=True)
            ids = tokens[row, : int(wanted[-1]) + 1].tolist()
            out[mine] = self._decode(ids, wanted.tolist())[where]
        return out.to(self.device)

    def all_logits(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
        """See `LanguageModel.all_logits`."""
        every = list(range(tokens.shape[1]))
        found = [self._decode(row, every) for row in tokens.tolist()]
        return torch.stack(found).to(self.device)

    def _decode(self, ids: list[int], wanted: list[int]) -> Float[Tensor, "n vocab"]:
        found = self._engine
        self._room_for(len(ids))
        found.llama_memory_clear(found.llama_get_memory(self._context), True)
        batch = found.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens, asked = len(ids), set(wanted)
            for k, token in enumerate(ids):
                batch.token[k], batch.pos[k], batch.n_seq_id[k] = token, k, 1
                batch.seq_id[k][0], batch.logits[k] = 0, k in asked
            if status := found.llama_decode(self._context, batch):
                raise ModelError(
                    f"llama.cpp cannot compute a prompt of {len(ids)} tokens: {status}."
                )
            out = torch.empty(len(wanted), self._rows)
            for k, position in enumerate(wanted):
                logits = found.llama_get_logits_ith(self._context, position)
                source = ctypes.cast(logits, ctypes.c_void_p)
                ctypes.memmove(out[k].data_ptr(), source, 4 * self._rows)
        finally:
            found.llama_batch_free(batch)
        return out


def _free(found: ctypes.CDLL, context: int | None, model: int) -> None:
    if context:
        found.llama_free(context)
    found.llama_model_free(model)
