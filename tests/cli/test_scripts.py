"""A user's script without `if __name__ == "__main__":` is told so before a process would read it again."""

import subprocess
import sys

import pytest

GUARDED = 'if __name__ == "__main__":\n    {}\n'
LIGHT = "from opd.launcher.script import refuse_unguarded_script\n"
CALL = 'refuse_unguarded_script("engine=process")'


def run(folder, text):
    (folder / "mine.py").write_text(text)
    done = subprocess.run([sys.executable, "mine.py"], cwd=folder, capture_output=True, text=True, timeout=200, check=False)
    return done.returncode, done.stderr.strip().splitlines()


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        (LIGHT + CALL, 2),
        (LIGHT + f"def go():\n    {CALL}\n\ngo()", 5),
        (LIGHT + f"if True:\n    {CALL}\n", 3),
        (LIGHT + GUARDED.format("pass") + f"else:\n    pass\n{CALL}\n", 6),
        (LIGHT + GUARDED.format(CALL), None),
        (LIGHT + f"def go():\n    {CALL}\n\n" + GUARDED.format("go()"), None),
    ],
)
def test_only_a_call_that_would_be_made_again_is_refused(tmp_path, text, refused):
    status, said = run(tmp_path, text)
    if refused is None:
        assert (status, said) == (0, [])
    else:
        assert status == 1 and said[-1].startswith(f"ValueError: mine.py, line {refused}: engine=process starts Python again")
        assert 'put the call under `if __name__ == "__main__":`' in said[-1]


@pytest.mark.slow
@pytest.mark.parametrize("call", ['opd.train("grpo_expr", {"engine": "process", "name": "a"})', 'opd.compare("demo", quiet=True)'])
def test_train_with_a_process_and_compare_ask_for_the_guard_before_any_work(tmp_path, call):
    status, said = run(tmp_path, f"import opd\n{call}\n")
    assert status == 1 and "put the call under" in said[-1] and not (tmp_path / "runs").exists()
