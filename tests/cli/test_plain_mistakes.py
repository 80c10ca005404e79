"""What a newcomer gets wrong first: no model, a model of another task."""

import pytest

from opd.cli import main


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "opsd", "data.task=expr", "steps=1"], "neither a path nor a shape: give model.path"),
        (["eval", "models/route-base", "data.task=expr", "eval.final_problems=4"], "this model was made for other data"),
    ],
)
def test_one_sentence_before_any_work(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/*/metrics.jsonl"))
