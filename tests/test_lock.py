"""requirements.lock is what pyproject.toml asks for: CI installs by the lock, users by pyproject.

A requirement that was added or raised without `.ci/lock` fails here.
"""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
_PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", re.MULTILINE)


def read_pins(text: str) -> dict[str, str]:
    """The version of each package that the lock names, by its normalized name."""
    return {_normal(match[1]): match[2] for match in _PIN.finditer(text)}


def read_requirements(text: str) -> list[Requirement]:
    """All that pyproject.toml asks for: to build, to run, to test and to measure."""
    project = tomllib.loads(text)
    optional = project["project"]["optional-dependencies"]
    listed = (project["build-system"]["requires"], project["project"]["dependencies"], *optional.values())
    return [Requirement(line) for requirements in listed for line in requirements]


def unmet(requirements: list[Requirement], pins: dict[str, str]) -> list[str]:
    """The requirements that the lock leaves open or contradicts."""
    return [
        str(requirement)
        for requirement in requirements
        if not requirement.specifier.contains(pins.get(_normal(requirement.name), "0"))
    ]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_lock_satisfies_pyproject() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    requirements = read_requirements((ROOT / "pyproject.toml").read_text())
    assert unmet(requirements, read_pins(lock)) == [], "run .ci/lock"


def test_every_pin_has_a_hash_and_no_origin() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    blocks = re.split(r"^(?=[a-zA-Z])", lock, flags=re.MULTILINE)[1:]
    assert len(blocks) == len(_PIN.findall(lock)) > 20  # one for each Python, where these differ
    assert [block.split()[0] for block in blocks if "--hash=sha256:" not in block] == []
    assert "://" not in lock, "an index's address has no place in the lock: it is the machine's setting"


def test_what_the_lock_lacks_is_found() -> None:
    wanted = [Requirement(line) for line in ("Foo_Bar>=2", "baz>=1", "gone>=0.1")]
    assert unmet(wanted, {"foo-bar": "1.9", "baz": "1.0"}) == ["Foo_Bar>=2", "gone>=0.1"]
