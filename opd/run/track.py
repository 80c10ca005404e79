"""Metrics to W&B, under the names of metrics.jsonl."""

import netrc
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import wandb


class WandbSink:
    """A W&B run with the same metric names as metrics.jsonl. texts: false keeps the working tree's changes out as well.

    labels: group, job_type and tags, by which a W&B report lays runs side by side. run_id: of the run to go on with, "" for a new one.
    """

    def __init__(
        self, *, folder: Path, project: str, mode: str, config: Mapping[str, Any], run_id: str, texts: bool, labels: Mapping[str, Any]
    ) -> None:
        """Raises ValueError where W&B refuses to start."""
        settings = wandb.Settings(silent=True, console="off", init_timeout=60, disable_git=not texts, x_disable_meta=not texts)
        options: dict[str, Any] = {"id": run_id or None, "resume": "allow", "settings": settings}
        options |= {name: value for name, value in labels.items() if value}
        try:
            self._run = wandb.init(project=project, name=folder.name, dir=str(folder), mode=mode, config=dict(config), **options)
        except wandb.errors.Error as error:
            raise ValueError(f"W&B did not start: {error}; set track.wandb=offline (sync later) or disabled") from error
        self.run_id = self._run.id

    def log(self, row: Mapping[str, float], step: int) -> None:
        self._run.log(dict(row), step=step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        self._run.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])}, step=step)

    def alert(self, title: str, text: str) -> None:
        self._run.alert(title=title, text=text, level=wandb.AlertLevel.WARN)

    def summarise(self, values: Mapping[str, float]) -> None:
        """Final results: columns of the table of runs."""
        self._run.summary.update(dict(values))

    def finish(self, failed: bool) -> None:
        """W&B's own process ends, too: what a run leaves behind is killed (opd.launcher.sweep), and W&B would report that at the exit."""
        self._run.finish(exit_code=int(failed))
        wandb.teardown(int(failed))


def wandb_mode(wanted: str) -> str:
    """ "auto" becomes "online" where an API key is found without asking, else "offline"."""
    if wanted != "auto":
        return wanted
    return "online" if has_key() else "offline"


def has_key() -> bool:
    """Whether W&B could log in without asking: WANDB_API_KEY, or the login that `wandb login` has left in netrc."""
    return bool(os.environ.get("WANDB_API_KEY")) or _netrc_has_key()


def _netrc_has_key() -> bool:
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    path = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return path.is_file() and netrc.netrc(str(path)).authenticators(host) is not None
    except netrc.NetrcParseError:
        return False
