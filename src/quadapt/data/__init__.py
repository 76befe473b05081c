"""Data: rows from files and the hub, sequences to train on, batches of them, and blocks to calibrate on."""

from quadapt.data.ask import as_trained, asked, own_form
from quadapt.data.calibration import Calibration, calibration_batches
from quadapt.data.collate import Collator, pad_token_id
from quadapt.data.encode import DataReport, Encoded, check_loss, encode, form_of
from quadapt.data.packing import check_packing
from quadapt.data.prompt import PromptForm
from quadapt.data.read import Rows, read, read_held_out, split_rows

__all__ = [
    "Calibration",
    "Collator",
    "DataReport",
    "Encoded",
    "PromptForm",
    "Rows",
    "as_trained",
    "asked",
    "calibration_batches",
    "check_loss",
    "check_packing",
    "encode",
    "form_of",
    "own_form",
    "pad_token_id",
    "read",
    "read_held_out",
    "split_rows",
]
