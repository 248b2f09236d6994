"""Who may import whom: the folder tree is the architecture, and this enforces it.

Imports are read from the source by ast, wherever they stand: at the top, in a function, under
TYPE_CHECKING. Three rules hold over all modules of the three packages: arrows run downward only, no
circle exists, lmdb has three importers and Prometheus' library one. A fourth holds over what the pure
modules reach, through however many steps: no I/O, no clock, no randomness. Source: docs/architecture.md.
"""

import ast
import graphlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("blockstore", "nbd_server", "snapshotd")

_NOUNS = ("units", "values", "domain", "errors", "config", "record", "log", "metrics")
NOUNS = tuple(f"blockstore.{name}" for name in _NOUNS)
#: The system's files, clock and tasks; they know nothing of Cairn, but for its errors.
_SYSTEM = ("blockstore.durable_files", "blockstore.boot_clock", "blockstore.rate_limit", "blockstore.waiting")
_SYSTEMD = ("blockstore.systemd",)
_GRPC = (
    *NOUNS,
    "blockstore.rpc",
    "blockstore.grpc_errors",
    "blockstore.grpc_connections",
    "blockstore.grpc_endpoint",
    "blockstore.grpc_parts",
    "blockstore.grpc_payload",
    "blockstore.grpc_reflection_later",
    "blockstore.message_stream",
)
_SHELL = (
    *_GRPC,
    *_SYSTEM,
    *_SYSTEMD,
    "blockstore.daemon",
    "blockstore.metrics_endpoint",
    "blockstore.heartbeat",
    "blockstore.replica_codec",
    "blockstore.append_codec",
    "blockstore.replication",
    "blockstore.storage",
)
_BELOW_SERVERS = (*_SHELL, "blockstore.volume")

#: Each layer, and what its modules may import besides their own layer. The longest name that fits a
#: module decides; a module that no name fits fails, so a new folder has to be given its place here.
LAYERS: dict[str, tuple[str, ...]] = {
    "blockstore": (),
    **dict.fromkeys(NOUNS, NOUNS),
    "blockstore.rpc": (),
    "blockstore.grpc_errors": _GRPC,
    "blockstore.grpc_connections": _GRPC,
    "blockstore.grpc_endpoint": _GRPC,
    "blockstore.grpc_parts": _GRPC,
    "blockstore.grpc_payload": NOUNS,
    "blockstore.grpc_reflection_later": (),
    "blockstore.message_stream": _GRPC,
    "blockstore.replication": NOUNS,
    **dict.fromkeys(_SYSTEM, ("blockstore.errors",)),
    "blockstore.storage": (*NOUNS, "blockstore.durable_files"),
    "blockstore.replica_codec": (*_GRPC, "blockstore.replication"),
    "blockstore.append_codec": (*_GRPC, "blockstore.replication", "blockstore.replica_codec"),
    "blockstore.heartbeat": _GRPC,
    "blockstore.systemd": NOUNS,
    "blockstore.daemon": _SYSTEMD,
    "blockstore.metrics_endpoint": (*NOUNS, "blockstore.daemon"),
    "blockstore.pki": ("blockstore.errors", "blockstore.durable_files"),
    "blockstore.node": _SHELL,
    "blockstore.volume": _SHELL,
    "blockstore.control": _SHELL,
    # The command starts every daemon, so it stands above the servers as well.
    "blockstore.cli": (*PACKAGES,),
    "nbd_server": _BELOW_SERVERS,
    "snapshotd": _BELOW_SERVERS,
}

LMDB_IMPORTERS = ("blockstore.storage", "blockstore.control.metastore", "snapshotd.dedupe")
#: All others count; this one shows it, when somebody asks.
PROMETHEUS_IMPORTERS = ("blockstore.metrics_endpoint",)
_FORMAT = ("bitmap", "fields", "compression", "crypto", "frame", "pack", "index", "manifest", "root", "quarantine")
PURE = (
    *NOUNS,
    "blockstore.replication",
    "nbd_server.wire",
    "nbd_server.access",
    "nbd_server.command_counts",
    "nbd_server.exported",
    "nbd_server.handshake",
    "nbd_server.handshake_states",
    "nbd_server.options",
    "nbd_server.links",
    "nbd_server.phases",
    "nbd_server.kernel.negotiation",
    "nbd_server.kernel.supervision",
    "nbd_server.transmission",
    "nbd_server.terms",
    "nbd_server.holes",
    "nbd_server.metadata",
    "nbd_server.request_parser",
    *(f"snapshotd.{name}" for name in _FORMAT),
)
IMPURE_LIBRARIES = {
    "grpc",
    "asyncio",
    "socket",
    "lmdb",
    "time",
    "random",
    "threading",
    "secrets",
    "uvloop",
    "prometheus_client",
}

Imports = Mapping[str, frozenset[str]]
"""Of each module: the modules that it imports, ours by their full names."""


def inside(module: str, package: str) -> bool:
    """Whether `module` is `package` or lies in it."""
    return module == package or module.startswith(package + ".")


def layer_of(module: str) -> str | None:
    """The name in LAYERS that fits best; the bare package blockstore fits only itself."""
    fitting = [name for name in LAYERS if inside(module, name) and (name != "blockstore" or module == name)]
    return max(fitting, key=len, default=None)


def read_imports(root: Path) -> Imports:
    """The imports of every module under the packages of `root`."""
    files = {_module_name(path, root): path for package in PACKAGES for path in (root / package).rglob("*.py")}
    return {
        name: frozenset(_imports_of(ast.parse(path.read_text()), name, path.name == "__init__.py", files))
        for name, path in files.items()
    }


def _module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports_of(tree: ast.Module, name: str, is_package: bool, known: Iterable[str]) -> Iterable[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".")[: len(name.split(".")) - node.level + is_package] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            submodules = {f"{source}.{alias.name}" for alias in node.names} & set(known)
            yield from submodules
            if len(submodules) < len(node.names):
                yield source


def upward_arrows(imports: Imports) -> list[str]:
    """Every import that LAYERS does not allow, and every module that has no layer."""
    wrong = []
    for module, targets in sorted(imports.items()):
        layer = layer_of(module)
        if layer is None:
            wrong.append(f"{module} has no place in LAYERS")
            continue
        allowed = (layer, *LAYERS[layer])
        for target in sorted(targets):
            ours = target.split(".")[0] in PACKAGES and target != "blockstore"  # which holds nothing itself
            if ours and not any(inside(target, name) for name in allowed):
                wrong.append(f"{module} ({layer}) imports {target}")
    return wrong


def circle(imports: Imports) -> list[str]:
    """The modules of one circle of imports, or none."""
    ours = {module: targets & imports.keys() - {module} for module, targets in imports.items()}
    try:
        graphlib.TopologicalSorter(ours).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def unexpected_importers(library: str, expected: Iterable[str], imports: Imports) -> list[str]:
    return sorted(
        module
        for module, targets in imports.items()
        if any(inside(target, library) for target in targets) and not any(inside(module, each) for each in expected)
    )


def impurities(imports: Imports) -> list[str]:
    """For each pure module, the libraries of IMPURE_LIBRARIES that it reaches, and through which module."""
    found = []
    for module in sorted(imports):
        if any(inside(module, pure) for pure in PURE):
            for reached in sorted(_reached(module, imports)):
                libraries = {target.split(".")[0] for target in imports[reached]} & IMPURE_LIBRARIES
                found += [f"{module} reaches {library} through {reached}" for library in sorted(libraries)]
    return found


def _reached(module: str, imports: Imports) -> set[str]:
    """`module` and all of ours that importing it imports."""
    reached: set[str] = set()
    waiting = [module]
    while waiting:
        current = waiting.pop()
        if current not in reached:
            reached.add(current)
            waiting += imports[current] & imports.keys()
    return reached


@pytest.fixture(scope="module")
def imports() -> Imports:
    return read_imports(ROOT)


def test_arrows_run_downward(imports: Imports) -> None:
    assert upward_arrows(imports) == []


def test_no_circle(imports: Imports) -> None:
    assert circle(imports) == []


def test_only_those_that_keep_tables_know_lmdb(imports: Imports) -> None:
    assert unexpected_importers("lmdb", LMDB_IMPORTERS, imports) == []


def test_only_the_endpoint_knows_prometheus(imports: Imports) -> None:
    assert unexpected_importers("prometheus_client", PROMETHEUS_IMPORTERS, imports) == []


def test_pure_modules_reach_no_io_clock_or_chance(imports: Imports) -> None:
    assert impurities(imports) == []


def test_every_rule_speaks_of_something_that_exists(imports: Imports) -> None:
    rules = {*LAYERS, *LMDB_IMPORTERS, *PROMETHEUS_IMPORTERS, *PURE}
    assert [rule for rule in sorted(rules) if not any(inside(module, rule) for module in imports)] == []


def _tree(root: Path, files: Mapping[str, str]) -> Imports:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return read_imports(root)


def test_imports_are_found_wherever_they_stand(tmp_path: Path) -> None:
    found = _tree(
        tmp_path,
        {
            "nbd_server/__init__.py": "",
            "nbd_server/wire.py": "",
            "nbd_server/device.py": "",
            "nbd_server/server.py": "from . import wire\nfrom .device import X\n"
            "def f():\n    import time as t\nfrom nbd_server import wire, Y\n",
        },
    )
    assert found["nbd_server.server"] == {"nbd_server.wire", "nbd_server.device", "time", "nbd_server"}


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("blockstore/units.py", "import blockstore.node.service"),
        ("blockstore/replication/leader.py", "from blockstore.storage import journal"),
        ("blockstore/storage/journal.py", "from blockstore.replication.leader import Leader"),
        ("blockstore/node/service.py", "from blockstore.volume import client"),
        ("blockstore/control/catalog.py", "from blockstore.cli import main"),
        ("blockstore/node/service.py", "import nbd_server.wire"),
        ("nbd_server/server.py", "import snapshotd.pack"),
        ("nbd_server/server.py", "from blockstore.cli.main import main"),
        ("snapshotd/ship.py", "from nbd_server import wire"),
        ("blockstore/helpers/text.py", "import re"),
    ],
)
def test_an_arrow_upward_is_found(tmp_path: Path, module: str, text: str) -> None:
    assert len(upward_arrows(_tree(tmp_path, {module: text}))) == 1


def test_a_circle_is_found(tmp_path: Path) -> None:
    files = {"blockstore/units.py": "import blockstore.errors", "blockstore/errors.py": "import blockstore.units"}
    assert set(circle(_tree(tmp_path, files))) == {"blockstore.units", "blockstore.errors"}


def test_another_lmdb_importer_is_found(tmp_path: Path) -> None:
    files = {"blockstore/control/metastore.py": "import lmdb", "blockstore/node/x.py": "from lmdb import open"}
    assert unexpected_importers("lmdb", LMDB_IMPORTERS, _tree(tmp_path, files)) == ["blockstore.node.x"]


def test_another_importer_of_prometheus_is_found(tmp_path: Path) -> None:
    files = {
        "blockstore/metrics_endpoint.py": "from prometheus_client.core import CounterMetricFamily",
        "nbd_server/connection.py": "from prometheus_client.exposition import choose_encoder",
    }
    found = unexpected_importers("prometheus_client", PROMETHEUS_IMPORTERS, _tree(tmp_path, files))
    assert found == ["nbd_server.connection"]


def test_impurity_is_found_behind_another_module(tmp_path: Path) -> None:
    files = {"nbd_server/wire.py": "import nbd_server.names", "nbd_server/names.py": "from time import monotonic"}
    assert impurities(_tree(tmp_path, files)) == ["nbd_server.wire reaches time through nbd_server.names"]
