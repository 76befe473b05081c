"""Runs situations from public reports, each a folder with a `run.sh`, and prints which of them end as they should.

    python scripts/cases.py ../shared/cases [--only 07 10] [--show]

A case passes if its output has every pattern that is asked of it and none that it must not have. `--show` prints the
whole output of each case, which is what a reader should look at before believing the table.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUG = r"This is a bug|Traceback"
BARS = re.compile(
    r"^.*(Loading weights|Writing model shards|Saving the dataset|Generating train split):.*$", re.MULTILINE
)


@dataclass(frozen=True)
class Case:
    """What a case must print, and what it must not."""

    should: str
    """In words."""

    must: tuple[str, ...]
    """Regular expressions that its output must have."""

    never: tuple[str, ...] = ()
    """Regular expressions that its output must not have."""


CASES = {
    "01-turn-end-is-not-eos": Case(
        "the answer ends where the chat template ends the assistant's turn",
        (r"should be: The cat sat\.\s+The cat sat\.\s*\Z",),
    ),
    "02-end-token-cannot-be-learnt": Case(
        "a warning before training (cut off by the script) names the way out; the model is measured", (r"perplexity",)
    ),
    "03-template-drops-earlier-thoughts": Case(
        "chats of one and two turns train", (r"(?s)wrote a1.*wrote a2",), (r"cannot render",)
    ),
    "05-packing-crosses-examples": Case(
        "packing is refused by name where attention crosses examples",
        (r"llama: .* by [0-9.]+e(-0[4-9]|-[1-9]\d|\+00)",),
    ),
    "06-held-out-loss-by-batch": Case(
        "held-out loss is the same for both batch sizes, and eval's",
        (r"(?s)held-out loss (4\.7[34]\d*)\b.*held-out loss 4\.7[34].*loss 4\.7[34]\d* nats",),
        (r"held-out loss 1\d\.",),
    ),
    "07-new-tokens-lost-in-merge": Case(
        "the merged model has the new token's row", (r"logits differ by (0\.0\b|\d(\.\d+)?e-\d+)|refused",)
    ),
    "08-head-adapter-dropped": Case(
        "the exported model has the head's adapter", (r"exported - adapted 0\.0\d\d; exported - base [1-9]|refused",)
    ),
    "10-adapter-on-another-base": Case("refused, with both fingerprints", (r"refused: .*another base",)),
    "11-changed-flag-erases-checkpoints": Case(
        "goes on, or refuses and says what differs (held-out data decides what is kept); no checkpoint is lost",
        (
            r"going on|would not go on with: .*eval_data",
            r"(?s)after the interruption: .*after the second command: .*checkpoint-",
        ),
        (r"starting over$", r"cannot access"),
    ),
    "12-train-on-an-adapter": Case(
        "training goes on over the same base", (r"wrote more",), (r"is an adapter\. To train",)
    ),
    "13-more-tokens-than-rows": Case(
        "said before the work, or padded with another token", (r"\[PAD\]|wrote adapter",), (r"IndexError",)
    ),
    "15-sharegpt": Case("both forms train", (r"(?s)wrote a1.*wrote a2",)),
    "17-tool-calls": Case("both forms train", (r"(?s)wrote a1.*wrote a2",)),
    "19-messages-as-prompt-and-completion": Case("trains", (r"wrote a1",)),
    "20-chat-asks-otherwise-than-trained": Case(
        "chat answers as training taught",
        (
            r"should say: Once upon a time\.\s+Once upon a time\.",
            r"should say: was happy.*\s+was happy and he ran to the park\.",
        ),
    ),
    "22-few-short-examples": Case("trains, calibrated on shorter blocks", (r"wrote adapter",), (r"too few",)),
    "23-saved-by-datasets": Case("trains", (r"wrote adapter",), (r"not valid JSON",)),
    "24-tokenizer-model-alone": Case("trains", (r"wrote adapter",), (r"tiktoken",)),
    "27-last-not-best": Case(
        "the adapter of the lowest held-out loss is kept, and its step named",
        (r"held-out loss ([\d.]+) at step ([2-9]|1[0-4]), which is kept \((?!\1)[\d.]+ at the end",),
    ),
}


def main() -> int:
    """Run the cases and print the table; the number of those that do not end as they should is the exit code."""
    parser = argparse.ArgumentParser(description="Run situations from public reports and say which end as they should.")
    parser.add_argument("folder", type=Path, help="folder of the cases")
    parser.add_argument("--only", nargs="*", default=[], help="numbers of cases, such as 07")
    parser.add_argument("--show", action="store_true", help="print the whole output of each case")
    given = parser.parse_args()
    failed = 0
    for folder in sorted(path for path in given.folder.resolve().iterdir() if (path / "run.sh").exists()):
        if given.only and folder.name[:2] not in given.only:
            continue
        start = time.monotonic()
        text = output_of(folder)
        missing = judged(folder.name, text)
        failed += missing is not None
        verdict = "as it should" if missing is None else f"NOT: {missing}"
        case = CASES.get(folder.name)
        print(
            f"{folder.name:40} {time.monotonic() - start:4.0f} s  {verdict}  ({case.should if case else 'unknown'})",
            flush=True,
        )
        if given.show or missing is not None:
            print("    " + text.strip().replace("\n", "\n    "), flush=True)
    print(f"{failed} do not end as they should")
    return failed


def output_of(folder: Path) -> str:
    """What a case prints, without progress bars."""
    about = {
        "ROOT": str(ROOT),
        "PYTHONPATH": str(ROOT / "src"),
        "MODEL": str(folder.parents[1] / "models/stories260K-hf"),
    }
    done = subprocess.run(
        ["sh", str(folder / "run.sh")],
        cwd=ROOT,
        env={**os.environ, **about},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=600,
        check=False,
    )
    return BARS.sub("", done.stdout.decode(errors="replace").replace("\r", "\n"))


def judged(name: str, text: str) -> str | None:
    """What is missing from, or wrong with, a case's output; None if nothing is."""
    case = CASES.get(name)
    if case is None:
        return "nothing is known of this case"
    for pattern in case.must:
        if not re.search(pattern, text):
            return f"lacks {pattern}"
    for pattern in (*case.never, BUG):
        if re.search(pattern, text):
            return f"has {pattern}"
    return None


if __name__ == "__main__":
    sys.exit(main())
