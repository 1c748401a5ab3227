"""How the bench measures: order, statistics, patience with slow rivals, ceilings."""

import gc
import math

import pytest
import torch

from fastllm import dispatch
from fastllm.bench import timing


def test_spread_and_ratios():
    assert timing.Spread.of([1.0]) == timing.Spread(1.0, 1.0, 1.0)
    assert timing.Spread.of([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == timing.Spread(2.0, 3.5, 5.0)
    paired = timing.ratios(rival=[2.0, 30.0, 4.0], ours=[1.0, 10.0, 1.0])
    assert paired.median == 3.0  # not the ratio of the medians, which is 4
    assert timing.quantile([0.0, 10.0], 0.25) == 2.5


def test_noise_and_ties():
    quiet = timing.noise([1.0] * 9, [1.0] * 9)
    assert quiet == 0.0
    assert timing.noise([1.0, 1.0, 1.0], [2.0, 2.0, 2.0]) == pytest.approx(math.log(2))
    assert timing.noise([1.0, 1.0, 1.0], [0.5, 0.5, 0.5]) == pytest.approx(math.log(2))
    assert timing.is_tie(timing.Spread(1.01, 1.02, 1.03), noise=0.05)
    assert timing.is_tie(timing.Spread(0.9, 1.2, 1.4), noise=0.05)
    assert not timing.is_tie(timing.Spread(1.1, 1.2, 1.3), noise=0.05)
    assert not timing.is_tie(timing.Spread(0.7, 0.8, 0.9), noise=0.05)


def test_rounds_are_interleaved_in_alternating_order(monkeypatch):
    monkeypatch.setattr(timing.Foreign, "share", lambda self: 0.0)
    clock = iter(range(10**6))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    order, collecting = [], []

    def call(name):
        def function():
            order.append(name)
            collecting.append(gc.isenabled())

        return function

    samples, foreign = timing.interleave({name: call(name) for name in "abc"}, rounds=3, block_s=1.0)
    assert "".join(order[:6]) == "aabbcc"  # warm-up, and how long one call takes
    assert "".join(order[6:]) == "abc" + "cba" + "abc"
    assert not any(collecting[6:]) and gc.isenabled()
    assert samples == {name: [1.0] * 3 for name in "abc"} and foreign == [0.0] * 3


def test_a_block_holds_as_many_calls_as_fill_it(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing.Foreign, "share", lambda self: 0.0)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    calls = {"slow": 0, "brief": 0}

    def call(name, seconds):
        def function():
            calls[name] += 1
            now[0] += seconds

        return function

    samples, _ = timing.interleave({"slow": call("slow", 1.0), "brief": call("brief", 0.25)}, rounds=2, block_s=1.0)
    assert calls == {"slow": 2 + 2, "brief": 4 + 2 * (1 + 4)}  # a brief one also runs once before the clock starts
    assert samples == {"slow": [1.0, 1.0], "brief": [0.25, 0.25]}


def slow_clock(monkeypatch, **seconds):
    """Contenders that take as long as is said, on a clock that only they move; and how often each was called."""
    now, calls = [0.0], dict.fromkeys(seconds, 0)
    monkeypatch.setattr(timing.Foreign, "share", lambda self: 0.0)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def call(name):
        def function(*inputs):
            calls[name] += 1
            now[0] += seconds[name]

        return function

    return {name: call(name) for name in seconds}, calls


def test_patience_bounds_what_a_slow_contender_costs(monkeypatch):
    contenders, calls = slow_clock(monkeypatch, ours=0.25, slow=0.5, slower=1.5, endless=60.0)
    samples, _ = timing.interleave(contenders, rounds=8, block_s=0.25, patience_s=2.0)
    assert {name: len(found) for name, found in samples.items()} == {"ours": 8, "slow": 4, "slower": 1, "endless": 1}
    assert calls == {"ours": 2 + 8, "slow": 2 + 4, "slower": 2 + 1, "endless": 1}  # the first call is the only one
    assert samples["endless"] == [60.0]
    assert timing.ratios(samples["endless"], samples["ours"]) == timing.Spread(240.0, 240.0, 240.0)
    assert timing.ratios(samples["slow"], samples["ours"]).median == 2.0
    assert timing.ratios(samples["ours"], samples["slow"]).median == 0.5


def test_a_slow_contender_keeps_its_rounds_on_a_busy_machine(monkeypatch):
    contenders, _ = slow_clock(monkeypatch, ours=0.1, slow=0.5)
    shares = iter([0.0, 0.5, 0.0, 0.5] + [0.0] * 100)  # of the first two rounds
    monkeypatch.setattr(timing.Foreign, "share", lambda self: next(shares))
    samples, foreign = timing.interleave(contenders, rounds=5, block_s=0.1, patience_s=1.0)
    assert len(samples["ours"]) == 5 == len(foreign) and len(samples["slow"]) == 2  # of rounds that did not count


def test_products_grow_until_one_is_long_enough(monkeypatch):
    sizes = []

    def best(call, seconds):
        n = call.args[0].shape[0]
        sizes.append(n)
        return n**3 * 2e-10  # 10 GFLOP/s

    monkeypatch.setattr(timing, "_best", best)
    assert timing.product_rate(torch.float32) == pytest.approx(1e10)
    assert max(sizes) == 1024  # 0.2 s
    monkeypatch.setattr(timing, "_best", lambda call, seconds: sizes.append(call.args[0].shape[0]) or 1e-6)
    timing.product_rate(torch.float32)
    assert max(sizes) == timing.LARGEST


def test_disturbed_rounds_are_measured_again(monkeypatch):
    shares = iter([0.0, 0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0])  # looked at before and after each round
    monkeypatch.setattr(timing.Foreign, "share", lambda self: next(shares))
    samples, foreign = timing.interleave({"a": lambda: None}, rounds=3, block_s=1e-6)
    assert len(samples["a"]) == 3 and foreign == [0.0] * 3


def test_a_busy_machine_still_gives_an_answer(monkeypatch):
    monkeypatch.setattr(timing.Foreign, "share", lambda self: 0.9)
    samples, foreign = timing.interleave({"a": lambda: None}, rounds=2, block_s=1e-6)
    assert len(samples["a"]) == 6 and foreign == [0.9] * 6


def test_foreign_share_is_a_share():
    foreign = timing.Foreign()
    sum(i * i for i in range(200_000))
    assert 0.0 <= foreign.share() <= 1.0


def test_cold_calls_find_the_caches_emptied(monkeypatch):
    monkeypatch.setattr(timing.Foreign, "share", lambda self: 0.0)
    done = []
    samples, _ = timing.interleave({"a": lambda: done.append("a")}, 2, 1.0, evict=lambda: done.append("evict"))
    calls = "".join(done).replace("evict", "e")
    assert calls.lstrip("a") == "ea" * (2 * timing.COLD) and len(samples["a"]) == 2
    assert timing.last_level_cache() >= 1 << 16
    evict = timing.evictor()
    assert evict().nbytes >= 2 * timing.last_level_cache()


def test_inputs_are_taken_in_turn():
    turn = timing.in_turn([lambda: 1, lambda: 2])
    assert [turn() for _ in range(5)] == [1, 2, 1, 2, 1]
    assert timing.read_of(4000, sets=2)() == 1000 and timing.copy_of(4000)().nbytes == 2000


def test_ceilings_are_measured(monkeypatch):
    monkeypatch.setattr(timing, "_best", lambda function, seconds: 1e-3)
    found = timing.ceilings()
    assert found["copy_gb_per_s"] == found["read_gb_per_s"] == pytest.approx((256 << 20) / 1e-3 / 1e9)
    assert {"mm_float32_highest_gflop_per_s", "mm_float32_medium_gflop_per_s", "mm_bfloat16_gflop_per_s"} <= set(found)
    if dispatch.extension:
        assert found["fma_float32_gflop_per_s"] > 0 and found["fma_bfloat16_gflop_per_s"] > 0
        assert dispatch.extension.multiply_adds(10) % (2 * 12 * 10) == 0  # whole rounds of every sum, on every thread
    rates = {
        "copy_gb_per_s": 900,
        "mm_float32_gflop_per_s": 5,
        "fma_float32_gflop_per_s": 7,
        "mm_bfloat16_gflop_per_s": 11,
    }
    assert timing.peak_gflop_per_s(rates, torch.float32) == 7
    assert timing.peak_gflop_per_s(rates, torch.bfloat16) == 11
    rates["mm_bfloat16_gflop_per_s"] = 0.3  # no kernel of its own: 16-bit numbers can be widened
    assert timing.peak_gflop_per_s(rates, torch.bfloat16) == 7
