"""What a model is run on: token ids, or inputs by name."""

from __future__ import annotations

import pytest
import torch

from quadapt.calibrate import inputs_of, labelled, named, parted, sequences_in
from quadapt.errors import CalibrationError

IDS = torch.arange(12).view(4, 3)
PICTURES = torch.zeros(4, 3, 2, 2)


def test_token_ids_are_inputs_and_labels_of_themselves() -> None:
    assert inputs_of(IDS) == {"input_ids": IDS} == named(IDS)
    assert labelled(IDS) == {"input_ids": IDS, "labels": IDS}
    assert sequences_in(IDS) == 4
    assert [each.tolist() for each in parted(IDS, 3)] == [IDS[:3].tolist(), IDS[3:].tolist()]


def test_labels_are_no_inputs() -> None:
    batch = {"pixel_values": PICTURES, "labels": torch.ones(4)}
    assert list(inputs_of(batch)) == ["pixel_values"]
    assert labelled(batch) == batch
    with pytest.raises(CalibrationError, match="a batch of pixel_values has no labels"):
        labelled({"pixel_values": PICTURES})


def test_inputs_by_name_are_parted_where_all_have_a_row_for_each_sequence() -> None:
    both = parted({"input_ids": IDS, "pixel_values": PICTURES}, 2)
    assert [{name: len(each) for name, each in part.items()} for part in both] == [
        {"input_ids": 2, "pixel_values": 2},
        {"input_ids": 2, "pixel_values": 2},
    ]
    patches = {"input_ids": IDS, "pixel_values": torch.zeros(9, 3)}  # as many as the pictures have patches in all
    assert parted(patches, 2) == [patches]
