"""Levels against the published tables; which grids exist, and what the others are told."""

from __future__ import annotations

import itertools

import pytest
import torch
from reference import nf_levels

from quadapt.errors import ConfigError
from quadapt.quant.format import Format, normal_levels


@pytest.mark.parametrize(
    ("table", "bits", "symmetric"),
    [
        (nf_levels.NF4, 4, False),
        (nf_levels.NF3, 3, False),
        (nf_levels.NF2, 2, False),
        (nf_levels.NF2_SYMMETRIC, 2, True),
    ],
)
def test_levels_are_the_published_ones(table: tuple[float, ...], bits: int, symmetric: bool) -> None:
    assert normal_levels(bits, symmetric=symmetric) == pytest.approx(table, abs=2e-7)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_levels_follow_the_rule_of_qlora(bits: int) -> None:
    assert normal_levels(bits) == pytest.approx(nf_levels.asymmetric(bits), abs=1e-12)
    assert normal_levels(bits, symmetric=True) == pytest.approx(nf_levels.symmetric(bits), abs=1e-12)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_normal_levels_rise_from_minus_one_to_one_through_zero(bits: int) -> None:
    levels = normal_levels(bits)
    assert len(levels) == 2**bits
    assert all(low < high for low, high in itertools.pairwise(levels))
    assert levels[0] == -1.0
    assert levels[-1] == 1.0
    assert levels[2 ** (bits - 1) - 1] == 0.0  # a weight of zero stays zero


def test_the_table_holds_the_levels_as_float32() -> None:
    table = Format(levels="nf", bits=4).table(torch.zeros(1))
    assert torch.equal(table, torch.tensor(normal_levels(4)))
    assert table.dtype == torch.float32
    assert Format(bits=4).table(torch.zeros(1)) is None


def test_tables_of_bitsandbytes_are_its_own_in_order() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    for levels, kind in (("nf-qlora", "nf4"), ("fp4", "fp4")):
        table = Format(levels=levels, bits=4).table(torch.zeros(1))
        assert torch.equal(table, functional.get_4bit_type(kind, "cpu").sort().values)
        assert torch.equal(table, table.sort().values)
    assert Format(levels="nf-qlora", bits=4).table(torch.zeros(1)).tolist() == pytest.approx(nf_levels.NF4, abs=0)
    assert normal_levels(4) != pytest.approx(nf_levels.NF4, abs=1e-8)  # which is why they have a name of their own


def test_the_table_of_llama_cpp_is_its_own() -> None:
    quants = pytest.importorskip("gguf.quants")
    format = Format(levels="iq4-nl", bits=4)
    assert format.table(torch.zeros(1)).tolist() == list(quants.IQ4_NL.kvalues)
    assert format.ends == (-127, 113)
    assert format.zero == "none"


def test_zero_defaults_to_float_for_integers_and_to_none_for_quantiles() -> None:
    assert Format(bits=4).zero == "float"
    assert Format(levels="nf", bits=4).zero == "none"
    assert Format(levels="nf-sym", bits=2).zero == "none"
    assert Format(levels="nf", bits=4, zero="float").zero == "float"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"bits": 7}, "bits=7"),
        ({"bits": 1}, "bits=1"),
        ({"bits": 16}, "Use 2, 3, 4, 5, 6 or 8"),
        ({"bits": 4.0}, "bits=4.0"),
        ({"bits": True}, "bits=True"),
        ({"levels": "nf", "bits": 5}, "Use 2, 3, 4 or 8, or integers (levels='int')"),
        ({"levels": "fp"}, "levels='fp'"),
        ({"levels": "nf-sym", "bits": 4}, "Use levels='nf'"),
        ({"levels": "fp4", "bits": 3}, "levels='fp4' is defined for bits=4 alone, not bits=3"),
        ({"levels": "iq4-nl", "bits": 3}, "levels='iq4-nl' is defined for bits=4 alone, not bits=3"),
        ({"levels": "nf-qlora", "bits": 2}, "levels='nf-qlora' is defined for bits=4 alone, not bits=2"),
        ({"group_size": 24}, "group_size=24"),
        ({"group_size": 8}, "group_size=8"),
        ({"group_size": 512}, "from 16 to 256"),
        ({"group_size": 0}, "group_size=0"),
        ({"group_size": -2}, "-1 for the whole row"),
        ({"zero": "half"}, "zero='half'"),
        ({"levels": "nf", "zero": "integer"}, "no meaning for levels='nf'"),
    ],
)
def test_grids_that_do_not_exist_are_refused_with_advice(settings: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        Format(**settings)
    assert told in str(error.value)


def test_every_grid_has_a_name_of_its_own() -> None:
    names = set()
    grids = [
        *itertools.product(["int"], (2, 3, 4, 5, 6, 8), (16, 32, 256, -1), ("none", "integer", "float")),
        *itertools.product(["nf"], (2, 3, 4, 8), (16, 32, 256, -1), ("none", "float")),
        *itertools.product(["nf-sym"], (2,), (16, 32, 256, -1), ("none", "float")),
        *itertools.product(["nf-qlora", "fp4", "iq4-nl"], (4,), (16, 32, 256, -1), ("none", "float")),
    ]
    for levels, bits, group, zero in grids:
        names.add(Format(levels=levels, bits=bits, group_size=group, zero=zero).name)
    assert len(names) == len(grids)
    assert {"int4-g32", "int8-sym-row", "int4-zp-g32", "nf4-g256", "nf2-sym-g16", "nf3-shift-g32"} <= names
    assert {"nf4-qlora-g16", "nf4-qlora-shift-row", "fp4-g32", "fp4-shift-g256", "iq4-nl-g32"} <= names


@pytest.mark.parametrize(
    ("group", "columns", "width", "groups"),
    [(32, 64, 32, 2), (32, 65, 32, 3), (32, 20, 20, 1), (-1, 100, 100, 1), (256, 257, 256, 2), (16, 1, 1, 1)],
)
def test_groups_of_a_row(group: int, columns: int, width: int, groups: int) -> None:
    format = Format(bits=4, group_size=group)
    assert (format.width(columns), format.groups(columns)) == (width, groups)


@pytest.mark.parametrize(
    ("bits", "columns", "size"),
    [(2, 4, 1), (2, 5, 2), (3, 8, 3), (3, 9, 4), (4, 3, 2), (5, 8, 5), (5, 9, 6), (6, 4, 3), (6, 5, 4), (8, 7, 7)],
)
def test_bytes_of_a_row(bits: int, columns: int, size: int) -> None:
    assert Format(bits=bits).row_bytes(columns) == size
