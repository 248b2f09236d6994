"""`cairn demo --tls`: an authority in the cluster's directory, a certificate for the front-end and one for the demo."""

import shlex
import ssl
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Final

from blockstore.cli.demo_client import Connect, NbdClient
from nbd_server import uri as nbd_uri

_HOSTS: Final = ("127.0.0.1", "localhost")
_LIFETIME: Final = timedelta(days=397)


@dataclass(frozen=True, slots=True)
class DemoTls:
    """Where the certificates are; without any, everything is in plain."""

    root: Path | None = None

    @classmethod
    def make(cls, root: Path) -> "DemoTls":
        """Those in `root`, which are made where they are not there."""
        from blockstore.pki import directory as files  # noqa: PLC0415 - as in `cairn pki`
        from blockstore.pki.uses import Use  # noqa: PLC0415

        if not root.exists():
            root.parent.mkdir(parents=True, exist_ok=True)
            files.init(root, "Cairn demo CA", _LIFETIME)
            files.issue(root, Use.SERVER, "nbd", _HOSTS, lifetime=_LIFETIME)
            files.issue(root, Use.CLIENT, "demo", (), lifetime=_LIFETIME)
        return cls(root)

    def settings(self) -> list[str]:
        """What `cairn up` is told of it."""
        if self.root is None:
            return []
        server = self.root / "nbd"
        files = {"tls-cert": "server-cert.pem", "tls-key": "server-key.pem", "tls-ca": "ca-cert.pem"}
        given = ["nbd.tls=require", *(f"nbd.{name}={(server / file).absolute()}" for name, file in files.items())]
        return [argument for each in given for argument in ("--set", each)]

    def connect(self) -> Connect:
        """How the demo reaches an export."""
        if self.root is None:
            return NbdClient.connect
        client = self.root / "demo"
        context = ssl.create_default_context(cafile=client / "ca-cert.pem")
        context.load_cert_chain(client / "client-cert.pem", client / "client-key.pem")
        return partial(NbdClient.connect, context=context)

    def uri(self, uri: str) -> str:
        """A URI of the cluster, with what libnbd's programs need for it."""
        return uri if self.root is None else nbd_uri.with_certificates(uri, str((self.root / "demo").absolute()))

    def commands(self, uris: list[str]) -> list[str]:
        """What to type to use the first of `uris`."""
        if self.root is None:
            return nbd_uri.commands(uris)
        return nbd_uri.tls_commands(nbd_uri.parse_uri(uris[0]), str((self.root / "demo").absolute()))

    def up_again(self, cairn: str) -> list[str]:
        """The command that starts the cluster with it once it is down: `cairn up` remembers no such settings."""
        return [] if self.root is None else [f"{cairn} up {shlex.join(self.settings())}"]
