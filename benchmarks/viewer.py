"""How quick the token viewer is with many rollouts, in a real headless Chromium: python benchmarks/viewer.py RUN [rollouts] [FOLDER for screenshots]

Repeats the samples of a run (under other steps) until there are so many, builds the page, and measures: seconds until it can be used, the longest
and median frame while the list is scrolled from top to bottom, and the time from a key of the search box to the new list. Needs a chromium with
its driver and `pip install selenium`.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from opd.run.folder import read_lines
from opd.viewer.page import write_viewer

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--hide-scrollbars")  # fmt: skip
SCROLL = """
const done = arguments[0], list = document.getElementById("list"), frames = [], steps = 120;
let n = 0, last = performance.now();
function tick(now) {
  frames.push(now - last); last = now;
  if (n++ > steps) return done(frames.slice(2));
  list.scrollTop = list.scrollHeight * n / steps;
  requestAnimationFrame(tick);
}
requestAnimationFrame(tick);
"""
SEARCH = """
const done = arguments[1], box = document.getElementById("search"), start = performance.now();
box.value = arguments[0]; box.dispatchEvent(new Event("input"));
requestAnimationFrame(() => requestAnimationFrame(() => done([performance.now() - start, document.getElementById("count").textContent])));
"""
CHOOSE = """
const done = arguments[0], start = performance.now(), list = document.getElementById("list");
document.dispatchEvent(new KeyboardEvent("keydown", {key: "PageDown", bubbles: true}));
const before = document.querySelector("#detail .head")?.textContent;
(function wait() { if (document.querySelector("#detail .head")?.textContent !== before) return done(performance.now() - start);
  if (performance.now() - start > 5000) return done(-1); requestAnimationFrame(wait); })();
"""


def many(run: Path, rollouts: int, folder: Path) -> int:
    """A run folder with that many rollouts, made of the run's own."""
    records = [record for path in sorted((run / "samples").glob("step-*.jsonl")) for record in read_lines(path)]
    (folder / "samples").mkdir(parents=True)
    step, left = 0, rollouts
    while left > 0:
        for start in range(0, len(records), 200):
            step += 1
            chosen = [{**record, "step": step} for record in records[start : start + 200][:left]]
            left -= len(chosen)
            text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in chosen)
            (folder / "samples" / f"step-{step:06d}.jsonl").write_text(text)
            if left <= 0:
                break
    return sum(len(record["tokens"]) for record in records) // len(records)


def browser(width: int, height: int, dark: bool = False) -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, f"--window-size={width},{height}"):
        options.add_argument(flag)
    options.binary_location = "/usr/bin/chromium"
    driver = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
    driver.set_script_timeout(60)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]})
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 700})
    return driver


def opened(driver: webdriver.Chrome, page: Path) -> float:
    """Seconds from the navigation until the first list stands."""
    started = time.perf_counter()
    driver.get(page.resolve().as_uri())
    while not driver.execute_script("return document.documentElement.dataset.ready"):
        time.sleep(0.02)
        if time.perf_counter() - started > 120:
            raise TimeoutError("the page did not become ready in 120 seconds")
    return time.perf_counter() - started


def main(run: Path, rollouts: int, shots: Path | None) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "many"
        tokens = many(run, rollouts, folder)
        started = time.perf_counter()
        page = write_viewer(folder)
        built = time.perf_counter() - started
        driver = browser(1440, 900)
        ready = opened(driver, page)
        frames = driver.execute_async_script(SCROLL)
        searched, count = driver.execute_async_script(SEARCH, "3*")
        driver.execute_async_script(SEARCH, "")
        chosen = [driver.execute_async_script(CHOOSE) for _ in range(8)]
        memory = driver.execute_script("return performance.memory ? performance.memory.usedJSHeapSize / 2**20 : null")
        driver.quit()
        result = {
            "rollouts": rollouts, "tokens_a_rollout": tokens, "page_MiB": round(page.stat().st_size / 2**20, 1), "build_s": round(built, 2),
            "ready_s": round(ready, 2), "frame_median_ms": round(statistics.median(frames), 1),
            "frame_p95_ms": round(sorted(frames)[int(0.95 * len(frames))], 1), "frame_longest_ms": round(max(frames), 1),
            "search_ms": round(searched, 1), "search_found": count, "next_answer_median_ms": round(statistics.median(chosen), 1),
            "heap_MiB": round(memory or 0, 1),
        }  # fmt: skip
        print(json.dumps(result, indent=1))
        if shots:
            photograph(page, shots, "many")


def photograph(page: Path, shots: Path, name: str) -> None:
    """Desktop and phone, light and dark; the first token's numbers open."""
    shots.mkdir(parents=True, exist_ok=True)
    for label, width, height in (("desktop", 1440, 900), ("phone", 390, 844)):
        for dark in (False, True):
            driver = browser(width, height, dark)
            opened(driver, page)
            driver.save_screenshot(str(shots / f"{name}-{label}-{'dark' if dark else 'light'}-list.png"))
            driver.execute_script("document.querySelector('.row').click()")
            time.sleep(0.5)
            driver.execute_script("document.querySelectorAll('.tokens button')[1].focus()")
            time.sleep(0.3)
            driver.save_screenshot(str(shots / f"{name}-{label}-{'dark' if dark else 'light'}.png"))
            driver.quit()


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(Path(arguments[0]), int(arguments[1]) if len(arguments) > 1 else 20_000, Path(arguments[2]) if len(arguments) > 2 else None)
