"""What a model is run on: token ids, or inputs by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quadapt.calibrate import call_of, inputs_of, named, parted, sequences_in
from quadapt.errors import CalibrationError


class Causal:
    """Knows of a cache."""

    def forward(self, input_ids: Any, use_cache: bool = True) -> None: ...


class Seeing:
    """Knows of none."""

    def forward(self, pixel_values: Any) -> None: ...


class Translating:
    """An encoder-decoder."""

    config = SimpleNamespace(is_encoder_decoder=True)

    def forward(self, input_ids: Any, decoder_input_ids: Any) -> None: ...


IDS = torch.arange(12).view(4, 3)
PICTURES = torch.zeros(4, 3, 2, 2)


def test_token_ids_are_inputs_and_labels_of_themselves() -> None:
    assert inputs_of(IDS) == {"input_ids": IDS} == named(IDS)
    assert call_of(Causal(), IDS, loss=True) == {"input_ids": IDS, "labels": IDS, "use_cache": False}
    assert sequences_in(IDS) == 4
    assert [each.tolist() for each in parted(IDS, 3)] == [IDS[:3].tolist(), IDS[3:].tolist()]


def test_labels_are_no_inputs() -> None:
    batch = {"pixel_values": PICTURES, "labels": torch.ones(4)}
    assert list(inputs_of(batch)) == ["pixel_values"]
    assert call_of(Seeing(), batch) == {"pixel_values": PICTURES}
    assert call_of(Seeing(), batch, loss=True) == batch
    with pytest.raises(CalibrationError, match="a batch of pixel_values has no labels"):
        call_of(Seeing(), {"pixel_values": PICTURES}, loss=True)


def test_an_encoder_decoder_writes_what_it_reads_or_what_it_is_told() -> None:
    both = {"input_ids": IDS, "decoder_input_ids": IDS}
    assert call_of(Translating(), IDS) == both
    assert call_of(Translating(), both | {"decoder_input_ids": IDS[:2]})["decoder_input_ids"] is not IDS
    assert call_of(Translating(), {"input_ids": IDS, "labels": IDS}, loss=True) == {"input_ids": IDS, "labels": IDS}


def test_inputs_by_name_are_parted_where_all_have_a_row_for_each_sequence() -> None:
    both = parted({"input_ids": IDS, "pixel_values": PICTURES}, 2)
    assert [{name: len(each) for name, each in part.items()} for part in both] == [
        {"input_ids": 2, "pixel_values": 2},
        {"input_ids": 2, "pixel_values": 2},
    ]
    patches = {"input_ids": IDS, "pixel_values": torch.zeros(9, 3)}  # as many as the pictures have patches in all
    assert parted(patches, 2) == [patches]
