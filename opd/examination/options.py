"""What `opd eval` understands beside a recipe's keys: suites, a server, where results go."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from opd.config.load import explain


class SuiteOptions(BaseModel):
    """suite=NAME (or [NAME, NAME]) and its suite.KEY=VALUE; empty values leave what the suite or the model's family publishes."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    names: tuple[str, ...] = ()
    path: str = ""
    subset: str = ""
    split: str = ""
    problems: Annotated[int, Field(ge=0)] = 0
    samples: Annotated[int, Field(ge=0)] = 0
    sampling: str = "auto"
    thinking: bool | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    max_tokens: Annotated[int, Field(gt=0)] | None = None

    @field_validator("names", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """recipe: the remaining overrides. server: address up to /v1, "" for this process. out: folder of the results, "" for the default.

    split: which problems of the recipe's data.
    """

    suite: SuiteOptions
    recipe: Mapping[str, Any]
    server: str = ""
    out: str = ""
    split: Literal["train", "dev", "test"] = "test"


def parse_options(changes: Mapping[str, Any]) -> Options:
    """Tell the keys of `opd eval` from a recipe's. Raises ValueError with the fix."""
    rest, suite, own = {}, {}, {}
    for key, value in changes.items():
        if key == "suite":
            suite["names"] = value
        elif key.startswith("suite."):
            suite[key.removeprefix("suite.")] = value
        elif key in ("server", "out", "split"):
            own[key] = str(value)
        else:
            rest[key] = value
    try:
        chosen = SuiteOptions.model_validate(suite)
    except ValidationError as error:
        raise ValueError(explain(error, SuiteOptions, "suite").replace("names:", "suite:")) from None
    if suite and not chosen.names:
        raise ValueError(f"suite.{next(iter(suite))} needs a suite: add suite=NAME, e.g. suite=math500")
    if chosen.path and len(chosen.names) > 1:
        raise ValueError(f"suite.path is one file, and {len(chosen.names)} suites are asked for: examine them one at a time")
    if chosen.names and (data := [key for key in rest if key.startswith("data")]):
        raise ValueError(f"{data[0]} and suite are two sources of problems: give one of them")
    if own.get("split", "test") not in ("train", "dev", "test"):
        raise ValueError(f"split is {own['split']!r}; write split=train, dev or test")
    if chosen.names and "split" in own:
        raise ValueError("split chooses among a recipe's own problems; for a suite write suite.split")
    return Options(suite=chosen, recipe=rest, **own)  # type: ignore[arg-type]
