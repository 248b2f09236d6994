"""Ways of breaking the core on purpose: each removes one rule at run time, and the simulation must notice."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

Undo = Callable[[], None]
MUTATIONS: Final[dict[str, Callable[[], Undo]]] = {}


@contextmanager
def mutated(name: str | None) -> Iterator[None]:
    """The core is broken in this way inside; None: it is not."""
    undo = MUTATIONS[name]() if name else lambda: None
    try:
        yield
    finally:
        undo()
