"""The kinds of faults that a schedule chooses from, by their names."""

from typing import Final

from tests.faults.kinds import control, disks_and_clocks, network, processes, replicas
from tests.faults.kinds.fault import Fault

#: What takes several controls, or etcd.
OF_ETCD: Final = (
    control.control_paused, control.control_cut_from_etcd, control.controls_apart, control.etcd_member_killed,
    control.etcd_killed,
)  # fmt: skip
KINDS: Final[dict[str, Fault]] = {
    fault.__name__: fault
    for fault in (
        processes.node_killed, processes.front_end_restarted, processes.all_nodes_killed,
        processes.everything_restarted, processes.snapshotd_killed, processes.paused, processes.node_stutters,
        network.node_unplugged, network.one_way, network.node_cut_from_front_end, network.front_end_sees_one,
        network.cut_from_control, network.nodes_cut_from_each_other, network.packets_lost, network.taken_away,
        network.cut_off_and_replaced, network.packets_delayed, network.packets_dropped_at_random,
        network.front_end_far_away, network.front_end_on_a_bad_line,
        disks_and_clocks.disk_full, disks_and_clocks.disk_slow, disks_and_clocks.clock_jumps,
        disks_and_clocks.clocks_of_control_jump,
        control.control_killed, control.all_controls_killed, control.control_stopped, control.killed_attaching,
        control.killed_snapshotting, control.killed_draining, *OF_ETCD,
        replicas.node_drained, replicas.node_replaced, replicas.old_copy_put_back, replicas.addresses_swapped,
    )
}  # fmt: skip
