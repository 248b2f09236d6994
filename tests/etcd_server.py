"""A real etcd for tests: one member or several, on free ports of the loopback or on machines that a test made.

They are ended by their own handles.
"""

import datetime
import ipaddress
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from blockstore.config import split_address
from tests.daemons import Daemon, listens, wait_for
from tests.loopback import free_address
from tests.programs import require_programs

#: Cairn's daemons see to that by themselves.
_ENDS_WITH_ITS_PARENT: Final = ("setpriv", "--pdeathsig", "KILL")
#: A member elects, or notices that its leader is gone, within a second.
_TIMES: Final = ("--heartbeat-interval", "50", "--election-timeout", "500")


@dataclass(frozen=True, slots=True)
class Certificate:
    """Of a member and of its clients alike, signed by itself."""

    certificate: Path
    key: Path

    @classmethod
    def make(cls, directory: Path, host: str) -> "Certificate":
        """For that address, valid today."""
        directory.mkdir(parents=True, exist_ok=True)
        made = cls(directory / "certificate.pem", directory / "key.pem")
        key, name = (
            ec.generate_private_key(ec.SECP256R1()),
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, directory.name)]),
        )
        now = datetime.datetime.now(datetime.UTC)
        names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host))])
        signed = (
            x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(names, critical=True)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(key, hashes.SHA256())
        )
        made.certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        form = serialization.PrivateFormat.PKCS8
        made.key.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
        return made


@dataclass(frozen=True, slots=True)
class Site:
    """Where a member runs. prefix: what to put before its command, so that it runs there."""

    client: str
    peer: str
    prefix: Sequence[str] = ()


class EtcdServer:
    """The members of one etcd. more: arguments of each. tls: there is one, whose clients must show its certificate.

    sites: where each member runs, instead of `members` of them on the loopback.
    """

    def __init__(
        self,
        directory: Path,
        members: int = 1,
        more: Sequence[str] = (),
        *,
        tls: bool = False,
        sites: Sequence[Site] | None = None,
    ) -> None:
        require_programs("etcd", "etcdctl", "setpriv")
        self.tls: Certificate | None = None
        sites = sites or [Site(free_address(), free_address()) for _ in range(members)]
        self.clients = [each.client for each in sites]
        if tls:
            host, _ = split_address(self.clients[0])
            self.tls = Certificate.make(directory / "tls", host)
            files = ("--cert-file", self.tls.certificate, "--key-file", self.tls.key)
            trusted = ("--trusted-ca-file", self.tls.certificate, "--client-cert-auth")
            more = [*more, *map(str, (*files, *trusted))]
        cluster = ",".join(f"m{index}=http://{site.peer}" for index, site in enumerate(sites))
        self.members = [self._member(directory, f"m{index}", site, cluster, more) for index, site in enumerate(sites)]

    @staticmethod
    def _member(directory: Path, name: str, site: Site, cluster: str, more: Sequence[str]) -> Daemon:
        client, peer, home = site.client, site.peer, directory / f"etcd-{name}"
        scheme = "https" if "--client-cert-auth" in more else "http"
        home.mkdir(parents=True, exist_ok=True)
        command = [
            *_ENDS_WITH_ITS_PARENT,
            *site.prefix,
            *("etcd", "--name", name, "--data-dir", str(home / "data"), *_TIMES),
            *("--listen-client-urls", f"{scheme}://{client}", "--advertise-client-urls", f"{scheme}://{client}"),
            *("--listen-peer-urls", f"http://{peer}", "--initial-advertise-peer-urls", f"http://{peer}"),
            *("--initial-cluster", cluster, "--logger", "zap", "--log-level", "error", *more),
        ]
        return Daemon(f"etcd-{name}", command, home, directory / f"etcd-{name}.log")

    def start(self) -> None:
        """Start all members that do not run, and wait until one of them takes a write."""
        for each in self.members:
            if not each.running:
                each.start()
        places = [(*split_address(client), each.pid) for client, each in zip(self.clients, self.members, strict=True)]
        wait_for("etcd to listen", lambda: all(listens(*place) for place in places))
        wait_for("etcd to elect", lambda: self.ctl("put", "tests-health", "1", check=False))

    def url(self, prefix: str = "/cairn") -> str:
        """For --metastore."""
        return f"etcd://{','.join(self.clients)}{prefix}"

    def ctl(self, *arguments: str, check: bool = True) -> str:
        """What etcdctl prints. check: fail where it does; else empty then."""
        endpoints = ",".join(f"{'https' if self.tls else 'http'}://{each}" for each in self.clients)
        command = ["etcdctl", "--endpoints", endpoints, "--dial-timeout", "10s", "--command-timeout", "30s", *arguments]
        if self.tls:
            files = ("--cacert", self.tls.certificate, "--cert", self.tls.certificate, "--key", self.tls.key)
            command[1:1] = map(str, files)
        done = subprocess.run(
            command, env={"ETCDCTL_API": "3"}, capture_output=True, text=True, timeout=60, check=False
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


@contextmanager
def running_etcd(
    directory: Path, members: int = 1, more: Sequence[str] = (), *, tls: bool = False
) -> Iterator[EtcdServer]:
    """It ends with the block, and where that fails its logs are shown."""
    server = EtcdServer(directory, members, more, tls=tls)
    try:
        server.start()
        yield server
    except BaseException:
        for each in server.members:
            print(f"==== {each.name}\n{each.tail()}")
        raise
    finally:
        server.kill()
