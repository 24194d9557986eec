"""What a kernel of ours is said to cost: how phases, blocks and resources add up, on every GPU of select's table."""

from __future__ import annotations

import pytest

KIB = 1024


@pytest.fixture
def us(dev, gpu):
    """The predicted time of `blocks` blocks of 128 threads that go through two phases, without the launch."""

    def cost(first, second=None, blocks=1, threads=128, shared=90 * KIB, dram=0.0) -> float:
        second = second or dev.select.Phase()
        return dev.select.kernel_us(blocks, threads, shared, dram, first, second, gpu) - gpu.node_us

    return cost


def asks(dev) -> dict:
    """A phase that is a microsecond or more of each resource."""
    return {
        "slots": dev.select.Phase(slots=20_000),
        "products": dev.select.Phase(products=5e7),
        "l1": dev.select.Phase(l1_bytes=1e6),
        "l2": dev.select.Phase(l2_bytes=1e6),
        "dram": dev.select.Phase(dram_bytes=1e6),
        "wait": dev.select.Phase(wait_us=5),
    }


@pytest.mark.parametrize("first", ["slots", "products", "l1", "l2", "dram", "wait"])
@pytest.mark.parametrize("second", ["slots", "products", "l1", "l2", "dram", "wait"])
def test_phases_of_one_block_add_up(dev, us, first, second) -> None:
    a, b = asks(dev)[first], asks(dev)[second]
    assert us(a, b) == pytest.approx(us(a) + us(b))


def test_what_two_blocks_of_an_sm_need_of_different_resources_overlaps(dev, gpu, us) -> None:
    """Two blocks take turns: one multiplies while the other stores. With one block there is nobody to take over."""
    multiply, store = asks(dev)["products"], dev.select.Phase(slots=20_000)
    two, one = (us(multiply, store, blocks=2 * gpu.sms, shared=shared) for shared in (20 * KIB, 90 * KIB))
    if dev.select.resident_blocks(128, 90 * KIB, gpu) == 1:
        assert two < one == pytest.approx(2 * us(multiply, store))
    assert two >= 2 * max(us(multiply), us(store, threads=256)) * (1 - 1e-9)


def test_blocks_come_in_rounds(dev, gpu, us) -> None:
    work = asks(dev)["products"]
    waves = [us(work, blocks=blocks, threads=256) for blocks in (1, gpu.sms, gpu.sms + 1, 2 * gpu.sms)]
    assert waves[0] == waves[1] < waves[2] == waves[3] == pytest.approx(2 * waves[0])


def test_one_warp_a_scheduler_issues_half_of_what_two_do(dev, us) -> None:
    work = asks(dev)["slots"]
    assert us(work, threads=128) == pytest.approx(2 * us(work, threads=256))
    assert us(work, threads=256) == pytest.approx(us(work, threads=512))


def test_no_kernel_beats_dram(dev, gpu, us) -> None:
    assert us(asks(dev)["wait"], dram=gpu.bandwidth) == pytest.approx(1e6)


@pytest.mark.parametrize(
    ("threads", "shared", "wanted"),
    [
        (128, 20 * KIB, {80: 2, 89: 2, 90: 2, 100: 2}),
        (128, 90 * KIB, {80: 1, 89: 1, 90: 2, 100: 2}),
        (128, 120 * KIB, {80: 1, 89: 1, 90: 1, 100: 1}),
        (256, 20 * KIB, {80: 1, 89: 1, 90: 1, 100: 1}),
    ],
)
def test_blocks_that_an_sm_holds(dev, gpu, threads, shared, wanted) -> None:
    assert dev.select.resident_blocks(threads, shared, gpu) == wanted[gpu.arch]


# Boost clocks of the datasheets, in GHz.
@pytest.mark.parametrize(("name", "boost"), [("A100", 1.41), ("L40S", 2.52), ("RTX 4090", 2.52), ("H100", 1.98)])
def test_clocks_are_those_of_the_datasheets_at_work(dev, name, boost) -> None:
    assert dev.select.clock_hz(dev.select.device(name)) == pytest.approx(boost * 1e9 * 0.8, rel=0.02)
