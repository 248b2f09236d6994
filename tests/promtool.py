"""Alerting rules, tried by Prometheus' own engine on what daemons say."""

import json
import re
import subprocess
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from tests.metrics_page import Page
from tests.programs import require_found

_ROOT: Final = Path(__file__).parent.parent
_RULES: Final = _ROOT / "docs" / "prometheus" / "alerts.yml"
_SCRIPT: Final = _ROOT / ".ci" / "promtool"
_LIMIT_S: Final = 60.0
#: As promtool prints a sample, such as: {alertname="CairnNodeDown"} 1E+00, {...
_FOUND: Final = r'alertname="(\w+)"\} ([^\s,]+)'
_FIRING: Final = 'count by (alertname) (ALERTS{alertstate="firing"})'


def require_promtool() -> Path:
    """Where it is; skips a test where it is not there, and fails it in CI."""
    path = Path(subprocess.run([_SCRIPT, "--path"], check=True, capture_output=True, text=True).stdout.strip())
    if not path.exists():
        require_found(["promtool (.ci/promtool)"])
    return path


def firing_alerts(pages: Mapping[str, Page], directory: Path) -> Counter[str]:
    """How many alerts of each rule would fire if each daemon, by its name, said the same for half an hour.

    But for how full this machine's own disk is.
    """
    series = [
        {
            "series": _series(sample.name, {**sample.labels, "instance": name, "job": "cairn"}),
            "values": _held(sample.value),
        }
        for name, page in pages.items()
        for sample in page.samples
    ]
    # What it finds is told by a test that expects nothing: it fails, and says what there was.
    test = {
        "interval": "15s",
        "input_series": series,
        "promql_expr_test": [{"expr": _FIRING, "eval_time": "30m", "exp_samples": [_NOBODY]}],
    }
    file = directory / "rules_test.yml"  # JSON is YAML
    file.write_text(json.dumps({"rule_files": [str(_RULES)], "evaluation_interval": "15s", "tests": [test]}))
    done = subprocess.run(
        [require_promtool(), "test", "rules", file], capture_output=True, text=True, timeout=_LIMIT_S, check=False
    )
    said = done.stdout + done.stderr
    assert "got:" in said, said
    found = said.partition("got:")[2]
    firing = Counter({name: int(float(count)) for name, count in re.findall(_FOUND, found)})
    del firing["CairnNodeFillsUp"]
    return firing


_NOBODY: Final = {"labels": '{alertname="none"}', "value": -1}


def _series(name: str, labels: Mapping[str, str]) -> str:
    return name + "{" + ",".join(f"{key}={json.dumps(value)}" for key, value in labels.items()) + "}"


def _held(value: float) -> str:
    return f"{value:.9f}+0x120"
