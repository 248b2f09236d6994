"""The clock of leases: it goes on while the machine sleeps."""

import time


def boot_time_s() -> float:
    """Seconds since the machine was started."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
