"""How sure somebody says to be, in a text."""

import re

_TAG = re.compile(r"<<CONFIDENCE=(\d+)>>", re.IGNORECASE)


def stated_confidence(text: str) -> float | None:
    """N of the text's last tag <<CONFIDENCE=N>>, 0 to 100; None without one, or for a number above 100 (MAD-OPD's form, arXiv 2605.01347)."""
    found = _TAG.findall(text)
    return float(found[-1]) if found and int(found[-1]) <= 100 else None
