"""Tables of tilings: what a problem gets, and what is wrong with a table."""

import json

import pytest

from pallas_kernels.block_matmul import cases
from pallas_kernels.block_matmul import table as dense
from pallas_kernels.block_matmul.table import KINDS, TABLE, Entry, TableError, load, parse
from pallas_kernels.block_matmul.tiling import FewRows, ManyRows
from pallas_kernels.block_matmul.tilings import (
    Problem,
    choose,
    dense_tiling,
    few_rows_tiling,
    many_rows_tiling,
    padded_rows,
    reason,
)
from pallas_kernels.grouped_matmul import cases as grouped_cases
from pallas_kernels.grouped_matmul import tilings as grouped
from pallas_kernels.grouped_matmul.one_token_tiling import OneToken

NO_TABLE = TABLE.with_name("none.json")


def entry(us, *sizes, **more):
    return Entry(Problem(*sizes, **more), FewRows(), us)


def test_the_nearest_entry_is_chosen():
    entries = [
        entry(1.0, 1, 4096, 4096),
        entry(2.0, 64, 4096, 4096),
        entry(3.0, 8, 4096, 2048),
        entry(4.0, 8, 1024, 1024),
    ]

    def chosen(*sizes, fits=lambda _: True, of=entries, **more):
        found = choose(of, Problem(*sizes, **more), fits)
        return found and found.us

    assert chosen(64, 4096, 4096) == 2.0  # itself
    assert chosen(7, 4096, 4096) == 1.0 and chosen(9, 4096, 4096) == 2.0  # the same weights, by m
    assert chosen(8, 4096, 4096) == 1.0  # as far from both: the faster
    assert chosen(8, 2048, 2048) == 3.0 and chosen(4, 512, 1024) == 4.0  # by all sizes
    assert chosen(8, 4096, 4096, fits=lambda _: False) is None and chosen(1, 64, 128, of=[]) is None
    in_blocks = [entry(1.0, 96, 64, 128, experts=4, rows=8), entry(0.5, 96, 64, 128, experts=4, rows=16)]
    assert chosen(96, 64, 128, experts=4, rows=8, of=in_blocks) == 1.0
    assert chosen(96, 64, 128, experts=4, of=in_blocks) == 0.5  # rows of a block are free: the faster


def table(tmp_path, content):
    path = tmp_path / "tiling.json"
    path.write_text(json.dumps(content))
    return path


def test_an_entry_that_does_not_divide_is_passed_over(tmp_path):
    long, short = {"blocks": 8, "stages": 3, "us": 1.0}, {"blocks": 2, "stages": 4, "us": 2.0}
    path = table(tmp_path, {"few_rows": {"m=8 n=512 k=1024": long, "m=8 n=512 k=256": short}})
    assert few_rows_tiling(8, 512, 1024, table=path) == FewRows(8, 3)
    assert few_rows_tiling(8, 512, 768, table=path) == FewRows(2, 4)  # nearer to 1024, no multiple of it
    default = few_rows_tiling(8, 512, 128, table=path)
    assert default and default.blocks == 1 and default == few_rows_tiling(8, 512, 128, table=NO_TABLE)
    assert few_rows_tiling(8, 96, 128, table=path) is None


def test_the_faster_kernel_is_chosen(tmp_path):
    few, many = {"blocks": 1, "us": 3.0}, {"tile_m": 64, "tile_n": 128, "us": 2.0}
    path = table(tmp_path, {"few_rows": {"m=32 n=512 k=1024": few}, "many_rows": {"m=32 n=512 k=1024": many}})
    assert dense_tiling(32, 512, 1024, path) == ManyRows(64, 128)
    assert isinstance(dense_tiling(8, 512, 1024, NO_TABLE), FewRows)
    assert isinstance(dense_tiling(800, 512, 1024, NO_TABLE), ManyRows)


@pytest.mark.parametrize("case", [*cases.BENCH, *cases.HOSTILE, *cases.SHIPPED], ids=lambda case: case.name)
def test_every_case_has_a_tiling(case):
    """With the table, and with the defaults."""
    problem = Problem(case.m, case.n, case.k)
    for path in (TABLE, NO_TABLE):
        few, many = (find(case.m, case.n, case.k, table=path) for find in (few_rows_tiling, many_rows_tiling))
        assert (few is None) == (case.m > 256) and (few is None or reason(few, problem) is None)
        assert many and reason(many, problem) is None and padded_rows(case.m, many) % many.tile_m == 0
        assert dense_tiling(case.m, case.n, case.k, path)


@pytest.mark.parametrize("case", [*grouped_cases.BENCH, *grouped_cases.HOSTILE, *grouped_cases.SHIPPED], ids=str)
def test_every_expert_case_has_a_tiling(case):
    m = case.hit * case.rows
    for rows in case.blocks:
        found = grouped.tiling(m, case.n, case.k, case.weights, experts=case.experts, rows=rows)
        assert reason(found, Problem(m, case.n, case.k, case.weights, case.experts, rows)) is None
        assert isinstance(found, FewRows) or found.rows == rows


def test_blocks_of_two_tiles_are_those_of_a_cluster_where_nothing_was_measured():
    for weights in (1, 2):
        found = grouped.tiling(400, 512, 512, weights, experts=3, rows=256)
        assert isinstance(found, ManyRows) and (found.rows, found.cluster) == (256, 2)


def test_a_layer_has_tilings():
    for case in grouped_cases.LAYERS + grouped_cases.PRO_LAYERS:
        sizes = case.tokens, case.top, case.experts, case.d, case.i
        found = grouped.layer_tiling(*sizes, rows=8 if case.tokens == 1 else None)
        assert found and found.rows in grouped.BLOCK_ROWS
        assert isinstance(grouped.layer_tiling(*sizes), OneToken) == (case.tokens == 1)
    assert grouped.layer_tiling(4, 2, 8, 256, 64) is None  # K of 64: half a scale
    wide = grouped.layer_tiling(4096, 6, 256, 4096, 2048, rows=128)
    assert isinstance(wide.gate_up, ManyRows) and wide.gate_up.split == "rows"


def test_what_no_kernel_takes():
    assert few_rows_tiling(8, 32, 128, table=NO_TABLE) is many_rows_tiling(8, 32, 128, table=NO_TABLE) is None
    assert dense_tiling(8, 64, 64, NO_TABLE) is None
    assert few_rows_tiling(300, 64, 128, table=NO_TABLE) is None
    assert "shared memory" in reason(FewRows(4, 16), Problem(8, 64, 512))
    assert "at most" in reason(FewRows(1, 2), Problem(8, 64, 512, rows=12))
    assert "share their columns" in reason(ManyRows(), Problem(128, 256, 128, weights=2))
    assert "clusters of 128" in reason(ManyRows(), Problem(128, 256, 128, experts=2, rows=64))
    assert "clusters of 256" in reason(ManyRows(cluster=2), Problem(256, 256, 128, experts=2, rows=128))
    assert reason(ManyRows(cluster=2), Problem(256, 256, 128, experts=2, rows=256)) is None
    assert "one buffer" in reason(ManyRows(256, 128, 1, "rows"), Problem(256, 256, 512))
    assert "a power of two" in reason(ManyRows(128, 128, 4, "rows", shares=3), Problem(128, 128, 384))
    wide = ManyRows(128, 128, 4, "rows", cluster=16, cluster_along="columns")
    assert "a cluster of 16: at most 8" in reason(wide, Problem(128, 2048, 128))


@pytest.mark.parametrize("module", [dense, grouped])
def test_every_measured_tiling_fits(module):
    table = load(module.TABLE, tuple(module.KINDS.items()))
    for kind in (kind for kind in table if "layer" not in kind):  # those are no tilings, but rows of a block
        why = grouped.mxfp4_reason if kind == "mxfp4" else reason
        assert table[kind] and not any(why(entry.tiling, entry.problem) for entry in table[kind])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting property name"),
        ("[]", "not a table of few_rows, many_rows"),
        ('{"fast": {}}', "fast: there are few_rows, many_rows"),
        ('{"few_rows": []}', "few_rows: not a table of problems"),
        ('{"few_rows": {"m=1 n=2": {"us": 1.0}}}', "few_rows: 'm=1 n=2': not a problem: k missing"),
        ('{"few_rows": {"m=1 n=2 k=x": {"us": 1.0}}}', "'m=1 n=2 k=x': not a problem: invalid literal"),
        ('{"few_rows": {"m=1 n=2 k=0": {"us": 1.0}}}', "not a problem: sizes {'k': 0}"),
        ('{"few_rows": {"m=1 n=2 k=3 q=4": {"us": 1.0}}}', "not a problem: unknown sizes q"),
        ('{"few_rows": {"m=1 n=2 k=3": {"blocks": 1}}}', "no tiling with its `us`"),
        ('{"few_rows": {"m=1 n=2 k=3": {"us": 1.0, "on": 200}}}', "on is 200: the name of a device"),
        ('{"few_rows": {"m=1 n=2 k=3": {"tile": 1, "us": 1.0}}}', "FewRows has no tile, but blocks"),
        ('{"few_rows": {"m=1 n=2 k=3": {"blocks": 1.5, "us": 1.0}}}', "blocks is 1.5"),
        ('{"few_rows": {"m=1 n=2 k=3": {"stages": 0, "us": 1.0}}}', "stages is 0"),
        ('{"few_rows": {"m=1 n=2 k=3": {"warpgroups": 8, "us": 1.0}}}', "m=1 n=2 k=3.*registers"),
        ('{"many_rows": {"m=1 n=2 k=3": {"split": "middle", "us": 1.0}}}', "split is 'middle'"),
        ('{"many_rows": {"m=1 n=2 k=3": {"rows_first": 1, "us": 1.0}}}', "rows_first is 1"),
    ],
)
def test_a_bad_table_is_named(text, message):
    with pytest.raises(TableError, match=f"^some.json: .*{message}"):
        parse(text, "some.json")


def test_problems_are_read_as_they_are_written():
    for problem in (Problem(1, 64, 128), Problem(96, 64, 128, 2, 8, 16)):
        assert Problem.parse(str(problem)) == problem
    assert str(Problem(96, 64, 128, experts=8, rows=16)) == "m=96 n=64 k=128 experts=8 rows=16"


@pytest.mark.parametrize(("path", "kinds"), [(TABLE, KINDS), (grouped.TABLE, grouped.KINDS)], ids=str)
def test_the_committed_tables_fit_their_problems(path, kinds):
    for kind, entries in parse(path.read_text(), str(path), kinds).items():
        for found in entries:
            assert found.on in ("H100", "H200"), f"{path}: {kind}: {found.problem}: who measured it?"
            assert kind not in KINDS or reason(found.tiling, found.problem) is None, f"{path}: {kind}: {found.problem}"
