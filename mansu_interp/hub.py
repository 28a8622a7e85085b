"""Circuits and masks as folders, and as repositories of the hub.

Only `push_to_hub`, and a name that is no local folder, touch the network.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from .errors import ArtifactError
from .libraries import first_line
from .remote import check_online, is_hub_name

if TYPE_CHECKING:
    from typing_extensions import Self


class Shareable:
    """One file in a folder or in a repository of the hub."""

    FILE: ClassVar[str]
    """Its name in the folder or repository."""

    def save(self, path: Path) -> None:
        """Write the file."""
        raise NotImplementedError

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the file."""
        raise NotImplementedError

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the file into a folder, which is made if need be."""
        self.save(Path(folder) / self.FILE)

    @classmethod
    def from_pretrained(cls, name: str | Path, revision: str | None = None) -> Self:
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
