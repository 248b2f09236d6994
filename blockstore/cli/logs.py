"""What a daemon logs: a line for each event, to stderr.

structlog imports rich where it finds it, for stacks with colours and local variables. Ours are plain, because
those variables are guests' data; and rich takes a tenth of a second of each daemon's start. So structlog does not
find it, if this module is the first to import it.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def _hidden(library: str) -> Iterator[None]:
    """As though `library` were not installed, unless it is imported already. Source: Python's import system, 5.3.1."""
    if library in sys.modules:
        yield
        return
    sys.modules[library] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[library]


with _hidden("rich"):
    import structlog

get_logger = structlog.get_logger


def set_up_logging() -> None:
    """Events as lines of time, level, event and key=value; colored at a terminal only."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.StackInfoRenderer(),
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(),
                pad_event_to=0,
                # Rich's would show local variables: guests' data, by the page.
                exception_formatter=structlog.dev.plain_traceback,
            ),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
