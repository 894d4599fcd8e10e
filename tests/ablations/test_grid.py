"""Rows of an ablation: products and variants as commands, names of folders, and which rows make a line of a plot."""

import shlex

import pytest

from acpo_utils.ablations.grid import (
    check_rows,
    folder_name,
    parse_variant,
    product_rows,
    read_flags,
    sweeps,
    variant_row,
)


def test_a_product_has_every_combination_in_order():
    rows = product_rows(["tmax=100,300", "--anchor_weight=0,1"])
    assert [row.name for row in rows] == [f"tmax={t},anchor_weight={w}" for t in (100, 300) for w in (0, 1)]
    assert rows[1].flags == ("--tmax", "100", "--anchor_weight", "1")
    assert rows[1].settings == {"tmax": "100", "anchor_weight": "1"}
    assert product_rows([]) == []


def test_switches_and_negative_values():
    on, off = product_rows(["random_flip=true,false"])
    assert on.flags == ("--random_flip",) and off.flags == ()
    assert product_rows(["shift=-1,-.5"])[0].flags == ("--shift=-1",)


def test_variants_are_read_as_a_shell_reads_them():
    row = parse_variant("no anchor: --anchor_weight 0 --judge kid --judge 'a b' --use_ema")
    assert row.name == "no anchor"
    assert row.flags == ("--anchor_weight", "0", "--judge", "kid", "--judge", "a b", "--use_ema")
    assert row.settings == {"anchor_weight": "0", "judge": "kid a b", "use_ema": "true"}
    assert parse_variant("full:").flags == () and parse_variant("guide: --evaluator ipce:x").settings == {
        "evaluator": "ipce:x"
    }


@pytest.mark.parametrize("text", ["no colon", "--tmax 3", "x: tmax 3", ": --tmax 3", "x: --tmax '3"])
def test_what_is_no_variant_is_named(text):
    with pytest.raises(ValueError, match="variant"):
        parse_variant(text)


@pytest.mark.parametrize("grids", [["tmax"], ["=3"], ["tmax="], ["tmax=1,,2"], ["tmax=1,1"], ["tmax=1", "tmax=2"]])
def test_what_is_no_grid_is_named(grids):
    with pytest.raises(ValueError, match="--grid"):
        product_rows(grids)


def test_rows_that_would_share_a_folder_are_refused():
    check_rows(product_rows(["tmax=1,2"]))
    with pytest.raises(ValueError, match="nothing to run"):
        check_rows([])
    with pytest.raises(ValueError, match="'no anchor' and 'No  anchor'"):
        check_rows([variant_row("no anchor", ""), variant_row("No  anchor", "")])


def test_folder_names_are_readable_short_and_tell_long_names_apart():
    assert folder_name("tmax=100,anchor_weight=0", 1) == "tmax=100,anchor_weight=0,seed=1"
    assert folder_name("no anchor", 0) == "no-anchor,seed=0"
    assert folder_name("evaluator=two-stream:/a/b c", 0) == "evaluator=two-stream-a-b-c,seed=0"
    long = [folder_name("x" * 200 + end, 12) for end in "ab"]
    assert long[0] != long[1] and all(len(name) < 120 for name in long)
    assert "/" not in folder_name("../..", 0) and not folder_name("../..", 0).startswith(".")


def test_flags_are_read_back_from_a_command():
    flags = shlex.split("--a 1 --b=2 --c --d x y --d z")
    assert read_flags(flags) == {"a": "1", "b": "2", "c": "true", "d": "x y z"}
    with pytest.raises(ValueError, match="'stray'"):
        read_flags(["stray"])


def test_lines_of_a_plot_are_rows_that_differ_in_one_flag():
    rows = product_rows(["tmax=100,300", "anchor_weight=0,1"])
    assert sweeps(rows) == {
        "tmax": {
            "anchor_weight 0": [("100", rows[0].name), ("300", rows[2].name)],
            "anchor_weight 1": [("100", rows[1].name), ("300", rows[3].name)],
        },
        "anchor_weight": {
            "tmax 100": [("0", rows[0].name), ("1", rows[1].name)],
            "tmax 300": [("0", rows[2].name), ("1", rows[3].name)],
        },
    }


def test_variants_make_lines_too_and_lonely_rows_none():
    rows = [
        variant_row("baseline", "--quality_weight 0 --anchor_weight 0"),
        variant_row("low", "--quality_weight 0.1"),
        variant_row("high", "--quality_weight 10"),
        variant_row("without anchor", "--anchor_weight 0"),
        variant_row("default", ""),
    ]
    assert sweeps(rows) == {"quality_weight": {"": [("0.1", "low"), ("10", "high")]}}
    assert sweeps(product_rows(["rank=4", "tmax=1,2"])) == {
        "tmax": {"": [("1", "rank=4,tmax=1"), ("2", "rank=4,tmax=2")]}
    }
