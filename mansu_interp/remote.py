"""Whether a name is one of the hub's, and whether the hub can be asked."""

from __future__ import annotations

import os
import socket
import threading

from .errors import MansuError

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
