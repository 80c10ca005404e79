"""inspect.html: the sampled answers of a run, or of two side by side, as one page that opens offline and stays quick with tens of thousands.

The page holds an index (what is searched and listed) and the tokens in compressed chunks, which it unpacks when an answer is looked at.
"""

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from opd.run.folder import read_lines
from opd.text.token_class import CLASSES, token_classes
from opd.viewer.difference import first_difference, pair_up
from opd.viewer.modes import modes_of

MAX_BYTES = 512 << 20
CHUNK = 64  # answers unpacked together
LISTED = ("step", "prompt_id", "member", "question", "text", "views", "expected", "feedback", "status", "reward", "correct", "finish")


def write_viewer(folder: Path, *, other: Path | None = None, max_bytes: int = MAX_BYTES) -> Path:
    """Write folder/inspect.html, or inspect-with-OTHER.html for two runs, from samples/step-*.jsonl and return its path.

    other: a second run to lay beside it; the page then says where the two first differ. Where the files exceed `max_bytes` (a run), middle steps
    are left out and the page says so. Raises ValueError for a run without samples.
    """
    folders, samples, left_out = [folder, *([other] if other else [])], [], 0
    for number, run in enumerate(folders):
        files = sorted((run / "samples").glob("step-*.jsonl"))
        kept = _thinned(files, max_bytes)
        found = [{**record, "run": number} for path in kept for record in read_lines(path)]
        if not found:
            raise ValueError(f"{run} has no samples (samples/step-*.jsonl); is it a run folder, and did it reach track.samples_every steps?")
        samples += found
        left_out += len(files) - len(kept)
    difference = first_difference(folder, other) if other else None
    page = folder / (f"inspect-with-{other.name}.html" if other else "inspect.html")
    scratch = page.with_name(f".{page.name}.tmp")
    scratch.write_text(render([run.name for run in folders], samples, left_out=left_out, difference=difference), encoding="utf-8")
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


def render(
    names: Sequence[str], samples: list[dict[str, Any]], *, left_out: int = 0, difference: Mapping[str, Any] | None = None
) -> str:
    """The page as text. Model output is data: it is compressed, and set as text, never as markup."""
    for sample in samples:
        if "classes" not in sample:  # of an older run
            sample["classes"] = [CLASSES.index(name) for name in token_classes(sample["tokens"], sample.get("expected"))]
    index = [listed(sample) for sample in samples]
    for n, (partner, token) in pair_up(samples).items():
        index[n] |= {"pair": partner, "differs": token}
    chunks = [[_detail(sample) for sample in samples[start : start + CHUNK]] for start in range(0, len(samples), CHUNK)]
    page = {"runs": list(names), "modes": modes_of(samples), "classes": CLASSES, "chunk": CHUNK, "difference": difference}
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("page.html.j2").render(
        name=" and ".join(names),
        left_out=left_out,
        page=Markup(_script_json(page)),
        index=packed(index),
        chunks=[packed(chunk) for chunk in chunks],
        style=Markup((Path(__file__).parent / "page.css").read_text(encoding="utf-8")),
        script=Markup((Path(__file__).parent / "page.js").read_text(encoding="utf-8")),
    )


def listed(sample: Mapping[str, Any]) -> dict[str, Any]:
    """What the page knows of an answer before it is looked at; mass: the sum of |loss| by token class, null where it was not recorded."""
    loss, gaps = sample.get("columns", {}).get("loss/total"), []
    mass = [0.0] * len(CLASSES)
    for place, value in zip(sample["classes"], loss or (), strict=False):
        mass[place] += abs(value or 0.0)
    for signal in sample["signals"].values():
        gaps += [q - p for q, p in zip(signal["logp"], sample["student_logp"], strict=True) if q is not None and p is not None]
    row = {name: sample.get(name) for name in LISTED}
    return {
        **row,
        "run": sample.get("run", 0),
        "length": len(sample["tokens"]),
        "tokens_of": [sample["classes"].count(place) for place in range(len(CLASSES))],
        "mass": [round(value, 7) for value in mass] if loss else None,
        "gap": round(sum(gaps) / len(gaps), 4) if gaps else None,
    }


def _detail(sample: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in sample.items() if name not in LISTED}


def packed(value: Any) -> str:
    """JSON, gzip, base64."""
    return base64.b64encode(gzip.compress(json.dumps(value, ensure_ascii=False).encode(), compresslevel=4, mtime=0)).decode()


def unpacked(text: str) -> Any:
    """The inverse of `packed`."""
    return json.loads(gzip.decompress(base64.b64decode(text)))


def _script_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
