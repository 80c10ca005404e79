"""Metrics to W&B, under the names of metrics.jsonl."""

import netrc
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import wandb


class WandbSink:
    """A W&B run with the same metric names as metrics.jsonl."""

    def __init__(self, *, folder: Path, project: str, name: str, mode: str, config: Mapping[str, Any], run_id: str) -> None:
        settings = wandb.Settings(silent=True, console="off", init_timeout=60)
        self._run = wandb.init(
            project=project, name=name, dir=str(folder), mode=mode, config=dict(config), id=run_id or None, resume="allow", settings=settings
        )
        self.run_id = self._run.id

    def log(self, row: Mapping[str, float], step: int) -> None:
        self._run.log(dict(row), step=step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        self._run.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])}, step=step)

    def finish(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def wandb_mode(wanted: str) -> str:
    """ "auto" becomes "online" where an API key is found without asking, else "offline"."""
    if wanted != "auto":
        return wanted
    return "online" if os.environ.get("WANDB_API_KEY") or _netrc_has_key() else "offline"


def _netrc_has_key() -> bool:
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    path = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return path.is_file() and netrc.netrc(str(path)).authenticators(host) is not None
    except netrc.NetrcParseError:
        return False
