"""The end of a run on the command line, and a reader who goes away before it."""

import json
import subprocess
import sys

import pytest

from opd.run.ending import summary
from tests.run.launched import TINY


def test_the_end_says_how_accurate_and_what_next(tmp_path):
    rows = [("dev", 0, 0.5, "temperature 1.0"), ("dev", 4, 0.75, "temperature 1.0"), ("test", 4, 0.7, "temperature 1.0"), ("test", 4, 0.8, "greedy")]
    lines = [json.dumps({"split": split, "step": step, "avg@k": value, "decoding": how}) for split, step, value, how in rows]
    (tmp_path / "eval.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "model").mkdir()
    said = summary(tmp_path).splitlines()
    assert said[0] == f"run folder: {tmp_path}"
    assert said[1] == "accuracy on dev: 50.0% at step 0, 75.0% at step 4"
    assert said[2] == "accuracy on test: 70.0% temperature 1.0, 80.0% greedy"
    assert f"opd inspect {tmp_path}" in said[3]


@pytest.mark.slow
def test_a_run_goes_on_when_whoever_read_its_words_has_gone(tmp_path):
    (tmp_path / "r.yaml").write_text(json.dumps({**TINY, "steps": 4, "learner": {"kind": "torch"}}))
    words = [sys.executable, "-P", "-m", "opd", "train", "r.yaml", "name=run"]
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process.stdout.close()
    process.wait(timeout=240)
    status = json.loads((tmp_path / "runs/run/status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", 4)
