"""The report as tables of Markdown, for a terminal and for docs/benchmarks.md."""

from typing import Any

from blockstore.units import format_size


def make_markdown(document: dict[str, Any]) -> str:
    """The tables of what was measured."""
    machine, plan = document["machine"], document["plan"]
    lines = [
        f"{machine['cores']} cores, {machine['memory_mib']} MiB, Linux {machine['kernel']}, Python "
        f"{machine['python']}, load {machine['load_average']}; fdatasync: {machine['fdatasync_4k_ms']} ms. Volumes of "
        f"{format_size(plan['size_bytes'])}; medians of {plan['rounds']} runs of {plan['seconds']:g} s, alternated.",
        "",
    ]
    lines += [f"- **{target}**: {promise}" for target, promise in document["promises"].items()]
    lines += [
        f"- {target} was left out: {', '.join(missing)} missing" for target, missing in document["left_out"].items()
    ]
    for title, (head, rows) in tables(document).items():
        lines += ["", f"{title}:", "", *table(head, rows)]
    return "\n".join(lines) + "\n"


Table = tuple[list[str], list[list[str]]]
"""A head, and rows of as many cells; the first column is text, the others figures."""


def tables(document: dict[str, Any]) -> dict[str, Table]:
    """What there is, by title."""
    made = {
        "Goals": _goals(document["goals"]),
        "Rate, and latency at the median and at the 99th percentile": _speed(document["medians"]),
        "Cairn's rate over each peer's, and its latency over theirs at the median": _ratios(document["ratios"]),
        "Sustained sequential write": _sustained(document["sustained"]),
        "CPU time of all of a target's processes, for each request": _cpu(document["medians"]),
        "Cores that each process used": _processes(document["medians"]),
        "Disk space": _space(document["space"]),
        "Backups of an image of this machine's files": backup_table(document["backups"]),
    }
    return {title: made_table for title, made_table in made.items() if made_table[1]}


def _goals(outcomes: list[dict[str, Any]]) -> Table:
    """One row for each, as bench.goals judged it."""
    words = {True: "met", False: "not met", None: "not measured"}
    rows = [[each["goal"], each["reached"], each["ratio"], words[each["met"]]] for each in outcomes]
    return ["goal", "cairn", "ratio (lowest to highest)", "met or not"], rows


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of Markdown."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _workloads(by_target: dict[str, Any]) -> list[str]:
    return list(next(iter(by_target.values()), {}))


def _speed(medians: dict[str, Any]) -> Table:
    """One row for each workload: IOPS (MiB/s where sequential), and latencies in brackets."""
    rows = [
        [workload, *(_speed_cell(workload, figures[workload]) for figures in medians.values())]
        for workload in _workloads(medians)
    ]
    return ["rate (p50 / p99 ms)", *medians], rows


def _speed_cell(workload: str, figures: dict[str, float]) -> str:
    rate = f"{figures['iops']:,.0f}" if workload.startswith("rand") else f"{figures['mib_s']:,.0f} MiB/s"
    return f"{rate} ({figures['p50_us'] / 1000:.2f} / {figures['p99_us'] / 1000:.2f})"


def _ratios(ratios: dict[str, Any]) -> Table:
    """The median of the rounds' ratios, and in brackets the lowest and the highest; then that of the latencies."""
    rows = [[workload, *(_ratio_cell(peer[workload]) for peer in ratios.values())] for workload in _workloads(ratios)]
    return ["rate (lowest to highest), p50", *ratios], rows


def _ratio_cell(ratio: dict[str, list[float]]) -> str:
    low, median, high = ratio["iops"]
    return f"{median:.2f} ({low:.2f} to {high:.2f}), {ratio['p50_us'][1]:.2f}"


def _sustained(sustained: dict[str, Any]) -> Table:
    rows = [
        [target, f"{each['mib_s']:,.0f}", f"{each['low_mib_s']:,.0f}", f"{each['high_mib_s']:,.0f}"]
        for target, each in sustained.items()
    ]
    return ["MiB/s", "mean", "worst half second", "best half second"], rows


def _cpu(medians: dict[str, Any]) -> Table:
    rows = [
        [workload, *(f"{figures[workload]['cpu_us']:,.0f}" for figures in medians.values())]
        for workload in _workloads(medians)
    ]
    return ["us of a core, without fio's own", *medians], rows


def _processes(medians: dict[str, Any]) -> Table:
    """Of each process: cores used in each workload, and the most memory of all of them."""
    workloads = _workloads(medians)
    rows = []
    for target, by_workload in medians.items():
        rows.append([f"{target}: fio", *(f"{by_workload[each]['client_cores']:.2f}" for each in workloads), ""])
        for name in by_workload[workloads[0]]["processes"]:
            used = [by_workload[workload]["processes"][name] for workload in workloads]
            most = max(each["private_mib"] for each in used)
            rows.append([f"{target}: {name}", *(f"{each['cores']:.2f}" for each in used), f"{most:,.0f}"])
    return ["cores", *workloads, "private MiB at most"], rows


def _space(space: dict[str, Any]) -> Table:
    rows = [
        [
            f"{target} {moment}",
            f"{each['tables_per_user_byte_and_replica']:.3f}",
            *(format_size(each[f"{part}_bytes"]) for part in ("tables", "journal", "ballast")),
        ]
        for target, moments in space.items()
        for moment, each in moments.items()
    ]
    return ["of all replicas", "in tables per user byte and replica", "tables", "journal", "ballast"], rows


def backup_table(backups: dict[str, dict[str, str]]) -> Table:
    """backups: figures of each program, by name."""
    names = list(dict.fromkeys(name for figures in backups.values() for name in figures))
    return ["", *backups], [[name, *(figures.get(name, "") for figures in backups.values())] for name in names]
