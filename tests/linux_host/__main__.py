"""Run the sequences against an NBD server: python -m tests.linux_host URI [ext4|xfs]... [--kernel 6.12]"""

import argparse
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from tests.linux_host import guest
from tests.linux_host.kernel import Series


def main() -> int:
    """0 where all sequences passed."""
    parser = argparse.ArgumentParser(prog="python -m tests.linux_host", description="Try an NBD server with Linux.")
    parser.add_argument("uri", help="nbd://127.0.0.1:PORT/EXPORT; what the export holds is overwritten")
    parser.add_argument("sequences", nargs="*", default=["ext4", "xfs"], help="ext4, xfs (default: both)")
    parser.add_argument("--kernel", default="6.1", choices=[each.value for each in Series], help="default: 6.1")
    options = parser.parse_args()
    where = urlsplit(options.uri)
    uri, failed = f"nbd://127.0.0.1:{where.port or 10809}{where.path}", 0
    with tempfile.TemporaryDirectory() as scratch:
        kernel = guest.require_kernel(Series(options.kernel))
        for name in options.sequences:
            text = guest.script("file_system", FILE_SYSTEM=name)
            result = guest.run(kernel, text, Path(scratch, name), uri)
            print(f"== {name}\n{result}", flush=True)
            failed += result.status != 0
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
