"""The hub: whether a name is one of its, whether it answers, and artefacts as its repositories.

Only `push_to_hub`, and a name that is no local folder, touch the network.
"""

from __future__ import annotations

import os
import socket
import tempfile
import threading
from pathlib import Path
from typing import ClassVar, TypeVar

from ..errors import ArtifactError, MansuError
from .libraries import first_line

Shared = TypeVar("Shared", bound="Shareable")
HUB_HOST = ("huggingface.co", 443)


def is_hub_name(name: str) -> bool:
    """Whether a name has the form that the hub accepts, and is no mistyped path."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def _reachable(timeout: float = 3.0) -> bool:
    """Whether the hub answers; name lookup can hang, so it runs in a thread of its own."""
    found: list[bool] = []

    def probe() -> None:
        try:
            socket.create_connection(HUB_HOST, timeout=timeout).close()
            found.append(True)
        except OSError:
            pass

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(timeout)
    return bool(found)


def check_online(what: str, kind: type[MansuError]) -> None:
    """Raise ``kind`` unless the hub may be asked for ``what``, and answers within 3 s."""
    if os.environ.get("HF_HUB_OFFLINE") == "1" or not _reachable():
        raise kind(
            f"{what} is not on this machine, and the hub ({HUB_HOST[0]}) cannot be reached. "
            "Give a local one, or try again with a network."
        )


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
