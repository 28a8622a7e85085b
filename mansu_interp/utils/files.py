"""Files that are either whole or absent: atomic writes, one writer per folder, checked JSON.

What is read may come from anybody: its size is bounded before memory is taken, and its shape is
checked before it is used.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import platform
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from filelock import FileLock, Timeout

from ..errors import ArtifactError, MansuError, ResourceError
from .words import decode, half_pair, shown

MAX_JSON = 64 << 20
"""Bytes of the largest JSON file that is read: a circuit of half a million edges."""
LOCK = ".mansu.lock"
PARTIAL = ".partial"
_MACHINE = hashlib.sha256(platform.node().encode()).hexdigest()[:6]
"""Which machine this is: a process of another one is not known to be dead."""
_PARTIAL_NAME = re.compile(r"\..+\.mansu-([0-9a-f]{6})-(\d+)-[0-9a-f]{8}\.partial", re.DOTALL)
"""What `atomic_path` and `atomic_folder` call what they have not finished."""
_LIVE: dict[str, Path] = {}
"""Those of this process, and what they are to become; others of its number are of a dead one that
had it, too."""
_CREATE = os.O_CREAT | os.O_EXCL | os.O_WRONLY
_ESCAPED_HALF = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")
_WORDS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than is allowed here",
    errno.EROFS: "it is read-only",
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
    errno.ENAMETOOLONG: "its name is too long",
    errno.ENOTDIR: "a part of its path is a file",
    errno.EEXIST: "a part of its path is a file",
    errno.EISDIR: "it is a folder",
}


if TYPE_CHECKING:
    Json: TypeAlias = Any
else:
    Json: TypeAlias = bool | int | float | str | list | dict | None
"""A value as `json.loads` gives it. Type checkers take it for anything, since the shape of a file
is known only when it has been read: `expect` and `records.from_json` check it. At run time the
alias names the types of the value itself; what is inside a list or dictionary is not looked at."""


def _reason(error: Exception) -> str | None:
    """Why the system refused, also where a library below wrapped its error; None: it did not."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    code = int(found.group(1)) if found else getattr(error, "errno", None)
    return None if code is None else _WORDS.get(code, os.strerror(code))


def _no_name(path: Path) -> ResourceError:
    return ResourceError(f"{str(path)!r} cannot be written: no file can have that name.")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says while something is written into one clear error.

    Raises:
        ResourceError: the disk is full, the folder read-only, the name too long, or the like.
    """
    path = _LIVE.get(Path(path).name, path)
    try:
        if b"\0" in os.fsencode(path):
            raise _no_name(path)
        yield
    except MansuError:
        raise
    except UnicodeEncodeError as error:
        raise _no_name(path) from error
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise ResourceError(
            f"{path} cannot be written: {reason}. What was finished before is kept whole. Make "
            "room or allow writing there and run the same command again, or name another folder."
        ) from error


def check_free(path: Path) -> None:
    """Raise ArtifactError if there is something at a path; a link to nothing is something, too."""
    if os.path.lexists(path):
        raise ArtifactError(f"{path} exists already. Name a new one, or delete it first.")


def unused(place: Path, end: str = "") -> Path:
    """The first of a path, path-2, path-3 and so on, each with an ``end``, that is not there."""
    names = (f"{place.name}{f'-{k}' if k > 1 else ''}{end}" for k in count(1))
    return next(p for name in names if not (p := place.parent / name).exists())


def _unfinished(path: Path, make: Callable[[Path], object]) -> Path:
    """A new sibling of a path, made by ``make``, whose name says which process of which machine
    writes it. What dead ones left there is removed first."""
    if path.name in ("", ".."):
        raise _no_name(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_unfinished(path.parent, deeply=False)
    while True:
        name = f".{path.name[:40]}.mansu-{_MACHINE}-{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}"
        with contextlib.suppress(FileExistsError):
            make(path.parent / name)
            _LIVE[name] = path
            return path.parent / name


@contextlib.contextmanager
def atomic_path(
    path: Path, new: bool = False, ready: Callable[[Path], object] = lambda _: None
) -> Iterator[Path]:
    """A temporary sibling to write to; renamed over ``path`` only if the body succeeds.

    Arguments:
        path: the file.
        new: whether there must be nothing yet.
        ready: called with the temporary file when it is whole, before it takes its place.

    Raises:
        ArtifactError: there is something, and ``new``.
        ResourceError: see `writing`.
    """
    path = Path(path)
    with writing(path):
        if new:
            check_free(path)
        temporary = _unfinished(path, lambda made: os.close(os.open(made, _CREATE, 0o666)))
        try:
            mode = stat.S_IMODE(temporary.stat().st_mode)  # as the umask has it
            yield temporary
            temporary.chmod(mode)  # some libraries put a private file in its place
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            ready(temporary)
            if new:
                check_free(path)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
            _LIVE.pop(temporary.name, None)


@contextlib.contextmanager
def atomic_folder(
    path: Path, new: bool = False, ready: Callable[[Path], object] = lambda _: None
) -> Iterator[Path]:
    """The same for a folder; without ``new`` one that was there before is replaced."""
    path = Path(path)
    with writing(path):
        if new:
            check_free(path)
        temporary = _unfinished(path, lambda made: made.mkdir(0o777))
        try:
            mode = stat.S_IMODE(temporary.stat().st_mode)
            yield temporary
            for place, _, files in os.walk(temporary):
                for name in files:
                    Path(place, name).chmod(mode & 0o666)
            ready(temporary)
            if new:
                check_free(path)
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            temporary.replace(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            _LIVE.pop(temporary.name, None)


def is_leftover(path: Path) -> bool:
    """Whether a file is the lock, or what a killed run was in the middle of writing."""
    return path.name == LOCK or _PARTIAL_NAME.fullmatch(path.name) is not None


def _is_running(process: int) -> bool:
    """Whether another process of this number runs on this machine."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it runs, and belongs to somebody else
        return True
    return True


def _remove_unfinished(folder: Path, deeply: bool = True) -> None:
    """Remove what killed processes of this machine left half-written in a folder: names that only
    this module makes, no links, nothing of a process that still runs, and nothing in sub-folders
    that another run locks."""
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            found, path = _PARTIAL_NAME.fullmatch(name), Path(place, name)
            if found is None or found[1] != _MACHINE or _is_running(int(found[2])):
                continue
            if path.is_symlink() or name in _LIVE:
                continue
            if name in folders:
                shutil.rmtree(path, ignore_errors=True)
                folders.remove(name)
            else:
                path.unlink(missing_ok=True)
        folders[:] = [f for f in folders if deeply and not Path(place, f, LOCK).exists()]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder while writing to it; what a killed run left half-written there is removed.

    The lock is the system's, on a file that names the process: it ends with the process.

    Raises:
        ResourceError: another process holds it, or the folder cannot be written.
    """
    path = Path(folder) / LOCK
    lock = FileLock(path, timeout=0)
    with writing(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout as error:
            holder = path.read_text().strip().partition("\n")[0] if path.exists() else ""
            raise ResourceError(
                f"{folder} is in use by another run (process {holder or 'unknown'}). "
                "Wait until it ends, or name another --out."
            ) from error
    try:
        with writing(folder):
            path.write_text(str(os.getpid()))
            _remove_unfinished(path.parent)
        yield
    finally:
        path.unlink(missing_ok=True)  # before another process can hold it
        lock.release()


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def finite(value: object) -> Json:
    """The value as strict JSON has it: there is no NaN, and keys are strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value


def json_text(value: object) -> str:
    """Strict JSON, keys in the given order."""
    return json.dumps(finite(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, value: object) -> None:
    """Write strict JSON atomically."""
    write_text(path, json_text(value))


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not a finite number")


def parse_json(text: str) -> Json:
    """Strict JSON from a string.

    Raises:
        ValueError: not JSON, nested too deeply, or holding NaN, infinity, an endless number or half
            of a surrogate pair.
    """
    try:
        value = json.loads(text, parse_constant=_no_constant)
        half = _ESCAPED_HALF.search(text) and half_pair(json.dumps(value, ensure_ascii=False))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if half:
        raise ValueError(f"{half} is half of a surrogate pair, which is no text")
    return value


def unread(error: Exception) -> str:
    """Why a file was not read, and what to do about it."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file; look at its name"
    if isinstance(error, PermissionError):
        return "permission is denied; allow reading it"
    return str(error)


def check_regular(path: Path, limit: int) -> None:
    """Raise OSError if a file is not there, and ValueError if it is no regular one (to open a FIFO
    is to wait for ever), or larger than ``limit`` bytes."""
    found = Path(path).stat()
    if stat.S_ISDIR(found.st_mode):
        raise ValueError("it is a folder, and no regular file; name a file in it")
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is no regular file")
    if found.st_size > limit:
        raise ValueError(f"it has {found.st_size:,} bytes, more than {limit:,}")


def file_sha256(*paths: Path) -> str:
    """Hash of what files hold, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with Path(path).open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def read_bytes(path: Path, limit: int) -> bytes:
    """A regular file of at most ``limit`` bytes.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger, or no regular file.
    """
    check_regular(path, limit)
    with Path(path).open("rb") as stream:
        return stream.read(limit)


def read_json(path: Path) -> Json:
    """Read a JSON file.

    Raises:
        ArtifactError: missing, damaged, or too large (see `MAX_JSON`).
    """
    try:
        if not (text := decode(read_bytes(path, MAX_JSON))).strip():
            raise ValueError("it is empty; make it again")
        return parse_json(text)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read as JSON: {unread(error)}.") from error


def expect(value: object, shape: object, where: str = "it") -> None:
    """Check what a file holds against a shape.

    Arguments:
        value: JSON values.
        shape: ``str``, ``bool``, ``int``, ``float`` (finite; whole numbers too), ``dict``,
            ``object`` (anything) or None; ``[shape]``: a list of such; a tuple: one of several;
            a dictionary: these keys, of which ``"key?"`` may be absent, and ``...`` stands for
            every other one (else others may hold anything).
        where: how the value is called in the message.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            raise ValueError(f"{where} is {shown(value)}, expected dict")
        wanted = {k for k in shape if k is not ... and not k.endswith("?")}
        if missing := sorted(wanted - value.keys()):
            raise ValueError(f"{where} lacks {', '.join(missing)}")
        for key, inner in shape.items():
            if key is ...:
                for other in value.keys() - {k for k in shape if k is not ...}:
                    expect(value[other], inner, f"{where}.{shown(other)}")
            elif (name := key.removesuffix("?")) in value:
                expect(value[name], inner, f"{where}.{name}")
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise ValueError(f"{where} is {shown(value)}, expected list")
        for k, item in enumerate(value):
            expect(item, shape[0], f"{where}[{k}]")
    elif isinstance(shape, tuple):
        problems = []
        for one in shape:
            try:
                return expect(value, one, where)
            except ValueError as error:
                problems.append(error)
        raise problems[0]
    elif shape is float:
        number = value if isinstance(value, (int, float)) else math.nan
        if isinstance(value, bool) or not abs(number) <= 1e308:
            raise ValueError(f"{where} is {shown(value)}, not a finite number")
    elif shape is not object and (value is not None if shape is None else type(value) is not shape):
        wanted = getattr(shape, "__name__", "null")
        raise ValueError(f"{where} is {shown(value)}, expected {wanted}")
    return None
