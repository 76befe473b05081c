"""`quadapt convert`: a model that others have quantized, in our own form, with the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quadapt.config import ConvertConfig
from quadapt.errors import CheckpointError
from quadapt.hf.folder import Folder, open_folder
from quadapt.hf.kinds import kind_of_model
from quadapt.hf.loading import load_model, load_processor, quantization_of, read_config
from quadapt.hf.quantizer import base_config
from quadapt.hf.saving import save_quantized
from quadapt.hf.workspace import Workspace, check_output
from quadapt.jobs.identity import earlier_job, inputs_of, job_of
from quadapt.jobs.publish import publishes
from quadapt.jobs.quantize import show_layers, show_left
from quadapt.jobs.source import device_of, not_read
from quadapt.model.quantize import bits_of
from quadapt.model.trial import check_runs
from quadapt.report.memory import measured_peak
from quadapt.report.ui import UI


@publishes
def convert(config: ConvertConfig, ui: UI) -> dict[str, Any]:
    """Run `quadapt convert` and return a summary of the model it made.

    Raises:
        QuadaptError: Input cannot be used, see the message.
    """
    folder, output = open_folder(config.model), Path(config.output)
    about = quantization_of(folder.name, _checked(folder, trust_remote_code=config.trust_remote_code))
    assert about is not None  # the folder is quantized
    check_output(output, overwrite=config.overwrite, inputs=inputs_of(config))
    device, needs = device_of(config), sum(layout.bits for layout in about.layouts.values()) // 8
    job = job_of("convert", config, earlier_job(output))
    with (
        Workspace(output, job, overwrite=config.overwrite, needs=needs, keeps=False) as space,
        measured_peak(device) as peak,
    ):
        if space.finished is not None:
            return space.finished
        code = config.trust_remote_code
        with ui.working("reading"):
            model = load_model(folder.name, dtype=config.dtype, device=device, trust_remote_code=code)
        check_runs(model)
        content = base_config(model)
        layouts = content.layouts
        note = {
            "made": {**content.made, "source": folder.name},
            "left": content.left,
            "bits_per_weight": bits_of(list(layouts.values())),
        }
        processor = load_processor(folder.name, kind_of_model(model), trust_remote_code=code)
        save_quantized(model, processor, space.path, note)
        result: dict[str, Any] = {
            "output": config.output,
            **note,
            "fingerprint": content.fingerprint,
            "peak_memory": peak(),
        }
        space.commit(result=result)
    show_layers(layouts, ui)
    show_left(content.left, ui)
    bits, most = bits_of(list(layouts.values())), result["peak_memory"] / 1e6
    ui.show(f"{bits:.3f} true bits per quantized weight, peak memory {most:.0f} MB")
    ui.say(f"wrote {config.output}. Next: quadapt tune {config.output} --data FILE")
    return result


def _checked(folder: Folder, *, trust_remote_code: bool) -> Any:
    """The configuration, as transformers reads it, of a model that can be converted.

    Raises:
        CheckpointError: It is dense, an adapter, our own, or of a format that is not known here.
    """
    name = folder.name
    if folder.kind == "adapter":
        raise CheckpointError(f"{name!r} is an adapter. Give its base")
    if folder.importer is not None:
        return read_config(name, trust_remote_code=trust_remote_code)
    if folder.kind == "quantized":
        raise CheckpointError(f"{name!r} is in quadapt's own form already. Go on with it: quadapt tune {name}")
    why = not_read(name, read_config(name, trust_remote_code=trust_remote_code))
    if why:
        raise CheckpointError(why)
    raise CheckpointError(f"{name!r} is a dense model. Quantize it: quadapt quantize {name} --output FOLDER")
