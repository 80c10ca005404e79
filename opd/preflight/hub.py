"""Whether the hub can be asked, and which names of a recipe would need it."""

import os
import socket
from collections.abc import Collection
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from huggingface_hub import constants, try_to_load_from_cache

from opd.build.pretrained import find_model

PATIENCE_SECONDS = 2.0


def hub_answers() -> bool:
    """Whether the hub, or the mirror that HF_ENDPOINT names, can be reached within PATIENCE_SECONDS; through a proxy it is assumed to be."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return False
    hub = urlsplit(constants.ENDPOINT)
    host, port = hub.hostname or "", hub.port or (80 if hub.scheme == "http" else 443)
    if getproxies().get(hub.scheme) and not proxy_bypass(host):
        return True
    try:
        socket.create_connection((host, port), timeout=PATIENCE_SECONDS).close()
    except OSError:
        return False
    return True


def missing_models(paths: Collection[str]) -> list[str]:
    """Those of these models that are neither folders, here or of the package, nor in the cache."""
    return [path for path in paths if path and not _is_folder(path) and not isinstance(try_to_load_from_cache(path, "config.json"), str)]


def _is_folder(path: str) -> bool:
    try:
        return Path(find_model(path)).is_dir()
    except ValueError:  # nothing where a folder should be
        return Path(path).is_dir()
