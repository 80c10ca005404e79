"""Regular expressions of users on texts of models, with a deadline: some patterns take hours on some texts, and re cannot be interrupted."""

import time

import regex

DEADLINE_SECONDS = 2.0

Pattern = regex.Pattern[str]


def compiled(pattern: str, where: str) -> Pattern:
    """Raises ValueError, which names `where` the pattern stands, for what is no regular expression."""
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"{where} {pattern!r} is no regular expression: {error}") from None


def last_match(pattern: Pattern, text: str) -> str | None:
    """The pattern's last match in the text, its first group where it has one; None without a match.

    Raises TimeoutError after DEADLINE_SECONDS of this process's time.
    """
    found, ends = None, time.process_time() + DEADLINE_SECONDS
    try:
        for match in pattern.finditer(text, timeout=DEADLINE_SECONDS):  # the library counts from each match anew
            found = match[1 if pattern.groups else 0] or ""
            if time.process_time() > ends:
                raise TimeoutError
    except TimeoutError:
        raise TimeoutError(f"the pattern {pattern.pattern!r} took longer than {DEADLINE_SECONDS:g} seconds on this text: simplify it") from None
    return found
