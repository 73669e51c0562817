"""The dispatcher's rule on GPUs: its table, its lookup, the tilings. Needs no GPU.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import math

import pytest
import torch

from blockell_kernels._backends import DIRECTIONS, Case, Choice, shares
from blockell_kernels._gpu import TILE_SIZES

rule = importlib.import_module("blockell_kernels._triton._rule")
tilings = importlib.import_module("blockell_kernels._triton._tilings")
gluon_tilings = importlib.import_module("blockell_kernels._triton._tilings_gluon")
by_units = importlib.import_module("blockell_kernels._gluon._grad_input")
by_items = importlib.import_module("blockell_kernels._gluon._grad_values")
device_module = importlib.import_module("blockell_kernels._triton._device")

META = torch.device("meta")
SHARED_MEMORY_BYTES = 227 * 1024


def case(direction, N, inp, out, B, G=1, density=0.5, dtype=torch.bfloat16):
    C = inp // B
    return Case(direction, META, dtype, N, out // B, C, max(1, round(density * C)), B, G)


def test_table_is_complete_and_sane():
    table = rule.table()
    assert table["device"]
    assert table["sources"]
    kinds = ("half", "float32", "3xtf32")
    for direction, kind, B in itertools.product(DIRECTIONS, kinds, TILE_SIZES):
        keys = [k for k in table["rows"] if k.startswith(f"{direction} {kind} {B}x")]
        assert f"{direction} {kind} {B}x{B}" in keys
        for N, inp, out, points in itertools.chain(*(table["rows"][key] for key in keys)):
            assert N >= 1
            assert inp % B == 0
            assert out % B == 0
            densities = [point[0] for point in points]
            assert sorted(set(densities)) == densities
            assert 0 < densities[0] <= densities[-1] <= 1
            for _, *octaves in points:
                assert all(-3 <= found <= 3 for found in octaves)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_measured_shape_answers_alone(direction):
    rows = rule.table()["rows"]
    for B, width in ((128, 128), (16, 128), (16, 16)):
        for N, inp, out, points in rows[f"{direction} half {B}x{width}"]:
            density, copied, alone = points[-1]
            asked = case(direction, N, inp, out, B, width // B, density=density)
            found = rule.expected(asked, "half")
            assert [shape[:3] for shape in found.shapes] == [(N, inp, out)]
            assert found.width == width
            assert found.octaves == pytest.approx(copied, abs=0.02)
            assert rule.expected(asked, "half", copied=False).octaves == pytest.approx(
                alone, abs=0.02
            )


def test_a_group_takes_the_widest_measured_width_below_it():
    assert rule.nearest(case("forward", 8192, 640, 2560, 16, 4), "half")[1] == 16
    assert rule.nearest(case("forward", 8192, 640, 2560, 16, 16), "half")[1] == 128


def test_verdict_names_the_measurement():
    said = rule.verdict(case("forward", 8192, 640, 2560, 128, density=0.2))
    assert said.wins
    assert said.why.startswith("forward at density 0.20 takes 0.")
    assert "at N=8192, 640 -> 2560, tile 128, 128 outputs sharing columns, half" in said.why
    near = rule.verdict(case("forward", 9000, 896, 2560, 128, density=0.3))
    assert near.wins
    assert f"and {rule.NEIGHBOURS - 1} shapes near it" in near.why
    free = rule.verdict(case("grad_input", 8192, 640, 2560, 16))
    assert not free.wins


@pytest.fixture
def measured(monkeypatch):
    """Lets the table be made up: rows [N, in, out, points] of every product of tile 16."""

    def use(*rows, whole=None):
        keys = [f"{direction} half 16x{width}" for direction in DIRECTIONS for width in (16, 128)]
        made = {"device": "X", "rows": dict.fromkeys(keys, rows), "whole": {}}
        if whole is not None:
            made["whole"] = {"forward half 16": whole}
        monkeypatch.setattr(rule, "table", lambda: made)
        forget()

    def forget():
        for looked_up in (rule._measured, rule._nearest, rule._verdict, rule.takes_whole):
            looked_up.cache_clear()

    yield use
    forget()


def test_between_densities_and_beyond_them_a_line_is_followed(measured):
    measured([1024, 640, 2560, [[0.1, -0.4, -0.2], [0.3, 0.2, 0.4], [0.5, 0.2, 0.6]]])
    said = {}
    for density in (0.05, 0.2, 0.25, 0.5, 1.0):
        asked = case("grad_values", 1024, 640, 2560, 16, density=density)
        said[density] = rule.expected(asked, "half").octaves
    slope = 0.6 / math.log2(3)  # of octaves over octaves of density
    expected = {0.05: -0.4 - slope, 0.2: -0.4 + slope, 0.5: 0.2, 1.0: 0.2}
    expected[0.25] = -0.4 + slope * math.log2(2.5)
    assert said == pytest.approx(expected)
    alone = case("grad_values", 1024, 640, 2560, 16, density=1.0)
    slope = 0.2 / math.log2(0.5 / 0.3)
    assert rule.expected(alone, "half", copied=False).octaves == pytest.approx(0.6 + slope)


def test_a_kernel_for_more_blocks_may_win_again(measured):
    measured([1024, 640, 2560, [[0.1, -0.1, 0.1], [0.2, 0.1, 0.2], [0.5, -0.1, -0.1], [0.8, 1, 1]]])
    said = {}
    for density in (0.1, 0.2, 0.5, 0.8):
        found = case("grad_values", 1024, 640, 2560, 16, density=density)
        said[density] = rule.verdict(found).wins
        assert rule.beats_copied(found) is (density == 0.5)
    assert list(said.values()) == [True, False, True, False]


def test_the_whole_weight_is_one_more_way(measured, monkeypatch):
    """The other kernels take 1.2 octaves more than dense alone at 50%, the copy 0.4, this 0.1."""
    monkeypatch.setattr(rule._by_whole, "available", lambda device: True)
    points = [[0.1, -0.6, -0.2], [0.5, 0.8, 1.2]]
    measured([1024, 640, 2560, points], whole=[[1024, 640, 2560, [[0.5, 0.1]]]])
    few, many = (case("forward", 1024, 640, 2560, 16, density=d) for d in (0.1, 0.5))
    assert [rule.takes_whole(c) for c in (few, many)] == [False, True]
    assert rule.expected_whole(many, "half").octaves == pytest.approx(0.1 - 0.4)
    said = rule.verdict(many)
    assert said.wins
    assert "at density 0.50 takes 0.81 of the time" in said.why
    assert rule.beats_copied(few)
    assert not rule.beats_copied(many)
    for direction, dtype in (("grad_input", torch.bfloat16), ("forward", torch.float32)):
        assert not rule.takes_whole(case(direction, 1024, 640, 2560, 16, dtype=dtype))
    monkeypatch.setattr(rule._by_whole, "available", lambda device: False)
    rule.takes_whole.cache_clear()
    assert not rule.takes_whole(many)


def test_by_how_much_the_whole_weight_loses_counts(measured, monkeypatch):
    """A copy adds 0.6 octaves to dense alone, other kernels take 0.8 more, this way 1.2."""
    monkeypatch.setattr(rule._by_whole, "available", lambda device: True)
    shapes = [[1024, 640, 2560], [2048, 640, 2560]]
    whole = [[*shape, [[0.5, 1.2]]] for shape in shapes]
    measured(*([*shape, [[0.5, 0.2, 0.8]]] for shape in shapes), whole=whole)
    between = case("forward", 1448, 640, 2560, 16)
    assert rule.expected_whole(between, "half").octaves == pytest.approx(1.2 - 0.6)
    assert not rule.takes_whole(between)
    assert not rule.verdict(between).wins


def test_the_whole_weight_is_judged_at_the_case_s_density(measured, monkeypatch):
    """Absent blocks cost it time, too: at 25% it loses to the copy, at 100% it wins."""
    monkeypatch.setattr(rule._by_whole, "available", lambda device: True)
    shape, others = [1024, 640, 2560], [[0.25, 0.4, 1.0], [1.0, 0.9, 1.5]]
    measured([*shape, others], whole=[[*shape, [[0.25, 0.8], [0.5, 0.45], [1.0, 0.1]]]])
    said = {}
    for density in (0.25, 0.5, 1.0):
        found = case("forward", *shape, 16, density=density)
        assert rule.takes_whole(found)
        said[density] = rule.expected_whole(found, "half").octaves
        assert rule.verdict(found).wins is (said[density] <= 0)
    assert said == pytest.approx({0.25: 0.8 - 0.6, 0.5: 0.45 - 0.6, 1.0: 0.1 - 0.6})


def test_near_shapes_weigh_more_than_far_ones(measured):
    """Two lose a little at a distance of an octave; the one that wins is at half of it."""
    rows = [[2048, 640, 2560, [[0.5, 0.3, 1]]], [1024, 640, 10240, [[0.5, 0.3, 1]]]]
    measured(*rows, [1448, 640, 2560, [[0.5, -0.3, 1]]])
    said = rule.verdict(case("forward", 1024, 640, 2560, 16))
    assert said.wins
    assert "at N=1448, 640 -> 2560 and 2 shapes near it" in said.why
    measured(*rows)
    assert not rule.verdict(case("forward", 1024, 640, 2560, 16)).wins
    far = [32, 640, 2560, [[0.5, -3, 1]]]  # wins by a factor of eight, which does not count
    measured(*rows, far)
    assert not rule.verdict(case("forward", 1024, 640, 2560, 16)).wins


def test_a_density_that_was_not_measured_sends_a_case_to_other_shapes(measured):
    """At 25 and 50% the own shape wins, which says little of 100%, where another was measured."""
    own, other = (
        [1024, 640, 2560, [[0.25, -1, 0], [0.5, -0.4, 0]]],
        [1024, 1024, 2560, [[1.0, 1, 1]]],
    )
    measured(own, other)
    assert rule.verdict(case("forward", 1024, 640, 2560, 16, density=0.6)).wins
    dense = rule.verdict(case("forward", 1024, 640, 2560, 16, density=1.0))
    assert not dense.wins
    assert "1024 -> 2560" in dense.why


def test_a_gpu_not_measured_gets_half(monkeypatch, measured):
    measured([8192, 640, 2560, [[0.3, -1, -1], [0.9, 0.584, 1]]])  # breaks even at 0.6
    monkeypatch.setattr(rule, "capability", lambda device: (8, 0))
    monkeypatch.setattr(rule, "least_density", lambda case: 1.0)
    for density, wins in ((0.3, True), (0.4, False)):
        asked = case("forward", 8192, 640, 2560, 16, 8, density=density)
        said = rule._verdict(asked._replace(device=torch.device("cuda")), "half")
        assert said.wins is wins
    assert "0.40 > 0.30, 0.5 times the break-even of forward on a GPU not measured" in said.why


def test_a_gpu_that_cannot_walk_is_not_told_to(monkeypatch, measured):
    """A gain that was reached by walking says nothing of a GPU without descriptors."""
    measured([1024, 640, 2560, [[0.5, -0.5, -0.5]]])
    free = case("grad_values", 1024, 640, 2560, 16)._replace(device=torch.device("cuda"))
    for capability, wins in (((9, 0), True), ((8, 0), False)):
        monkeypatch.setattr(rule, "capability", lambda device, found=capability: found)
        rule._verdict.cache_clear()
        said = rule._verdict(free, "half")
        assert said.wins is wins
    assert "on a GPU not measured" in said.why


def test_a_copy_made_for_one_product_serves_the_other_where_that_is_faster(monkeypatch):
    density_alone = {"forward": (0.6, 0.3), "grad_input": (0.4, 0.3)}
    alone = rule.Shape(512, 640, 2560, [[0.2, -1, -0.1], [0.4, -1, 0.1]])
    monkeypatch.setattr(rule, "nearest", lambda case, kind, density=None: ([(1.0, alone)], 128))
    monkeypatch.setattr(rule, "takes_whole", lambda case: False)

    def shared(density):
        # 20 columns; the forward product wins up to 0.6, grad_input up to 0.4, both alone to 0.3
        found = case("forward", 512, 640, 2560, 32, 4, density=density)
        chosen = [
            Choice("triton" if found.density <= density_alone[d][0] else "dense", "")
            for d in ("forward", "grad_input")
        ]
        return shares(found, *chosen)

    assert [shared(d) for d in (0.25, 0.35, 0.5, 0.8)] == [False, False, True, True]
    sparse_enough = case("forward", 512, 640, 2560, 32, 4, density=0.2)
    assert not shares(sparse_enough, Choice("triton", ""), Choice("dense", ""))


def test_a_copy_beside_the_weight_gradient_costs_the_forward_product_less(measured):
    """The copy takes 0.4 of a product's time; the forward product may lose 0.7 of that to it."""
    copy, asked = math.log2(1.4), case("forward", 512, 640, 2560, 16)
    chosen = Choice("triton", ""), Choice("dense", "")
    for sparse, here, beside in ((0.95, False, False), (1.25, True, False), (1.3, True, True)):
        alone = math.log2(sparse)
        measured([512, 640, 2560, [[0.5, alone - copy, alone]]])
        assert rule.verdict(asked).wins
        assert shares(asked, *chosen) is here, sparse
        assert shares(asked, *chosen, beside=True) is beside, sparse
        # an input gradient that is sparse by itself has no copy to hide
        assert shares(asked, *chosen[::-1], beside=True) is here, sparse


def test_one_copy_for_both_products_may_beat_two_sparse_ones(monkeypatch, measured):
    """Both win by a little beside a product with its own copy, of 0.6 of a product's time."""
    copy = math.log2(1.6)
    triton = Choice("triton", "")
    asked = case("forward", 512, 640, 2560, 16)
    for sparse, loses in ((1.5, True), (1.4, True), (1.35, False), (0.9, False)):
        alone = math.log2(sparse)
        measured([512, 640, 2560, [[0.5, alone - copy, alone]]])
        assert rule.verdict(asked).wins
        assert shares(asked, triton, triton) is loses, sparse
        # not where the sparse kernels were asked for, nor where this GPU was not measured
        assert not shares(asked, triton, triton, "triton")
        monkeypatch.setattr(rule, "capability", lambda device: (8, 0))
        assert not rule.loses_to_one_copy(asked._replace(device=torch.device("cuda")))


@pytest.mark.parametrize("capability", [(7, 0), (8, 0), (9, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_case_has_a_tiling_that_fits(monkeypatch, capability, dtype):
    monkeypatch.setattr(tilings, "capability", lambda device: capability)
    limit = {7: 96, 8: 163, 9: 227}[capability[0]] * 1024
    size = 4 if dtype == torch.float32 else 2
    for direction, B, G, N in itertools.product(
        DIRECTIONS, TILE_SIZES, (1, 2, 5, 16), (1, 33, 512, 2048, 65536)
    ):
        for inp, out in ((640, 2560), (2560, 640), (4096, 14336)):
            if out // B % G:
                continue
            t = tilings.tiling_for.__wrapped__(case(direction, N, inp, out, B, G, dtype=dtype))
            if t.path.startswith("gluon"):
                assert capability == (9, 0)
                assert dtype == torch.bfloat16
                t = t.otherwise
            columns = B if direction == "grad_input" else t.BN
            assert (t.BM + columns) * t.BK * size * t.stages * max(1, t.persistent) <= limit, t
            for side in (t.BM, t.BN, t.BK):
                assert side & (side - 1) == 0, t
            assert t.path == "pointers" or capability == (9, 0)


@pytest.mark.parametrize("density", [0.125, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("B", [16, 32, 64])
def test_the_rings_of_the_input_gradient_fit(B, density):
    """A stage's blocks have room even if it holds all its columns; what is left makes stages."""
    for BN, BK in ((256, 128), (320, 64), (128, 128), (256, 64)):
        c = by_units.constants(B, tilings.Tiling(path="gluon", BM=128, BN=BN, BK=BK), density)
        out = 2 * -(-c["COLUMNS"] // 2) * 64 * B
        ring = c["STAGES"] * 128 * BK + c["BLOCKS"] * BK * B
        assert c["STAGES"] >= 2
        assert c["BLOCKS"] >= c["COLUMNS"]
        assert 2 * (ring + out) <= SHARED_MEMORY_BYTES - 2048


@pytest.mark.parametrize("outputs", [64, 128])
def test_weight_gradients_are_cut_with_little_padding(outputs):
    for B, K in itertools.product((16, 32, 64, 128), range(1, 40)):
        if outputs < B:
            continue
        columns = gluon_tilings.columns_of(B, outputs, K)
        assert columns % B == 0
        assert columns * outputs // 128 % by_items.product_of(outputs, columns) == 0
        c = by_items.constants(B, outputs, columns, False)
        assert c["STAGES"] >= 2
        assert c["STAGES"] * (outputs + columns) * c["BT"] * 2 <= SHARED_MEMORY_BYTES - 1024
        if K * B >= 640:
            assert -(-K * B // columns) * columns <= 1.4 * K * B, (B, K, columns)


@pytest.mark.parametrize(
    ("tiles", "steps"), [(20, 128), (1, 3), (132, 7), (144, 256), (896, 128), (140, 1), (265, 9)]
)
def test_weight_gradients_split_the_tiles_of_the_last_round(tiles, steps):
    """Every step of every tile is computed once, by the arithmetic of the kernel's `_part`."""
    rest, per_part = by_items.split(tiles, steps, 132)
    parts = -(-steps // per_part)
    whole, seen = tiles - rest, set()
    for item in range(whole + rest * parts):
        if item < whole:
            tile, first, end = item, 0, steps
        else:
            part, tile = divmod(item - whole, rest)
            tile, first = whole + tile, part * per_part
            end = min(first + per_part, steps)
        assert first < end
        new = {(tile, step) for step in range(first, end)}
        assert not seen & new
        seen |= new
    assert len(seen) == tiles * steps
    assert rest * parts <= 132 or not rest


def test_few_tiles_are_cut_to_fill_the_last_round(monkeypatch):
    """8192 x 640 outputs on 132 multiprocessors: one round of 320 tokens, not two of 256."""
    monkeypatch.setattr(gluon_tilings, "num_sms", lambda device: 132)
    monkeypatch.setattr(tilings, "num_sms", lambda device: 132)
    few = tilings.tiling_for.__wrapped__(case("forward", 8192, 2560, 640, 64, 2))
    assert (few.path, few.BM) == ("gluon", 320)
    assert few.otherwise.path == "descriptors"
    narrow = tilings.tiling_for.__wrapped__(case("grad_input", 8192, 640, 2560, 64, 2))
    assert (narrow.path, narrow.BN) == ("gluon", 320)
    few_blocks = case("grad_input", 8192, 640, 2560, 64, 2, density=0.1)
    assert tilings.tiling_for.__wrapped__(few_blocks).path == "descriptors"


def test_gluon_takes_the_weight_gradients_that_it_was_measured_to_win(monkeypatch):
    monkeypatch.setattr(gluon_tilings, "num_sms", lambda device: 132)
    monkeypatch.setattr(tilings, "num_sms", lambda device: 132)

    def path(N, inp, out, B, G=1, density=0.5):
        found = case("grad_values", N, inp, out, B, G, density=density)
        return tilings.tiling_for.__wrapped__(found).path

    def by_gluon(*sizes):
        return path(*sizes) == "gluon"

    assert by_gluon(65536, 640, 2560, 64, 2)
    assert by_gluon(8192, 14336, 4096, 32, 4, 0.25)
    for B, G in ((128, 1), (64, 2), (32, 4)):
        assert path(8192, 4096, 14336, B, G) == "gluon streamed"
    assert path(8192, 14336, 4096, 128) == "descriptors"
    assert path(8192, 14336, 4096, 16, 8, 0.25) == "gluon packed"
    assert path(65536, 640, 2560, 16, 8) == "gluon"  # a copy of x is too large
    assert path(65536, 2560, 640, 16, 8) == "pointers"
    assert by_gluon(8192, 4096, 14336, 64, 1)
    assert by_gluon(65536, 2560, 640, 64, 1)
    assert not by_gluon(65536, 2560, 640, 64, 1, 0.25)
    assert not by_gluon(8192, 640, 2560, 64, 2)


def test_a_new_number_of_tokens_needs_no_new_kernel():
    found = {
        tilings.tiling_for(case("forward", N, 640, 2560, 128)) for N in range(20000, 60000, 999)
    }
    assert len(found) == 1


@pytest.mark.parametrize(("current", "switched"), [(1, []), (0, [1])])
def test_launches_on_the_operands_device(monkeypatch, current, switched):
    seen = []

    class Operand:
        is_cuda = True
        device = torch.device("cuda", 1)

    @contextlib.contextmanager
    def fake_device(device):
        seen.append(device.index)
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", fake_device)
    assert device_module.on_its_device(lambda t, n: n + 1)(Operand(), 2) == 3
    assert seen == switched
