"""The comparison's report in a real headless Chromium: python benchmarks/report_pages.py [FOLDER for screenshots]

Builds a page of 10 arms x 5 seeds and one of 2 arms x 1 seed from fabricated run folders, opens each at desktop and phone width, in light and in
dark, and checks: nothing is wider than the window or cut off, the four answers are on the first screen of a desktop, every part that scrolls can be
reached by keyboard, no text has a contrast below 4.5.
Needs a chromium with its driver and `pip install selenium`.
"""

import base64
import json
import sys
import tempfile
from pathlib import Path

from viewer import browser

from opd.comparison.config import load_comparison
from opd.comparison.jobs import choose, reported_jobs, tuning_jobs
from opd.comparison.report import write_report
from opd.comparison.results import read_run
from opd.comparison.summary import summarise

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/compare"))
import fake_runs  # noqa: E402

CHECK = """
const shine = c => { const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b; };
const behind = e => {
  for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (c !== "rgba(0, 0, 0, 0)") return c; }
  return "rgb(255, 255, 255)";
};
let least = 99;
for (const e of document.querySelectorAll("p,th,td,small,dt,dd,li,a,figcaption,caption,summary,code,h1,h2,h3")) {
  if (!e.textContent.trim()) continue;
  const [a, b] = [shine(getComputedStyle(e).color), shine(behind(e))];
  least = Math.min(least, (Math.max(a, b) + .05) / (Math.min(a, b) + .05));
}
const texts = [...document.querySelectorAll("th,td,dd,dt,p,li,summary")].filter(e => !e.closest(".scroll, pre"));
const cut = texts.filter(e => e.scrollWidth > e.clientWidth + 1).length;
const answers = Math.round(document.querySelector(".answers").getBoundingClientRect().bottom);
const closed = [...document.querySelectorAll(".scroll, pre")].filter(e => e.scrollWidth > e.clientWidth && e.tabIndex < 0).length;
return {page: document.documentElement.scrollWidth, window: document.documentElement.clientWidth, height: document.documentElement.scrollHeight,
  answers_end: answers, cut, contrast: Math.round(least * 10) / 10, scrolled_without_keyboard: closed};
"""


def page(root: Path, name: str, arms: list[str], seeds: range, tune: bool) -> Path:
    comparison = load_comparison(str(fake_runs.comparison_yaml(root / "in" / name, arms, seeds=seeds, tune=tune, name=name)))
    searches = tuning_jobs(comparison, root)
    make(searches)
    tuned = choose(comparison, searches) if searches else {}
    jobs = reported_jobs(comparison, root, {arm: found.point for arm, found in tuned.items()})
    make(jobs)
    return write_report(root / name, summarise(comparison, [read_run(job.folder, arm=job.arm, seed=job.seed) for job in jobs], tuned))


def make(jobs: list) -> None:
    for job in jobs:
        (fake_runs.fake_evaluate if job.by == "evaluate" else fake_runs.fake_train)(job.recipe, job.overrides, job.folder)


def look(path: Path, shots: Path | None) -> bool:
    good = True
    for label, width, height in (("desktop", 1280, 900), ("phone", 390, 844)):
        for dark in (False, True):
            driver = browser(width, height, dark)
            driver.get(path.resolve().as_uri())
            found = driver.execute_script(CHECK)
            print(json.dumps({"page": path.parent.name, "at": label, "dark": dark, "KiB": path.stat().st_size >> 10, **found}))
            good &= found["page"] <= found["window"] and found["contrast"] >= 4.5 and not found["scrolled_without_keyboard"] and not found["cut"]
            good &= label == "phone" or found["answers_end"] <= height
            if shots:
                shots.mkdir(parents=True, exist_ok=True)
                clip = {"x": 0, "y": 0, "width": width, "height": found["height"], "scale": 1}
                picture = driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png", "clip": clip, "captureBeyondViewport": True})
                (shots / f"{path.parent.name}-{label}-{'dark' if dark else 'light'}.png").write_bytes(base64.b64decode(picture["data"]))
            driver.quit()
    return good


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        pages = [
            page(Path(scratch), "many", list(fake_runs.BEHAVIOUR), range(5), True),
            page(Path(scratch), "few", ["grpo", "opd"], range(1), False),
        ]
        results = [look(path, Path(sys.argv[1]) if len(sys.argv) > 1 else None) for path in pages]
    sys.exit(not all(results))
