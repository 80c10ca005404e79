import json
import re
import shutil
import subprocess

import pytest
from fake_samples import WordTokenizer, fake_contexts, fake_sample

from opd.viewer.page import write_viewer
from opd.viewer.record import write_samples


@pytest.fixture
def run(tmp_path):
    for step in (25, 50, 75):
        path = tmp_path / "samples" / f"step-{step:06d}.jsonl"
        samples = [fake_sample(n, seed=step) for n in range(16)]
        write_samples(path, step, samples, tokenizer=WordTokenizer(), num_samples=8, contexts=fake_contexts)
    return tmp_path


def embedded(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL).group(1))


def test_the_page_holds_every_sample_and_nothing_from_outside(run):
    page = write_viewer(run).read_text()
    records = embedded(page)
    assert [record["step"] for record in records] == [25] * 8 + [50] * 8 + [75] * 8
    assert records[0]["question"] == "(3+0)*2</script>"  # it did not end the data block
    assert not re.search(r"(?:src|href)\s*=|https?://|@import|url\(", page)


def test_large_runs_leave_out_middle_steps_and_say_so(run):
    size = (run / "samples" / "step-000025.jsonl").stat().st_size
    page = write_viewer(run, max_bytes=int(2.5 * size)).read_text()
    assert {record["step"] for record in embedded(page)} == {25, 75}
    assert "1 sample file left out for size" in page


def test_a_run_without_samples_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no samples"):
        write_viewer(tmp_path)


def test_the_script_parses(run, tmp_path):
    node = shutil.which("node")
    script = re.search(r"<script>\n(.*?)</script>", write_viewer(run).read_text(), re.DOTALL).group(1)
    assert script.count("{") == script.count("}") and script.count("(") == script.count(")")
    if node:
        (tmp_path / "page.js").write_text(script)
        checked = subprocess.run([node, "--check", str(tmp_path / "page.js")], capture_output=True, text=True, timeout=30, check=False)
        assert checked.returncode == 0, checked.stderr
