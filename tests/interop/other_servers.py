"""The servers that docs/nbd.md compares: each as it comes, with the options that the page names, and with TLS.

`Servers` starts them: nbdkit, qemu-nbd and nbd-server at one address of the loopback that is their own, Cairn as a
whole cluster. They end with its stack.
"""

import dataclasses
import subprocess
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from bench.nbd_servers import running, running_nbd_server
from blockstore.config import Tls, split_address
from blockstore.pki.uses import Use
from blockstore.units import GIB
from tests.cluster import FRONT_END, Cluster
from tests.loopback import free_address, own_host
from tests.tls_serving import Authority

#: A request of more than 4 GiB fits.
SIZE: Final = 8 * GIB
_USER: Final = "alice"
_NBD_SERVER: Final = """
[generic]
listenaddr = {host}
port = {port}
{generic}
[disk]
exportname = {image}
{export}
"""


class Kind(Enum):
    """What a server is asked over."""

    PLAIN = "plain"
    TLS = "TLS"


@dataclass(frozen=True)
class Server:
    """One that runs. configuration: the command that started it, or the file that it was given."""

    address: str
    export: str
    configuration: str = ""


#: The servers of one column; the first of each kind is as it comes, the others have options.
Column = Mapping[Kind, list[Server]]

#: How a client asks each of them that it must answer.
_PLAIN: Final = "nbd://ADDRESS/EXPORT"
_TLS: Final = "nbds://ADDRESS/EXPORT?tls-certificates=DIR"
_KEYS: Final = "nbds://USER@ADDRESS/EXPORT?tls-psk-file=KEYS"


class Servers:
    """Those of all columns, with the certificates of one authority."""

    def __init__(self, root: Path, stack: ExitStack) -> None:
        self._root = root
        self._stack = stack
        self._host = own_host()
        self._count = 0
        authority = Authority(root / "pki")
        self._cairn = authority.server
        self._others = authority.issue(Use.SERVER, "others", (self._host,)).directory
        self._client = authority.client("host-1")
        self._authority, self._keys = root / "authority", root / "psk" / "keys.psk"
        for directory in (self._authority, self._keys.parent):
            directory.mkdir()
        (self._authority / "ca-cert.pem").write_bytes((self._others / "ca-cert.pem").read_bytes())
        self._keys.write_text(f"{_USER}:{'5a' * 32}\n")
        self._keys.chmod(0o600)

    def fill_in(self, command: str, server: Server) -> str:
        """A command of the page with what it names put in."""
        values = {
            "URI": f"nbd://{server.address}/{server.export}",
            "ADDRESS": server.address,
            "EXPORT": server.export,
            "DIR": str(self._client),
            "CA": str(self._authority),
            "USER": _USER,
            "KEYS": str(self._keys),
        }
        for name, value in values.items():
            command = command.replace(name, value)
        return command

    def start(self) -> dict[str, Column]:
        """Each column of the page by its name, once all answer."""
        return {
            "Cairn": self._cairn_column(),
            "nbdkit": self._nbdkit_column(),
            "qemu-nbd": self._qemu_nbd_column(),
            "nbd-server": self._nbd_server_column(),
        }

    def _cairn_column(self) -> Column:
        """Two front-ends that offer TLS; the second asks clients for certificates. The first volume has a snapshot."""
        settings = dataclasses.replace(
            FRONT_END,
            tls=Tls.OFFER,
            tls_cert=self._cairn / "server-cert.pem",
            tls_key=self._cairn / "server-key.pem",
        )
        directory = self._root / "cluster"
        directory.mkdir()
        cluster = Cluster(directory, front_ends=2, snapshotds=1, front_end_settings=settings)
        strict = "--tls-ca", str(self._cairn / "ca-cert.pem")
        self._stack.enter_context(cluster)
        first, second = cluster.front_ends
        assert second.stop() == 0
        second.command += strict
        cluster.start(second)
        servers = []
        for number, front_end in enumerate((first, second)):
            volume = cluster.create(SIZE)
            cluster.attach(volume, number)
            address = front_end.read_address("nbd_address")
            servers.append(Server(address, volume, " ".join(map(str, front_end.command))))
        cluster.snapshot(servers[0].export)
        return {Kind.PLAIN: servers[:1], Kind.TLS: servers}

    def _nbdkit_column(self) -> Column:
        certificates = "--tls=on", f"--tls-certificates={self._others}"
        return {
            Kind.PLAIN: [self._nbdkit(_PLAIN)],
            Kind.TLS: [
                self._nbdkit(_TLS, *certificates),
                self._nbdkit(_TLS, *certificates, "--tls-verify-peer"),
                self._nbdkit(_KEYS, "--tls=require", f"--tls-psk={self._keys}"),
            ],
        }

    def _qemu_nbd_column(self) -> Column:
        bitmaps = self._root / "image.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", bitmaps, str(SIZE)], check=True)
        subprocess.run(["qemu-img", "bitmap", "--add", bitmaps, "changes"], check=True)
        certificates = f"tls-creds-x509,id=tls0,endpoint=server,dir={self._others}"
        keys = f"tls-creds-psk,id=tls0,endpoint=server,dir={self._keys.parent}"
        return {
            Kind.PLAIN: [
                self._qemu_nbd(_PLAIN, self._image()),
                self._qemu_nbd(_PLAIN, bitmaps, "-A", "-B", "changes"),
            ],
            Kind.TLS: [
                self._qemu_nbd(_TLS, self._image(), "--object", certificates, "--tls-creds=tls0"),
                self._qemu_nbd(_KEYS, self._image(), "--object", keys, "--tls-creds=tls0"),
            ],
        }

    def _nbd_server_column(self) -> Column:
        names = {"certfile": "server-cert.pem", "keyfile": "server-key.pem", "cacertfile": "ca-cert.pem"}
        certificates = "\n".join(f"{name} = {self._others / file}" for name, file in names.items())
        return {
            Kind.PLAIN: [
                self._nbd_server(_PLAIN),
                self._nbd_server(_PLAIN, export="fua = true\nflush = true\ntrim = true"),
            ],
            Kind.TLS: [self._nbd_server(_TLS, generic=certificates)],
        }

    def _nbdkit(self, uri: str, *options: str) -> Server:
        address, host, port = self._address()
        command = ["nbdkit", "--foreground", f"--ipaddr={host}", f"--port={port}", *options, "memory", str(SIZE)]
        return self._run(command, uri, address)

    def _qemu_nbd(self, uri: str, image: Path, *options: str) -> Server:
        address, host, port = self._address()
        image_format = "qcow2" if image.suffix else "raw"
        command = ["qemu-nbd", "--persistent", "--shared=0", f"--bind={host}", f"--port={port}", *options]
        return self._run([*command, f"--format={image_format}", str(image)], uri, address)

    def _nbd_server(self, uri: str, generic: str = "", export: str = "") -> Server:
        address, host, port = self._address()
        text = _NBD_SERVER.format(host=host, port=port, image=self._image(), generic=generic, export=export)
        config = self._root / f"nbd-server-{self._count}"
        config.write_text(text)
        server = Server(address, "disk", text)
        self._stack.enter_context(running_nbd_server(config, self.fill_in(uri, server)))
        return server

    def _run(self, command: list[str], uri: str, address: str) -> Server:
        server = Server(address, "", " ".join(command))
        log = self._root / f"{command[0]}-{self._count}.log"
        self._stack.enter_context(running(command, self.fill_in(uri, server), log))
        return server

    def _address(self) -> tuple[str, str, int]:
        """A free one, with its host and its port."""
        self._count += 1
        address = free_address(self._host)
        return address, *split_address(address)

    def _image(self) -> Path:
        """One of zeroes, for one server."""
        image = self._root / f"image-{self._count}"
        with image.open("wb") as file:
            file.truncate(SIZE)
        return image
