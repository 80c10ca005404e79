"""Tests of LiveCodeBench's records as our code verifier reads them. Its hidden tests are a pickled text: the text is read out, nothing is
unpickled."""

import base64
import binascii
import json
import pickletools
import zlib
from collections.abc import Mapping
from typing import Any

MAX_TEST_BYTES = 256 << 20
_TEXT = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"}
_FRAMING = {"PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT", "STOP"}


def tests_of_record(record: Mapping[str, Any]) -> str:
    """Public and hidden tests as {"inputs", "outputs"[, "fn_name"]} in JSON. Raises ValueError for a record in another form."""
    tests = [*json.loads(record["public_test_cases"]), *_hidden(record.get("private_test_cases") or "[]")]
    name = json.loads(record.get("metadata") or "{}").get("func_name") or ""
    kinds = {test.get("testtype", "stdin") for test in tests}
    if kinds == {"functional"} and name:
        inputs = [[json.loads(line) for line in test["input"].splitlines() if line.strip()] for test in tests]
        return json.dumps({"inputs": inputs, "outputs": [json.loads(test["output"]) for test in tests], "fn_name": name})
    if kinds == {"stdin"}:
        return json.dumps({"inputs": [test["input"] for test in tests], "outputs": [test["output"] for test in tests]})
    found = ", ".join(sorted(kinds)) or "none"
    raise ValueError(f"its tests are of the kinds {found} (func_name {name or 'absent'}); known: stdin, or functional with a name")


def _hidden(packed: str) -> list[dict[str, Any]]:
    try:
        return json.loads(packed)
    except json.JSONDecodeError:
        pass
    try:
        unpacker = zlib.decompressobj()
        content = unpacker.decompress(base64.b64decode(packed, validate=True), MAX_TEST_BYTES)
        if unpacker.unconsumed_tail:
            raise ValueError(f"its hidden tests are larger than {MAX_TEST_BYTES >> 20} MiB")
        return json.loads(_pickled_text(content))
    except (binascii.Error, zlib.error, json.JSONDecodeError) as error:
        raise ValueError(f"its hidden tests cannot be read ({type(error).__name__}: {error})") from None


def _pickled_text(content: bytes) -> str:
    """The one text of a pickle that holds nothing else. Raises ValueError for any other pickle: those could run code when loaded."""
    texts = []
    for operation, argument, _ in pickletools.genops(content):
        if operation.name in _TEXT:
            texts.append(argument)
        elif operation.name not in _FRAMING:
            raise ValueError(f"its hidden tests are a pickle of more than a text ({operation.name}): not read")
    if len(texts) != 1:
        raise ValueError(f"its hidden tests are a pickle of {len(texts)} texts; one was expected")
    return texts[0]
