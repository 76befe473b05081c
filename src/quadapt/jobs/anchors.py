"""What a comparison measures methods against: LoRA in full precision, and the usual route to few bits after it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from quadapt.config import TuneConfig
from quadapt.exporters.gguf import export_gguf
from quadapt.exporters.llama_quantize import quantizer
from quadapt.hf.context import positions_of
from quadapt.hf.kinds import kind_of, kind_of_model
from quadapt.hf.loading import load, load_processor, read_config
from quadapt.hf.workspace import Workspace, check_output
from quadapt.jobs import dry
from quadapt.jobs.first import CHECKPOINTS, tuned_first
from quadapt.jobs.identity import earlier_job, inputs_of, job_of
from quadapt.jobs.source import dense_folder, device_of
from quadapt.jobs.tasking import tuned_for
from quadapt.jobs.tune import MOST_LENGTH, encoded, rows_of
from quadapt.report.memory import measured_peak
from quadapt.report.ui import UI

DENSE = "model"
"""The folder, within the output of an anchor, of the dense model that LoRA has tuned."""

MIXTURES = {2: "Q2_K", 3: "Q3_K_M", 4: "Q4_K_M", 5: "Q5_K_M", 6: "Q6_K", 8: "Q8_0"}
"""For each width llama.cpp's own mixture of types that is most usual there."""


def tune_dense(config: TuneConfig, ui: UI) -> dict[str, Any]:
    """Tune the dense model by LoRA in its own precision, and write it, merged.

    Args:
        config: Settings whose method tunes the dense model first by LoRA; of that method nothing else is done.
        ui: Where progress is shown.

    Returns:
        What training measured: `steps`, `final_loss`, `eval_loss`, `losses`, `seconds`, `peak_memory`.

    Raises:
        QuadaptError: Input cannot be used, see the message.
    """
    folder, output = dense_folder(config.model), Path(config.output)
    about = read_config(folder.name, trust_remote_code=config.trust_remote_code)
    task, found = tuned_for(config, kind_of(about)), dry.sketch(folder.name, config)
    seq_len = config.seq_len or task.length(positions_of(found.model), MOST_LENGTH)
    check_output(output, overwrite=False, inputs=inputs_of(config))
    code = config.trust_remote_code
    tokenizer = load_processor(folder.name, kind_of_model(found.model), trust_remote_code=code)
    lesson = encoded(config, task, rows_of(config, task), tokenizer, found.model.config, seq_len, ui)
    first = config.spec.method.tune_first
    recipe = replace(config.run.recipe, learning_rate=first.learning_rate)  # type: ignore[attr-defined]
    run = replace(config.run, recipe=recipe)
    with (
        Workspace(output, job_of("anchor", config, earlier_job(output)), needs=found.dense) as space,
        measured_peak(device_of(config)) as peak,
    ):
        if space.finished is not None:
            return space.finished
        _, said = tuned_first(config, space, folder, lesson, run, ui, name=DENSE)
        result = {**said, "prompt": lesson.data.form.as_dict(), "peak_memory": peak()}
        space.commit(CHECKPOINTS, result=result)
    return result


def quantize_as_usual(dense: Path, output: Path, bits: int) -> str:
    """Write a dense model as GGUF in 16 bits, and quantize it as llama.cpp does.

    Args:
        dense: The folder of the model.
        output: The GGUF file to write.
        bits: The width, which decides on the mixture of types (`MIXTURES`).

    Returns:
        The name of the mixture.

    Raises:
        ExportError: The model is of a family that GGUF files are not written for, or llama.cpp refuses it.
        MissingDependency: llama.cpp's quantizer is not installed.
    """
    quantize, kind = quantizer(), MIXTURES[bits]
    whole = output.with_name(f"{output.stem}-16bit.gguf")
    try:
        model, tokenizer = load(str(dense))
        export_gguf(model.to(torch.float16), tokenizer, whole, dense="f16")
        del model
        quantize(whole, output, kind)
    finally:
        whole.unlink(missing_ok=True)
    return kind
