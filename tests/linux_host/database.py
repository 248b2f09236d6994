"""A PostgreSQL database for a guest: Debian's programs, and a cluster of pgbench's tables, made on this machine.

The guest is emulated, where making them takes a minute. PostgreSQL refuses to run as root: then they are made by, and
belong to, `nobody`.
"""

import os
import shutil
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from typing import Final

from tests.linux_host.initramfs import Initramfs

_NOBODY: Final = 65534
#: Of Debian 12.
PROGRAMS: Final = Path("/usr/lib/postgresql/15/bin")
_LIBRARIES: Final = Path("/usr/lib/postgresql/15/lib")
_SHARE: Final = Path("/usr/share/postgresql/15")
_NAMES: Final = ("postgres", "pg_ctl", "psql", "pgbench", "pg_amcheck", "pg_checksums")
#: What making a database needs of this machine.
NEEDED: Final = tuple(str(PROGRAMS / name) for name in (*_NAMES, "initdb"))
_MODULES: Final = ("plpgsql.so", "amcheck.so")
_LIMIT_S: Final = 120
#: Small, as the guest is; checkpoints come while the tests run. All that concerns durability is as it comes.
_SETTINGS: Final = """
listen_addresses = ''
unix_socket_directories = '/tmp'
shared_buffers = 16MB
max_connections = 20
jit = off
min_wal_size = 4MB
max_wal_size = 16MB
checkpoint_timeout = 30s
timezone = 'GMT'
log_timezone = 'GMT'
"""


def add_programs(root: Initramfs) -> None:
    """PostgreSQL, at the places where its programs look for each other, and a user who may run it."""
    files = [PROGRAMS / name for name in _NAMES] + [_LIBRARIES / name for name in _MODULES]
    for path in files:
        root.add_executable(path, str(path)[1:])
    for path in _SHARE.rglob("*"):
        if path.is_file() and "man" not in path.parts:
            root.add(str(path)[1:], path.read_bytes())
    root.add("etc/passwd", f"root:x:0:0::/:/bin/sh\npostgres:x:{_owner()}:{_owner()}::/:/bin/sh\n".encode())
    root.add("etc/group", f"root:x:0:\npostgres:x:{_owner()}:\n".encode())


def make_database(directory: Path) -> None:
    """A cluster with data checksums and the tables of pgbench, which becomes `directory`."""
    with tempfile.TemporaryDirectory(prefix="cairn-pg-") as place:
        os.chown(place, _owner(), _owner())
        run = partial(_run, Path(place))
        run("initdb", "--pgdata=data", "--data-checksums", "--no-sync", "--auth=trust", "--username=postgres",
            "--locale=C", "--encoding=UTF8", "--wal-segsize=1")  # fmt: skip
        with Path(place, "data", "postgresql.conf").open("a") as settings:
            settings.write(_SETTINGS)
        run("pg_ctl", "--pgdata=data", "--wait", "--log=log", "start", f"--options=-F -k {place}")
        try:
            run("pgbench", f"--host={place}", "--username=postgres", "--initialize", "--quiet", "postgres")
            run("psql", f"--host={place}", "--username=postgres", "--command=CREATE EXTENSION amcheck", "postgres")
        finally:
            run("pg_ctl", "--pgdata=data", "--wait", "stop")
        shutil.move(Path(place, "data"), directory)
    for path in (directory, *directory.rglob("*")):
        os.chown(path, _owner(), _owner())  # which moving to another file system would lose


def _run(directory: Path, name: str, *arguments: str) -> None:
    """A program of PostgreSQL in a directory, as who owns that. Raises CalledProcessError."""
    user = _owner() if os.getuid() == 0 else None
    subprocess.run(
        [PROGRAMS / name, *arguments],
        cwd=directory,
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        timeout=_LIMIT_S,
        user=user,
        group=user,
        extra_groups=None if user is None else [],
    )


def _owner() -> int:
    """Whom the cluster belongs to, here and in the guest."""
    return os.getuid() or _NOBODY
