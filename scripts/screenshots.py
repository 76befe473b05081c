"""Pictures of a page of `quadapt compare`, as a browser shows it at the widths of a desk and of a phone.

    python scripts/screenshots.py comparison/index.html

writes `docs/figures/compare-wide.png` and `compare-narrow.png`. Needs Chromium (`--browser` says which).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
SIZES = {"wide": (1300, 1500), "narrow": (390, 1700)}
"""Width and height of each picture in pixels."""


def shoot(page: Path, browser: str) -> list[Path]:
    """Take the pictures, and return where they lie."""
    made = []
    for name, (width, height) in SIZES.items():
        file = FIGURES / f"compare-{name}.png"
        # Chromium's window is never narrower than 500 pixels: a frame of the wanted width shows the page instead.
        frame = file.with_suffix(".html")
        frame.write_text(
            f'<body style="margin:0"><iframe src="{page.resolve().as_uri()}" width="{width}" height="{height}" '
            'style="border:0" title="page"></iframe></body>'
        )
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=8000"]
        sizes = [f"--window-size={max(500, width)},{height}", f"--screenshot={file}"]
        try:
            subprocess.run([browser, *options, *sizes, frame.as_uri()], check=True, capture_output=True)
        finally:
            frame.unlink()
        made.append(file)
    return made


def main() -> None:
    """Take the pictures of the page that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--browser", default=shutil.which("chromium") or "chromium")
    args = parser.parse_args()
    for file in shoot(args.page, args.browser):
        print(file)


if __name__ == "__main__":
    main()
