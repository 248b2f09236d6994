"""Linux 6.12 with several exports at once: four connections, zeroes, a snapshot, and a throw-away clone of it."""

import dataclasses
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from blockstore.units import MIB
from tests.cluster import FRONT_END, Cluster
from tests.linux_host.guest import require_kernel, running, script
from tests.linux_host.kernel import Series

pytestmark = pytest.mark.timeout(400)

SIZE = 128 * MIB
#: A quiet machine takes a tenth of it.
LIMIT_S = 300


def asked(cluster: Cluster, metric: str, **labels: str) -> float:
    """What the front-end's metrics say of this."""
    address = cluster.front_ends[0].read_address("metrics_address")
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=60) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    samples = [sample for family in families for sample in family.samples if sample.name == metric]
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


def test_connections_zeroes_snapshots_and_clones(tmp_path: Path) -> None:
    kernel = require_kernel(Series.LINUX_6_12)
    settings = dataclasses.replace(FRONT_END, metrics="127.0.0.1:0")
    with Cluster(tmp_path, snapshotds=1, front_end_settings=settings) as cluster:
        volume = cluster.create(SIZE)

        def sent(command: str) -> float:
            return asked(cluster, "cairn_nbd_command_bytes_total", volume=volume, command=command)

        uri = cluster.attach(volume)
        with running(kernel, script("exports"), tmp_path / "guest", uri, LIMIT_S) as guest:
            guest.wait_for("ZEROED")
            assert asked(cluster, "cairn_nbd_connections") == 4
            assert (sent("write"), sent("write_zeroes")) == (8 * MIB, 5 * MIB)
            guest.tell("go on")
            guest.wait_for("WRITTEN")
            assert sent("write_zeroes") > 5 * MIB, "mkfs zeroes what lies between its tables"
            (snapshot,) = cluster.snapshot(volume, wait=False)
            guest.tell(snapshot)
        result = guest.end()
        print(result)
        assert result.status == 0, str(result)
        assert "\nCLEAN" in result.output
