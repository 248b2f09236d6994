"""Real clients over TLS: libnbd, qemu and Python's nbd module, with certificates that are good and that are not."""

import asyncio
import os
import shlex
import signal
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvloop

from blockstore.cli.daemons import CAIRN
from blockstore.config import FrontEndSettings, Tls, arguments_of, split_address
from blockstore.pki import certificates, directory
from blockstore.pki.uses import Use
from blockstore.units import MIB
from nbd_server import wire
from nbd_server.uri import NbdTarget, tls_commands
from nbd_server.wire import Option
from tests.daemons import Daemon, wait_for
from tests.loopback import free_address
from tests.nbd_serving import Served
from tests.programs import find_program, require_programs
from tests.tls_serving import DAY, Authority, client_context, serving_tls

LIMIT_S = 60.0


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("pki") / "pki")


async def call(*command: str | Path) -> tuple[int, str]:
    """A program's exit code and all that it said."""
    environment = {**os.environ, "LC_ALL": "C"}
    started = await asyncio.create_subprocess_exec(
        *command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    )
    try:
        said, _ = await asyncio.wait_for(started.communicate(), LIMIT_S)
    except TimeoutError:
        started.kill()
        raise
    assert started.returncode is not None
    return started.returncode, said.decode(errors="replace")


def uri(served: Served, place: Path, export: str = "disk", host: str = "localhost") -> str:
    return f"nbds://{host}:{served.port}/{export}?tls-certificates={place}"


@asynccontextmanager
async def requiring(authority: Authority) -> AsyncIterator[Served]:
    async with serving_tls(authority.settings(Tls.REQUIRE)) as served:
        yield served


def test_libnbd_copies_there_and_back(authority: Authority, tmp_path: Path) -> None:
    require_programs("nbdinfo", "nbdcopy")
    source = tmp_path / "source"
    source.write_bytes(os.urandom(8 * MIB))

    async def main() -> None:
        async with requiring(authority) as served:
            there = uri(served, authority.client("host-1"))
            code, said = await call("nbdinfo", there)
            assert code == 0, said
            assert "with TLS" in said
            assert (await call("nbdcopy", source, there)) == (0, "")
            assert (await call("nbdcopy", there, tmp_path / "back")) == (0, "")
        assert (tmp_path / "back").read_bytes()[: 8 * MIB] == source.read_bytes()

    uvloop.run(main())


def test_libnbd_is_refused_and_refuses(authority: Authority, tmp_path: Path) -> None:
    require_programs("nbdinfo")
    other = Authority(tmp_path / "other")
    good, old = authority.client("host-1"), authority.expired_client("old")
    mixed = other.client("host-1")  # trusts this server, and shows what another authority issued
    (mixed / "ca-cert.pem").write_bytes((good / "ca-cert.pem").read_bytes())
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "ca-cert.pem").write_bytes((good / "ca-cert.pem").read_bytes())

    async def main() -> None:
        async with requiring(authority) as served:
            refused = {
                "no TLS": f"nbd://localhost:{served.port}/disk",
                "no certificate": uri(served, bare),
                "another authority's": uri(served, mixed),
                "expired": uri(served, old),
                "a host that the server is not": uri(served, good, host="127.0.0.2"),
                "a server that nobody vouches for": uri(served, other.client("host-2")),
            }
            for what, address in refused.items():
                code, said = await call("nbdinfo", "--size", address)
                assert code != 0, f"{what}: {said}"
            assert await call("nbdinfo", "--size", uri(served, good)) == (0, f"{64 * MIB}\n")

    uvloop.run(main())


def test_qemu_with_tls_creds_x509(authority: Authority, tmp_path: Path) -> None:
    require_programs("qemu-img", "qemu-io")
    other = Authority(tmp_path / "other")

    def arguments(served: Served, place: Path, host: str = "localhost") -> list[str]:
        image = f"driver=nbd,server.type=inet,server.host={host},server.port={served.port},export=disk,tls-creds=tls0"
        return ["--object", f"tls-creds-x509,id=tls0,endpoint=client,dir={place}", "--image-opts", image]

    async def main() -> None:
        async with requiring(authority) as served:
            good = authority.client("host-1")
            code, said = await call("qemu-img", "info", *arguments(served, good))
            assert code == 0, said
            assert "64 MiB" in said
            written = ("-c", "write -P 7 4k 1M", "-c", "read -P 7 4k 1M", "-c", "flush")
            code, said = await call("qemu-io", *written, *arguments(served, good))
            assert code == 0, said
            assert served.volume.contents[4096 : 4096 + MIB] == b"\7" * MIB
            for place, host in ((other.client("host-1"), "localhost"), (good, "127.0.0.2")):
                code, said = await call("qemu-img", "info", *arguments(served, place, host))
                assert code != 0, said

    uvloop.run(main())


def test_the_commands_that_are_printed_work(authority: Authority, tmp_path: Path) -> None:
    require_programs("qemu-img", "nbdcopy")

    async def main() -> None:
        async with requiring(authority) as served:
            target = NbdTarget("disk", "localhost", served.port, tls=True)
            _, info, _, out = tls_commands(target, str(authority.client("host-1")))
            for command in (info, out.replace("disk.img", str(tmp_path / "disk.img"))):
                code, said = await call("sh", "-c", command)
                assert code == 0, said

    uvloop.run(main())


def test_python_s_nbd_module(authority: Authority) -> None:
    require_programs("nbdsh")
    script = """
import nbd; h = nbd.NBD()
h.set_tls(nbd.TLS_REQUIRE); h.set_tls_certificates({place!r}); h.set_export_name("disk")
h.connect_tcp("localhost", {port!r})
assert h.get_tls_negotiated()
h.pwrite(b"x" * 4096, 8192, nbd.CMD_FLAG_FUA); assert h.pread(4096, 8192) == b"x" * 4096
h.shutdown()
"""

    async def main() -> None:
        async with requiring(authority) as served:
            filled = script.format(place=str(authority.client("host-1")), port=str(served.port))
            assert await call("/usr/bin/python3", "-c", filled) == (0, "")

    uvloop.run(main())


def test_nbd_client_lists(authority: Authority) -> None:
    """What it does with a device needs a kernel: tests/test_linux_host_attach.py."""
    require_programs("nbd-client")

    async def main() -> None:
        async with requiring(authority) as served:
            target = NbdTarget("disk", "localhost", served.port, tls=True)
            printed = shlex.split(tls_commands(target, str(authority.client("host-1")))[0])
            options = printed[printed.index("nbd-client") + 1 : printed.index("-b")]
            program = find_program("nbd-client")
            assert program is not None
            where = ("-l", "localhost", str(served.port))
            assert await call(program, *options, *where) == (0, "Negotiation: ..\ndisk\nother\nfixed\n")
            code, said = await call(program, *options[:-1], "elsewhere", *where)
            assert code != 0, said

    uvloop.run(main())


def test_the_daemon_takes_a_renewed_certificate(authority: Authority, tmp_path: Path) -> None:
    """On SIGHUP at once, which ends it in no case; without control, which TLS has nothing to do with."""
    issued = authority.issue(Use.SERVER, "fe-2", ("localhost",), out=tmp_path / "server")
    settings = FrontEndSettings(
        state=tmp_path / "state",
        nbd_listen="127.0.0.1:0",
        control=free_address(),
        tls=Tls.REQUIRE,
        tls_cert=issued.certificate,
        tls_key=issued.key,
        tls_ca=issued.directory / "ca-cert.pem",
    )
    command = [*CAIRN, "nbd", "run", *arguments_of(settings)]
    front_end = Daemon("nbd", command, settings.state, tmp_path / "nbd.log")
    front_end.start()
    try:
        host, port = split_address(front_end.read_address("nbd_address"))
        first = _serial(authority, host, port)
        renewed = directory.renew(authority.root, issued.directory, 20 * DAY)
        os.kill(front_end.pid, signal.SIGHUP)
        wait_for("it to be taken", lambda: _serial(authority, host, port) == renewed.description.serial)
        assert first == issued.description.serial
        assert "nbds://" in front_end.log.read_text()
    finally:
        front_end.kill()


def _serial(authority: Authority, host: str, port: int) -> int:
    """Of the certificate that the server shows."""
    context = client_context(authority.client("host-1"), authority.root)
    with socket.create_connection((host, port)) as plain:
        plain.recv(18, socket.MSG_WAITALL)
        plain.sendall(wire.HANDSHAKE_FLAGS.to_bytes(4, "big") + wire.serialize_option(Option.STARTTLS))
        plain.recv(20, socket.MSG_WAITALL)
        with context.wrap_socket(plain, server_hostname="localhost") as under_tls:
            shown = under_tls.getpeercert(binary_form=True)
    assert shown is not None
    return certificates.describe(ssl.DER_cert_to_PEM_cert(shown).encode()).serial
