"""Models that other shipped recipes are still to make: configuration and tokenizer stand for them, so that the rest can be judged and planned."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from opd.build.pretrained import find_model, maker_of
from opd.build.problems import load_problems
from opd.build.student import load_tokenizer, student_config
from opd.config.load import load_recipe
from opd.config.recipe import Recipe
from opd.preflight.facts import Finding


@contextmanager
def outlined(recipe: Recipe) -> Iterator[tuple[Recipe, list[Finding], dict[str, str]]]:
    """The recipe with folders without weights in the place of such models, there until the block ends; a warning for each; folder -> its name."""
    found: list[Finding] = []
    names: dict[str, str] = {}
    with TemporaryDirectory(prefix="opd-outlines-") as scratch:

        def there(path: str) -> str:
            try:
                return find_model(path)
            except ValueError as missing:
                if not path.startswith("runs/") or not maker_of(path):
                    return path  # said by whoever reads it
                found.append(Finding(severity="warning", sentence=f"{missing}; until then it is judged by the sizes that recipe gives"))
                own = Path(scratch) / str(len(names))  # two models may share an outline, and each is called by its name
                own.symlink_to(_outline(path, Path(scratch)).absolute())
                names[str(own)] = path
                return str(own)

        signals = {name: signal.model_copy(update={"weights": _moved(signal.weights, there)}) for name, signal in recipe.signals.items()}
        path = there(recipe.model.path) if recipe.model.path and not recipe.init else recipe.model.path
        model = recipe.model.model_copy(update={"path": path})
        yield (recipe.model_copy(update={"model": model, "signals": signals}) if found else recipe), found, names


def _moved(weights: Any, there: Callable[[str], str]) -> Any:
    given = weights.get("external") if isinstance(weights, dict) else None
    if not isinstance(given, dict) or not isinstance(given.get("path"), str) or not given["path"]:
        return weights
    return {"external": {**given, "path": there(given["path"])}}


def _outline(path: str, scratch: Path) -> Path:
    """A folder with configuration and tokenizer of what the maker of runs/NAME/model starts from: training keeps both."""
    maker = load_recipe(maker_of(path))
    if maker.model.path:
        try:
            return Path(find_model(maker.model.path))
        except ValueError:
            return _outline(maker.model.path, scratch)
    folder = scratch / "made" / Path(path).parts[1]
    if not folder.is_dir():
        tokenizer = load_tokenizer(maker, load_problems(maker, None))
        student_config(maker, "", tokenizer).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder
