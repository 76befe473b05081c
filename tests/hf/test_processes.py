"""Two processes train what one does: by data parallelism under Trainer, and with everything sharded by FSDP2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "cli")]

import processes  # noqa: E402
from commands import give  # noqa: E402


@pytest.mark.deep
def test_two_processes_have_the_losses_of_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = str(Path(processes.__file__))
    path = os.pathsep.join([*sys.path[:1], os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, script, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    two = json.loads((tmp_path / "losses.json").read_text())
    one = processes.measured(tmp_path)
    for name, found in one.items():
        if name.endswith("merge"):
            assert two[name] == found == "exact"
        else:
            assert len(found) == processes.STEPS
            assert found[-1] != found[0]
            assert two[name] == pytest.approx(found, abs=1e-5), name


def test_commands_in_several_processes_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    said = give("doctor", code=2)
    assert "started in 2 processes" in said.error
    assert "quadapt.AdapterConfig" in said.error
