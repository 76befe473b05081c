"""Statistics of the full-precision model, from the cache, or gathered and put there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from quadapt.calibrate import Batch, named
from quadapt.errors import ResourceError
from quadapt.hf.workspace import check_disk
from quadapt.jobs.identity import identity
from quadapt.report.ui import UI
from quadapt.statistics import FISHER, MOMENT, StatisticsFiles, gather

_FORM = 1
"""Counted up when what the files hold changes."""


def cache_folder() -> Path:
    """The folder for what may be wanted again: `QUADAPT_CACHE`, or `quadapt` in the user's cache folder."""
    own = os.environ.get("QUADAPT_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quadapt"


def statistics_for(
    needs: Collection[str],
    name: str,
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    batches: Sequence[Batch],
    ui: UI,
    device: str | None = None,
) -> StatisticsFiles | None:
    """Statistics by layer; None if none are needed.

    Kept on disk under a key of the model's files, the token ids and the dtype: another start, rounding or bit width
    over the same model and text finds it there.

    Args:
        needs: The names of the statistics that a start needs.
        name: Folder or hub name of the model.
        model: The dense model of that name.
        layers: The layers that are to be quantized, by full name.
        batches: What to calibrate on.
        ui: Where progress is shown.
        device: Where to compute. Default: where the model is.

    Raises:
        ResourceError: The cache cannot be written.
        CalibrationError: The model cannot be walked through, or its statistics are not finite.
    """
    if not needs:
        return None
    folder = cache_folder() / "statistics" / _key(name, model, batches)
    try:
        files = StatisticsFiles(folder, needs)
    except OSError as error:
        raise ResourceError(
            f"{folder}: cannot be written ({error.strerror}). Statistics are kept there; set QUADAPT_CACHE to another "
            "folder"
        ) from error
    missing = {statistic: files.missing(statistic, layers) for statistic in needs}
    if not any(missing.values()):
        ui.say(f"statistics of the full-precision model: from {folder}")
        return files
    columns = [layers[name].in_features for name in missing.get(MOMENT, ())]
    weights = [layers[name].weight.numel() for name in missing.get(FISHER, ())]
    check_disk(folder, 2 * sum(size * size for size in columns) + 4 * sum(weights))
    ui.say(f"statistics of the full-precision model: kept in {folder}")
    gather(needs, model, layers, batches, files, ui.over, device)
    return files


def _key(name: str, model: nn.Module, batches: Sequence[Batch]) -> str:
    config: Any = getattr(model, "config", None)
    tensors = [(key, each) for batch in batches for key, each in sorted(named(batch).items())]
    about = {
        "form": _FORM,
        "model": identity(name),
        "commit": getattr(config, "_commit_hash", None),
        "dtype": str(next(model.parameters()).dtype),
        "shapes": [[*([] if key == "input_ids" else [key]), *each.shape] for key, each in tensors],
    }
    state = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for _, each in tensors:
        state.update(each.cpu().numpy().tobytes())
    return state.hexdigest()[:24]
