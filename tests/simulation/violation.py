"""What a checker raises."""


class Violation(AssertionError):
    """The core broke a promise."""


def expect(holds: bool, otherwise: str) -> None:
    """Raises Violation, with `otherwise`, unless it holds."""
    if not holds:
        raise Violation(otherwise)
