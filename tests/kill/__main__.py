"""`python -m tests.kill [--most N] [--moments N] [--seed N]`: the campaign; it fills benchmarks/results/kill.json."""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = os.environ["QUADAPT_KILL"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "cli")]

from tests.kill.campaign import Trials  # noqa: E402 - after the environment is set
from tests.kill.place import COMMANDS, fill  # noqa: E402

from quadapt.jobs.source import versions  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "kill.json"


def main() -> None:
    """Run, say, store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most", type=int, default=10**6, help="kills of each command, spread over its events")
    parser.add_argument("--moments", type=int, default=100, help="kills of tune at random moments")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="commands whose name contains this")
    parser.add_argument("--no-store", action="store_true", help="leave the stored figures as they are")
    given = parser.parse_args()
    chosen, counts = random.Random(given.seed), {}
    with tempfile.TemporaryDirectory(prefix="quadapt-kill-") as name:
        inputs = fill(Path(name) / "inputs")
        for title, (command, old) in COMMANDS.items():
            if given.only not in title:
                continue
            words = tuple(word.replace("{}", str(inputs)) for word in command)
            trials = Trials(words, Path(name) / "scratch", None if old is None else inputs / old)
            for number in trials.every(given.most, chosen):
                trials.at(number)
            counts[title] = _said(title, trials)
            _store(given, counts)
        if given.moments and given.only in "tune":
            words = tuple(word.replace("{}", str(inputs)) for word in COMMANDS["tune"][0])
            trials = Trials(words, Path(name) / "scratch")
            for _ in range(4 * given.moments):  # where it had ended before, nothing was killed
                if trials.found.killed < given.moments:
                    trials.at(0, kill_after=chosen.random() * trials.seconds)
            counts["tune, random moments"] = _said("tune, random moments", trials)
            _store(given, counts)
    sys.exit(any(count[name] for count in counts.values() for name in ("differing", "lost", "stuck")))


def _store(given: argparse.Namespace, counts: dict[str, dict[str, int]]) -> None:
    """Keep the figures so far; a command that was run alone replaces its own row."""
    if given.no_store:
        return
    before = json.loads(RESULTS.read_text(encoding="utf-8")) if given.only and RESULTS.exists() else {}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    about = {"seed": given.seed, "most": given.most, "commit": commit.stdout.strip(), "versions": versions()}
    if before:  # a row says of itself how often the command was killed
        about["most"] = before["most"]
    rows = {
        **before.get("commands", {}),
        **{title: {**row, "commit": about["commit"][:12]} for title, row in counts.items()},
    }  # type: ignore[dict-item]
    RESULTS.write_text(json.dumps({**about, "commands": rows}, indent=2) + "\n", encoding="utf-8")


def _said(title: str, trials: Trials) -> dict[str, int]:
    found = trials.found
    shown = {name: getattr(found, name)[:8] for name in ("differing", "lost", "stuck") if getattr(found, name)}
    print(f"{title}: {found.as_dict()} {shown or ''}", flush=True)
    return found.as_dict()


if __name__ == "__main__":
    main()
