"""inspect.html: a run's samples as one page that opens offline."""

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from opd.runfolder import read_lines

MAX_BYTES = 64 << 20


def write_viewer(folder: Path, *, max_bytes: int = MAX_BYTES) -> Path:
    """Write folder/inspect.html from samples/step-*.jsonl and return its path; where they exceed `max_bytes`, middle steps are left out and
    the page says so. Raises ValueError without samples."""
    files = sorted((folder / "samples").glob("step-*.jsonl"))
    kept = _thinned(files, max_bytes)
    samples = [record for path in kept for record in read_lines(path)]
    if not samples:
        raise ValueError(f"{folder} has no samples (samples/step-*.jsonl); is it a run folder, and did it reach track.samples_every steps?")
    page = folder / "inspect.html"
    scratch = page.with_name(".inspect.html.tmp")
    scratch.write_text(render(folder.name, samples, left_out=len(files) - len(kept)), encoding="utf-8")
    scratch.replace(page)
    return page


def _thinned(files: list[Path], max_bytes: int) -> list[Path]:
    """As many files as fit, evenly spread, first and last among them."""
    for count in range(len(files), 0, -1):
        kept = sorted({round(n * (len(files) - 1) / max(1, count - 1)) for n in range(count)})
        chosen = [files[n] for n in kept]
        if sum(path.stat().st_size for path in chosen) <= max_bytes:
            return chosen
    return files[-1:]


def render(name: str, samples: list[dict[str, Any]], *, left_out: int = 0) -> str:
    """The page as text. Model output is data: it is escaped in the page's JSON and set as text, never as markup."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    data = json.dumps(samples, ensure_ascii=False).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return environment.get_template("page.html.j2").render(name=name, data=Markup(data), left_out=left_out)
