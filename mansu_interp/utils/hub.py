"""The hub: whether a name is one of its, whether it answers, and artefacts as its repositories.

Only `push_to_hub`, and a name that is no local folder, touch the network.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from pathlib import Path
from typing import ClassVar, TypeVar

from ..errors import ArtifactError, MansuError, ModelError
from .files import read_json
from .libraries import first_line

Shared = TypeVar("Shared", bound="Shareable")
ANSWER_WITHIN = 4.0
"""Seconds in which the hub must answer."""
MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
"""What is fetched of a model; never code, nor pickles."""
OTHER_FILES = ["*/*", "consolidated*"]
"""What matches these and is no part of the model: folders, and weights of another layout."""


def is_hub_name(name: str, plain: bool = False) -> bool:
    """Whether a name has the form that the hub accepts, and is no mistyped path.

    Arguments:
        name: ``owner/name``.
        plain: whether a name without an owner, such as ``gpt2``, is one as well.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1 or (plain and "/" not in name)


def endpoint() -> str:
    """Where huggingface_hub asks: HF_ENDPOINT, or huggingface.co."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def _reachable(timeout: float = ANSWER_WITHIN) -> bool:
    """Whether the hub answers huggingface_hub, whose endpoint and proxies count; name lookup can
    hang, so it asks in a thread of its own."""
    found: list[bool] = []

    def probe() -> None:
        from huggingface_hub.utils import get_session

        # Whatever the reason is, it is not to be had; and any answer is one.
        with contextlib.suppress(Exception):
            get_session().head(endpoint(), timeout=timeout)
            found.append(True)

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(timeout)
    return bool(found)


def check_online(what: str, kind: type[MansuError]) -> None:
    """Raise ``kind`` unless the hub may be asked for ``what``, and answers in time."""
    if os.environ.get("HF_HUB_OFFLINE") == "1" or not _reachable():
        raise kind(
            f"{what} is not on this machine, and the hub ({endpoint()}) cannot be reached. "
            "Give a local one, or try again with a network."
        )


def cached_model(name: str, revision: str | None, weights: bool = True) -> Path | None:
    """The folder in which a model of the hub lies on this machine, if all of it does.

    Arguments:
        name: on the hub.
        revision: branch, tag or commit; without one ``main``, or else the only snapshot there is.
        weights: whether its weights are needed.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    home = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
    try:
        reference = home / "refs" / (revision or "main")
        commits = [p.name for p in (home / "snapshots").iterdir()]
        if reference.is_file():
            commits = [reference.read_text("utf-8").strip()]
        elif revision:
            commits = [c for c in commits if len(revision) >= 7 and c.startswith(revision)]
        folders = [f for c in commits if _complete(f := home / "snapshots" / c, weights)]
    except (OSError, UnicodeDecodeError):
        return None
    return folders[0] if len(folders) == 1 else None


def _complete(folder: Path, weights: bool) -> bool:
    """Whether a snapshot has its configuration and, if they are needed, all its weights."""
    if not (folder / "config.json").exists():
        return False
    index = folder / "model.safetensors.index.json"
    if not weights or not index.exists():
        return not weights or any(folder.glob("*.safetensors"))
    try:
        return all((folder / f).exists() for f in set(read_json(index)["weight_map"].values()))
    except (ArtifactError, AttributeError, KeyError, TypeError):
        return True  # damaged: loading tells


def fetch_model(name: str, revision: str | None, weights: bool = True) -> Path:
    """The folder of a model of the hub, fetched by huggingface_hub.

    Arguments:
        name: on the hub.
        revision: branch, tag or commit; default ``main``.
        weights: whether its weights are needed.

    Raises:
        ModelError: no such model or revision, or one that may not be read.
    """
    from huggingface_hub import snapshot_download

    files = MODEL_FILES if weights else ["config.json"]
    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=files, ignore_patterns=OTHER_FILES
            )
        )
    except Exception as error:  # the network fails in many ways
        at = f" at revision {revision!r}" if revision else ""
        raise ModelError(
            f"The hub ({endpoint()}) does not give the model {name!r}{at}: {first_line(error)}"
        ) from error


class Shareable:
    """One file in a folder or in a repository of the hub.

    Not huggingface_hub's `ModelHubMixin`: that deletes the folder's config.json, which is a run's
    own, and reads one as the arguments of the object.
    """

    FILE: ClassVar[str]
    """Its name in the folder or repository."""

    def save(self, path: Path) -> None:
        """Write the file."""
        raise NotImplementedError

    @classmethod
    def load(cls: type[Shared], path: Path) -> Shared:
        """Read the file."""
        raise NotImplementedError

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the file into a folder, which is made if need be."""
        self.save(Path(folder) / self.FILE)

    @classmethod
    def from_pretrained(cls: type[Shared], name: str | Path, revision: str | None = None) -> Shared:
        """Read from a folder, or from a repository of the hub.

        Arguments:
            name: a folder, or ``owner/name`` on the hub.
            revision: branch, tag or commit on the hub.

        Raises:
            ArtifactError: no such folder or repository, no network (within 5 s), or a damaged file.
        """
        if Path(name).is_dir():
            return cls.load(Path(name) / cls.FILE)
        _check_remote(str(name))
        from huggingface_hub import hf_hub_download

        try:
            return cls.load(Path(hf_hub_download(str(name), cls.FILE, revision=revision)))
        except (OSError, ValueError) as error:
            raise _failed(f"{cls.FILE} of {name} could not be fetched", error) from error

    def push_to_hub(self, name: str, private: bool = True) -> None:
        """Upload to a repository of the hub, which is made if need be; needs `hf auth login`.

        Arguments:
            name: ``owner/name``.
            private: whether a new repository is private.

        Raises:
            ArtifactError: not such a name, no network (within 5 s), or the hub refuses.
        """
        _check_remote(name)
        from huggingface_hub import HfApi

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            try:
                api = HfApi()
                api.create_repo(name, private=private, exist_ok=True)
                api.upload_file(
                    path_or_fileobj=Path(folder) / self.FILE, path_in_repo=self.FILE, repo_id=name
                )
            except (OSError, ValueError) as error:
                raise _failed(f"{self.FILE} could not be pushed to {name}", error) from error


def _check_remote(name: str) -> None:
    if not is_hub_name(name):
        raise ArtifactError(f"{name!r} is neither a folder nor a name on the hub (owner/name).")
    check_online(repr(name), ArtifactError)


def _failed(what: str, error: Exception) -> ArtifactError:
    return ArtifactError(f"{what}: {first_line(error)}")
