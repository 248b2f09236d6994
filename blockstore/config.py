"""Every setting of every process: typed, with its default, its reason and its bounds.

One frozen dataclass for each daemon. A field's metadata holds the help text and how the command
line writes it; `cairn ... run --help` is made from these, and so are the arguments of the
processes that `cairn up` starts, so no setting can be missing from either. Checked once, when the
dataclass is made; a wrong value raises InvalidRequest with the name of its option.
"""

# ruff: noqa: RUF009 (setting() makes fields)

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Final

from blockstore.errors import InvalidRequest
from blockstore.units import GIB, MIB

#: The exit code after which nothing restarts a daemon by itself: it could not record that its data is suspect.
EXIT_DO_NOT_RESTART: Final = 70

#: The most that a snapshot of several volumes or segments may hold back writes: a guest's kernel gives a disk up after
#: 30 s, and the seals' answers have a way to go as well.
MAX_HOLD_S: Final = 20.0
#: The most replicas that are filled at once: beyond what any cluster has, and what a message of control holds.
MAX_REBUILDS: Final = 1_000_000
#: The longest lease of a front-end: as long waits who takes a volume over from one that it cannot hear of.
MAX_LEASE_S: Final = 1.0
#: A year, the most of each time that has no stricter limit: more is a slip, and timers overflow far above it.
MAX_TIME_S: Final = 366 * 86_400
DEFAULT_CONTROL_PORT: Final = 7300
DEFAULT_NBD_PORT: Final = 10809
"""Registered for NBD at IANA."""
DEFAULT_CONTROL: Final = f"127.0.0.1:{DEFAULT_CONTROL_PORT}"


class Placement(Enum):
    """What control does where a volume's replicas cannot each have a zone of their own."""

    STRICT = "strict"
    WARN = "warn"


class Addressing(Enum):
    """Where a request to an S3 server names the bucket."""

    PATH = "path"
    HOST = "host"


class Tls(Enum):
    """What a front-end asks of NBD clients (the NBD text's NOTLS, SELECTIVETLS and FORCEDTLS)."""

    NONE = "none"
    OFFER = "offer"
    REQUIRE = "require"


class ShortCircuitMode(Enum):
    """Whether a front-end reads the tables of replicas on its own machine without their nodes.

    AUTO: where a quorum of them is there.
    """

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


def setting(
    default: Any, text: str, *, size: bool = False, minimum: float | None = None, maximum: float | None = None
) -> Any:
    """A dataclass field with its help. size: the command line takes 64M and the like."""
    metadata: Mapping[str, Any] = {"help": text, "size": size, "minimum": minimum, "maximum": maximum}
    return field(default=default, metadata=metadata)


#: Names, IPv4 and IPv6, the latter's scope included: nothing that would mean something else in a URI.
_HOST: Final = re.compile(r"[^\s/?#@]+")


def split_address(address: str) -> tuple[str, int]:
    """The host and the port of HOST:PORT; an IPv6 host is in brackets. Raises InvalidRequest."""
    host, colon, port = address.rpartition(":")
    if not colon or not _HOST.fullmatch(host) or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise InvalidRequest(f"{address!r} is no address: write it as HOST:PORT, such as 127.0.0.1:7300")
    return host.removeprefix("[").removesuffix("]"), int(port)


def split_addresses(addresses: str) -> tuple[str, ...]:
    """Each HOST:PORT of a list with commas. Raises InvalidRequest."""
    each_one = tuple(each.strip() for each in addresses.split(","))
    for each in each_one:
        split_address(each)
    return each_one


def join_address(host: str, port: int) -> str:
    """HOST:PORT, with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def option_name(name: str) -> str:
    """The command line's name of the field `name`."""
    return "--" + name.removesuffix("_bytes").replace("_", "-")


def arguments_of(settings: Any) -> list[str]:
    """The command line that makes `settings` again: defaults are left out."""
    arguments: list[str] = []
    for each in dataclasses.fields(settings):
        value = getattr(settings, each.name)
        if value != each.default and value is not None:
            text = value.value if isinstance(value, Enum) else str(value)
            arguments += [option_name(each.name), text]
    return arguments


def _bounds(low: float | None, high: float | None) -> str:
    """What is wrong with a value that is not between them; None where there is no such bound."""
    if low is not None and high is not None:
        return f"outside {low} to {high}"
    return f"below {low}" if high is None else f"above {high}"


class _Checked:
    """Checks bounds and addresses of a settings dataclass when it is made."""

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, each.name)
            if isinstance(value, float) and not math.isfinite(value):  # bounds let NaN pass: nothing is below it
                raise InvalidRequest(f"{option_name(each.name)} {value} is no finite number")
            low, high = each.metadata.get("minimum"), each.metadata.get("maximum")
            if (low is not None and value < low) or (high is not None and value > high):
                raise InvalidRequest(f"{option_name(each.name)} {value} is {_bounds(low, high)}")
            if each.name.endswith("_s") and value > MAX_TIME_S:
                raise InvalidRequest(f"{option_name(each.name)} {value} is above {MAX_TIME_S}, a year")
        zone = getattr(self, "zone", "default")
        if not zone.strip():
            raise InvalidRequest(f"--zone {zone!r} is empty: name the failure domain, such as a rack or a host")
        for name in ("listen", "advertise", "metrics", "nbd_listen", "nbd_advertise"):
            if getattr(self, name, ""):
                split_address(getattr(self, name))
        if hasattr(self, "control"):
            split_addresses(self.control)


_LISTEN: Final = "Address for gRPC; port 0 takes a free one. Anyone who reaches it can read and write: keep it private."
_CONTROL: Final = "Address of control; with several control processes those of all of them, separated by commas."
_METRICS: Final = (
    "Address for Prometheus over HTTP, at /metrics, such as 127.0.0.1:%d; port 0 takes a free one. Empty: none. "
    "Nothing there is secret, and nothing can be changed."
)
_ADVERTISE: Final = "Address that others dial, where it is not the one listened at (0.0.0.0, a container)."


@dataclass(frozen=True, slots=True)
class ControlSettings(_Checked):
    """`cairn control run`."""

    state: Path = setting(Path("cairn-control"), "Directory of the embedded metastore, and of the address file.")
    listen: str = setting(DEFAULT_CONTROL, _LISTEN)
    advertise: str = setting("", _ADVERTISE)
    metrics: str = setting("", _METRICS % 7309)
    metastore: str = setting(
        "",
        "The etcd that keeps the catalog: etcd://HOST:PORT,HOST:PORT/PREFIX, or etcds:// for TLS. "
        "Without it an embedded one does, for one control process.",
    )
    metastore_ca_file: Path | None = setting(None, "Authorities that etcd's certificate is checked by (PEM).")
    metastore_cert_file: Path | None = setting(None, "Certificate that control shows to etcd (PEM).")
    metastore_key_file: Path | None = setting(None, "Key of that certificate (PEM).")
    metastore_user: str = setting("", "User of etcd.")
    metastore_password_file: Path | None = setting(
        None, "File with the user's password; CAIRN_METASTORE_PASSWORD in the environment does as well."
    )
    # Three tries to keep it fit in; etcd itself takes a second or two to elect a leader, and gives no lease under 2 s.
    leader_lease_s: float = setting(
        5.0, "With etcd: seconds without a word to it after which another control takes over.", minimum=2
    )
    placement: Placement = setting(
        Placement.STRICT, "With fewer than three zones: refuse new volumes (strict), or warn and share zones (warn)."
    )
    # Nodes beat once a second: four beats lost in a row are no accident of a busy machine.
    lease_s: float = setting(5.0, "Seconds without a heartbeat after which a process counts as down.", minimum=0.1)
    # A create that failed half way waits at most this long for its next try.
    reconcile_s: float = setting(1.0, "Seconds between passes over unfinished work.", minimum=0.01)
    call_timeout_s: float = setting(5.0, "Deadline of each call to a node or a front-end.", minimum=0.1)
    # Longer: opening a volume seals, catches up and waits for leases of the front-end before.
    open_timeout_s: float = setting(30.0, "Deadline of opening a volume at a front-end.", minimum=0.1)
    # Later it would show another instant than the one that was asked for.
    seal_limit_s: float = setting(30.0, "Seconds after which a snapshot that could not be sealed fails.", minimum=0.1)
    # Sealing takes milliseconds; on machines that are busy some tenths of a second. A guest's databases complain of a
    # write that takes some seconds, its kernel gives a disk up after 30.
    hold_limit_s: float = setting(
        4.0,
        "Most seconds that a snapshot of several volumes or segments holds back guests' writes, each time it is tried.",
        minimum=0.1,
        maximum=MAX_HOLD_S,
    )
    # A machine that restarts is back by then, and lacks little; copying a disk would have been for nothing.
    replace_after_s: float = setting(
        600.0, "Seconds that a node may be away before its replicas are made anew on others; 0 is never.", minimum=0
    )
    # Half of what a disk of a laptop or one 1 GbE link can do: guests have the other half.
    rebuild_rate_bytes: int = setting(
        64 * MIB, "Most bytes a second that a node takes in for replicas it fills; 0 is no limit.", size=True, minimum=0
    )
    rebuilds: int = setting(
        8, "Replicas that are filled on new nodes at once, in the cluster.", minimum=1, maximum=MAX_REBUILDS
    )
    rebuilds_per_node: int = setting(
        2, "Replicas that are filled at once on one new node.", minimum=1, maximum=MAX_REBUILDS
    )
    map_size_bytes: int = setting(1 * GIB, "Most that the metastore may grow to.", size=True, minimum=16 * MIB)
    # Each segment costs its front-end three streams with their heartbeats; a lost disk is replaced a segment at a time.
    segment_size_bytes: int = setting(
        64 * GIB,
        "Larger volumes are made of several segments, each on nodes of its own; a multiple of 1M.",
        size=True,
        minimum=MIB,
    )


@dataclass(frozen=True, slots=True)
class NodeSettings(_Checked):
    """`cairn node run`."""

    data: Path = setting(Path("cairn-node"), "Directory of the journal and the replicas.")
    zone: str = setting("default", "Failure domain: what fails together (a rack, a host) has one name.")
    listen: str = setting("127.0.0.1:0", _LISTEN)
    advertise: str = setting("", _ADVERTISE)
    metrics: str = setting("", _METRICS % 7409)
    streams_port: int = setting(
        0, "TCP port of records and reads, at --listen's host; 0: a free one, -1: they go over gRPC.", minimum=-1
    )
    control: str = setting(DEFAULT_CONTROL, _CONTROL)
    heartbeat_s: float = setting(1.0, "Seconds between heartbeats to control.", minimum=0.05)
    call_timeout_s: float = setting(5.0, "Deadline of each call to control or another node.", minimum=0.1)
    # The bound of a node's memory: what is in the journal and not in the tables yet.
    max_unapplied_bytes: int = setting(
        256 * MIB, "Records held in memory until a checkpoint; beyond it writes wait.", size=True, minimum=8 * MIB
    )
    # The more, the more blocks share a page of the index. With 128 MiB, random overwrites of a full volume of 1 GiB
    # cost 0.85 of the CPU that they cost with 32; writes of 1 MiB 1.2 times as much, and their p99 doubled. So small
    # writes count a quarter (blockstore/storage/memtable.py).
    checkpoint_bytes: int = setting(
        32 * MIB, "Committed bytes that start a checkpoint; of small writes four times as many.", size=True, minimum=MIB
    )
    checkpoint_s: float = setting(5.0, "Seconds after which committed records are checkpointed anyway.", minimum=0.05)
    upkeep_s: float = setting(60.0, "Seconds between looks for versions to merge and files to compact.", minimum=0.05)
    # LMDB writes to its free pages first; a copy of the file is worth it only where they stay.
    slack: float = setting(0.2, "Share of a replica's file in free pages above which it is compacted.", minimum=0.01)
    scrub_every_s: float = setting(
        7 * 86_400.0, "Seconds between two scrubs of a replica: all is read, checked and compared.", minimum=0.05
    )
    # 1 TiB in a day and a half, and a hundredth of what reading takes of a core.
    scrub_rate_bytes: int = setting(
        8 * MIB, "Most bytes a second that the node reads for that; 0 is no limit.", size=True, minimum=0
    )
    # Room for checkpoints and deletions when the disk is full otherwise.
    reserve_bytes: int = setting(64 * MIB, "Ballast that is freed when the disk is full.", size=True, minimum=0)


@dataclass(frozen=True, slots=True)
class FrontEndSettings(_Checked):
    """`cairn nbd run`."""

    state: Path = setting(Path("cairn-nbd"), "Directory of the front-end's id.")
    nbd_listen: str = setting(f"127.0.0.1:{DEFAULT_NBD_PORT}", "TCP address for NBD clients; port 0 takes a free one.")
    nbd_advertise: str = setting(
        "", "TCP address that NBD clients dial, where it is not the one listened at; port 0 is the one listened at."
    )
    nbd_socket: Path | None = setting(
        None, "Unix socket for NBD clients as well; TLS is offered there, never required."
    )
    tls: Tls = setting(
        Tls.NONE,
        "TLS for NBD clients: require it, or offer it beside plain connections. By certificates, not PSK.",
    )
    tls_cert: Path | None = setting(None, "Certificate of this front-end (PEM), with those that vouch for it behind.")
    tls_key: Path | None = setting(None, "Key of that certificate (PEM).")
    tls_ca: Path | None = setting(
        None, "Authorities (PEM): clients have to show a certificate that one of them issued."
    )
    access: Path | None = setting(
        None, "Rules on which client may use which volume (TOML); without it all may use all."
    )
    listen: str = setting("127.0.0.1:0", _LISTEN)
    advertise: str = setting("", _ADVERTISE)
    metrics: str = setting("", _METRICS % 7509)
    control: str = setting(DEFAULT_CONTROL, _CONTROL)
    heartbeat_s: float = setting(1.0, "Seconds between heartbeats to control.", minimum=0.05)
    call_timeout_s: float = setting(5.0, "Deadline of each call to control or a node.", minimum=0.1)
    # Design, section 3, rule 4: how long a front-end that was cut off may still answer reads.
    # Bounded, because a front-end that takes over waits for the lease of the one before, however that was set.
    lease_s: float = setting(
        MAX_LEASE_S, "Seconds that a quorum's word on the epoch allows reads for.", minimum=0.05, maximum=MAX_LEASE_S
    )
    drift_s: float = setting(0.1, "Most by which two machines' clocks drift apart in one lease.", minimum=0)
    # The kernel's NBD client gives up at 30 s by default: the guest hears of it from us first.
    retry_limit_s: float = setting(
        25.0, "Seconds that a request waits for a quorum before the guest gets EIO.", minimum=0
    )
    # Half of the CPU time of a read, where it can be done; what speaks against it where only a minority is here is that
    # a disk that hangs then holds up the front-end as well (blockstore/volume/short_circuit.py).
    short_circuit: ShortCircuitMode = setting(
        ShortCircuitMode.AUTO,
        "Read volumes out of the tables of replicas on this machine, without their nodes: where a quorum of them is "
        "here (auto), where any is (always), or never.",
    )
    # nbd_server/limits.py has the reasons, and the limits that cannot be set.
    max_connections: int = setting(256, "Connections of all NBD clients.", minimum=1)
    max_connections_per_client: int = setting(128, "Connections from one address over TCP.", minimum=1)
    max_in_flight_bytes: int = setting(
        256 * MIB, "Memory for what all clients write and read at once.", size=True, minimum=64 * MIB
    )
    max_in_flight_per_client_bytes: int = setting(
        128 * MIB, "The same, of all connections from one address over TCP.", size=True, minimum=64 * MIB
    )
    handshake_s: float = setting(30.0, "Seconds that a client may take to choose an export.", minimum=0.1)
    drain_s: float = setting(
        30.0, "Seconds that requests in flight have to end on SIGTERM, and when a volume is detached.", minimum=0.1
    )
    # Each takes up to 12 MiB: 8 of windows, 4 of maps.
    open_snapshots: int = setting(
        32, "Snapshots that NBD clients may read here at once, by the name snap-...; 0 shows none.", minimum=0
    )
    clone_space_bytes: int = setting(
        10 * GIB,
        "Most that clients' writes to clones of snapshots (snap-...+rw) may take of the state directory's disk.",
        size=True,
        minimum=0,
    )


@dataclass(frozen=True, slots=True)
class AttachSettings(_Checked):
    """`cairn attach`. The times that the command has no option for are for tests."""

    control: str = setting(DEFAULT_CONTROL, _CONTROL)
    client: str = setting("", "This host's name for control, which no other host has; else made of /etc/machine-id.")
    tls_certificates: Path | None = setting(
        None,
        "Directory with ca-cert.pem, client-cert.pem and client-key.pem, as `cairn pki issue` makes it: TLS it is.",
    )
    # One carries over 100,000 IOPS, and what was in flight on one that broke is sent again sooner. Linux uses no more
    # than the host has processors.
    connections: int = setting(1, "Connections to the front-end.", minimum=1, maximum=16)
    # An operator who is called at night has time to start a front-end; after it the file system gets errors.
    dead_timeout_s: int = setting(
        1800, "Seconds that I/O waits for a front-end before it fails for good.", minimum=1, maximum=7 * 86_400
    )
    # Requests stand still on the loss of a node, too, for a tenth of that; then the front-end still answers.
    stall_s: float = setting(
        1.0, "Seconds without a completed request after which the front-end is asked.", minimum=0.1
    )
    # Longer than one that has just been started takes to connect on a busy host.
    probe_s: float = setting(2.0, "Seconds that a front-end has to answer before it is given up.", minimum=0.1)
    # Control moves a volume off a front-end that is down; this is for one that only this host cannot reach.
    avoid_s: float = setting(10.0, "Seconds after which another front-end is asked for, although that one is up.")
    # As often as nodes and front-ends beat: control reads one record for it.
    watch_s: float = setting(1.0, "Seconds between looks at control: has the volume moved, has it grown?", minimum=0.1)


@dataclass(frozen=True, slots=True)
class SnapshotdSettings(_Checked):
    """`cairn snapshotd run`. Credentials of an S3 store come from the environment or AWS's files, never from here."""

    state: Path = setting(Path("cairn-snapshotd"), "Directory of the daemon's id and of its cache of block hashes.")
    listen: str = setting("127.0.0.1:0", _LISTEN)
    advertise: str = setting("", _ADVERTISE)
    metrics: str = setting("", _METRICS % 7609)
    control: str = setting(DEFAULT_CONTROL, _CONTROL)
    heartbeat_s: float = setting(1.0, "Seconds between heartbeats to control.", minimum=0.05)
    call_timeout_s: float = setting(5.0, "Deadline of each call to control or a node.", minimum=0.1)
    store: str = setting(
        "cairn-store", "Where snapshots are kept: a directory (a path or file:///DIR), or s3://BUCKET/PREFIX."
    )
    s3_endpoint: str = setting("", "URL of an S3 server other than Amazon's, such as http://127.0.0.1:9000.")
    s3_region: str = setting("", "Region of the bucket, where neither the environment nor the profile says it.")
    # What other servers than Amazon's need: bucket names in host names need a wildcard in their DNS.
    s3_addressing: Addressing = setting(Addressing.PATH, "Where a request names the bucket: in its path, or its host.")
    keyring_file: Path | None = setting(
        None, "File with the keys that protect the data key; made in the state directory where nothing is given."
    )
    passphrase_file: Path | None = setting(
        None, "File with a passphrase to protect the data key, instead of a keyring."
    )
    # A pack of 16 MiB for each upload, and two more being filled, are held in memory.
    uploads: int = setting(4, "Packs that are uploaded at once.", minimum=1, maximum=64)
    upload_rate_bytes: int = setting(0, "Most bytes a second to the object store; 0 is no limit.", size=True, minimum=0)
    cache_bytes: int = setting(128 * MIB, "Memory for frames and manifests that were read.", size=True, minimum=8 * MIB)
    # Level 3 takes 540 MiB/s of a core at ratio 2.25; 19 takes 3 MiB/s for a tenth less. Compressing is most of a full
    # backup, and level 1 takes half the time of level 3, in 7% more room (docs/benchmarks.md).
    zstd_level: int = setting(1, "Compression, from 1 (fast) to 19 (small).", minimum=1, maximum=19)
