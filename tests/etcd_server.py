"""A real etcd for tests: one member or several, on free ports of the loopback, ended by their own handles."""

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.daemons import Daemon, listens, wait_for
from tests.programs import require_programs
from tests.proxy import free_address

#: A member elects, or notices that its leader is gone, within a second.
_TIMES: Final = ("--heartbeat-interval", "50", "--election-timeout", "500")


class EtcdServer:
    """The members of one etcd. `more`: further arguments of each."""

    def __init__(self, directory: Path, members: int = 1, more: Sequence[str] = ()) -> None:
        require_programs("etcd", "etcdctl")
        self.clients = [free_address() for _ in range(members)]
        peers = [free_address() for _ in range(members)]
        cluster = ",".join(f"m{index}=http://{peer}" for index, peer in enumerate(peers))
        self.members = [
            self._member(directory, f"m{index}", (client, peer), cluster, more)
            for index, (client, peer) in enumerate(zip(self.clients, peers, strict=True))
        ]

    @staticmethod
    def _member(directory: Path, name: str, at: tuple[str, str], cluster: str, more: Sequence[str]) -> Daemon:
        """at: where clients and where the other members reach it."""
        (client, peer), home = at, directory / f"etcd-{name}"
        home.mkdir(parents=True, exist_ok=True)
        command = [
            *("etcd", "--name", name, "--data-dir", str(home / "data"), *_TIMES),
            *("--listen-client-urls", f"http://{client}", "--advertise-client-urls", f"http://{client}"),
            *("--listen-peer-urls", f"http://{peer}", "--initial-advertise-peer-urls", f"http://{peer}"),
            *("--initial-cluster", cluster, "--logger", "zap", "--log-level", "error", *more),
        ]
        return Daemon(f"etcd-{name}", command, home, directory / f"etcd-{name}.log")

    def start(self) -> None:
        """Start all members that do not run, and wait until one of them takes a write."""
        for each in self.members:
            if not each.running:
                each.start()
        wait_for("etcd to listen", lambda: all(map(self._listens, self.clients)))
        wait_for("etcd to elect", lambda: self.ctl("put", "tests-health", "1", check=False))

    def url(self, prefix: str = "/cairn") -> str:
        """For --metastore."""
        return f"etcd://{','.join(self.clients)}{prefix}"

    def ctl(self, *arguments: str, check: bool = True) -> str:
        """What etcdctl prints. check: fail where it does; else empty then."""
        command = ["etcdctl", "--endpoints", ",".join(self.clients), "--dial-timeout", "2s", *arguments]
        done = subprocess.run(
            command, env={"ETCDCTL_API": "3"}, capture_output=True, text=True, timeout=30, check=False
        )
        if done.returncode == 0:
            return done.stdout
        assert not check, f"{command}: {done.stderr}"
        return ""

    def compact(self) -> None:
        """Forget all revisions before the present one."""
        answer = self.ctl("put", "tests-compaction", "1", "-w", "json")
        revision = answer.split('"revision":')[1].split(",")[0]
        self.ctl("compact", revision)

    def compact_and_disarm(self) -> None:
        """Give back what compaction frees, as an operator of a full etcd would."""
        status = self.ctl("endpoint", "status", "-w", "json")
        self.ctl("compact", status.split('"revision":')[1].split(",")[0])
        self.ctl("defrag")
        self.ctl("alarm", "disarm")

    def kill(self) -> None:
        """All members; `start` starts them again with their data."""
        for each in self.members:
            each.kill()

    @staticmethod
    def _listens(address: str) -> bool:
        host, port = address.split(":")
        return listens(host, int(port))


@contextmanager
def running_etcd(directory: Path, members: int = 1, more: Sequence[str] = ()) -> Iterator[EtcdServer]:
    """It ends with the block, and where that fails its logs are shown."""
    server = EtcdServer(directory, members, more)
    try:
        server.start()
        yield server
    except BaseException:
        for each in server.members:
            print(f"==== {each.name}\n{each.tail()}")
        raise
    finally:
        server.kill()
