"""What a command of the CLI printed: a JSON document, whose keys are those of docs/cli.md."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

DOCS = (Path(__file__).parent.parent / "docs" / "cli.md").read_text()


def document(capsys: pytest.CaptureFixture[str]) -> Any:
    """What stdout holds, which must be one JSON document and nothing else."""
    return json.loads(capsys.readouterr().out)


def keys_of(value: Any) -> Iterator[str]:
    """All keys of a document, save those of tags and of digests, which are data."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            if key not in ("tags", "digests"):
                yield from keys_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys_of(inner)
