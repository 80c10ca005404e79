"""A user's script whose main file other processes would run again: told in one sentence before any of them is started."""

import ast
import inspect
import sys
from pathlib import Path
from types import FrameType


def refuse_unguarded_script(what: str) -> None:
    """Raises ValueError where the running script calls this outside of `if __name__ == "__main__":`; processes that import it would do so too."""
    frame: FrameType | None = inspect.currentframe()
    while frame is not None and not (frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") in ("__main__", "__mp_main__")):
        frame = frame.f_back
    started_by_name = getattr(sys.modules["__main__"].__spec__, "name", "").endswith("__main__")  # python -m package: not read again
    if frame is None or started_by_name or not Path(frame.f_code.co_filename).is_file():
        return
    script = Path(frame.f_code.co_filename)
    if not _is_guarded(script.read_text(encoding="utf-8"), frame.f_lineno):
        raise ValueError(
            f"{script.name}, line {frame.f_lineno}: {what} starts Python again, which reads {script.name} again and would come here again: "
            'put the call under `if __name__ == "__main__":`'
        )


def _is_guarded(source: str, line: int) -> bool:
    """Whether a line stands inside an `if` that asks for __name__."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.If) and any(isinstance(part, ast.Name) and part.id == "__name__" for part in ast.walk(node.test)):
            last = node.body[-1].end_lineno or 0
            if node.body[0].lineno <= line <= last:
                return True
    return False
