"""What a run says of its speed and its time, by a clock that a test moves."""

import jax
import numpy as np
import pytest

from terramind_jax.train import meter

WORK = {"tokens": 1000, "samples": 10, "flops": 6.0, "peak": 12.0}


class Log:
    """A writer that remembers."""

    def __init__(self):
        self.lines = []

    def write(self, step, scalars):
        self.lines.append((step, scalars))

    def advance(self, step, shown):
        self.shown = shown


@pytest.fixture
def clock(monkeypatch):
    """Seconds that both clocks show; ``clock(3)`` moves them on."""
    now = [1000.0]
    monkeypatch.setattr(meter.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(meter.time, "time", lambda: now[0])

    def move(seconds: float) -> float:
        now[0] += seconds
        return now[0]

    return move


def metrics(skipped: int = 0, bad: int = 0, overflow: int = 0) -> dict:
    return {"loss": np.float32(2.0), "skipped": np.int32(skipped), "bad": np.int32(bad), "overflow": np.int32(overflow)}


def make(kept=(), log_every: int = 4, **settings) -> meter.Meter:
    return meter.Meter(Log(), ("bad", "overflow"), dict(kept), log_every=log_every, work=WORK, **settings)


def test_a_steps_time_is_split_into_data_checkpoint_and_the_rest(clock):
    m = make()
    for step in range(1, 9):
        clock(3 if step == 5 else 0.5)  # the data of one step is late
        m.add(step, metrics(), 3 if step == 5 else 0.5)
        clock(1.5)
        if step == 6:
            with m.aside(saving=True):
                clock(4)
        if step == 7:
            with m.aside():
                clock(100)  # a validation counts as neither
    m.flush()
    (step, first), (_, second) = m._writer.lines
    # Step 1 has compiled; the clock runs from the second, and a step's metrics are read when the next one is under way.
    assert step == 4 and first["step_seconds"] == pytest.approx((2 + 2 + 4.5) / 3)
    assert first["data_wait"] == pytest.approx((0.5 + 0.5 + 3) / 8.5) and first["checkpoint_block"] == 0
    assert second["step_seconds"] == pytest.approx((2 + 1.5 + 2 + 2) / 4)
    assert second["data_wait"] == pytest.approx(1.5 / 11.5) and second["checkpoint_block"] == pytest.approx(4 / 11.5)
    assert second["tokens_per_second"] == pytest.approx(4000 / 7.5) and second["mfu"] == pytest.approx(0.5 * 4 / 7.5)


def test_no_share_of_the_time_is_ever_above_one(clock):
    rng, m = np.random.default_rng(0), make(log_every=1)
    for step in range(1, 50):
        waited = float(rng.exponential())
        clock(waited)
        m.add(step, metrics(), waited)
        clock(float(rng.exponential()) / 10)
        if step % 7 == 0:
            with m.aside(saving=True):
                clock(float(rng.exponential()))
    for _, line in m._writer.lines[1:]:
        assert 0 <= line["data_wait"] and 0 <= line["checkpoint_block"] and line["data_wait"] + line["checkpoint_block"] <= 1 + 1e-9
        assert 0 <= line["goodput"] <= 1


def run(m: meter.Meter, clock, steps: range, skipped=()) -> None:
    """Steps of two seconds, a quarter of it waiting for data."""
    total = 0
    for step in steps:
        clock(0.5)
        total += step in skipped
        m.add(step, metrics(skipped=total), 0.5)
        clock(1.5)
    m.flush()


def test_goodput_counts_from_the_first_start_and_only_steps_that_still_count(clock):
    first = make()
    run(first, clock, range(1, 12))
    kept = first.counters()
    assert first.last["goodput"] == pytest.approx(10 * 1.5 / 22, rel=0.1)
    run(first, clock, range(12, 20))  # these are lost: the process is killed
    clock(60)
    second = make(kept)
    run(second, clock, range(12, 20))
    assert second.counters()["began"] == kept["began"]
    assert second.last["goodput"] == pytest.approx((10 + 7) * 1.5 / (22 + 16 + 60 + 16), rel=0.1)


def test_what_is_skipped_or_gone_back_on_is_no_goodput(clock):
    m = make()
    run(m, clock, range(1, 12))
    productive = m.counters()["productive_seconds"]
    run(m, clock, range(12, 18), skipped=range(15, 18))
    assert m.streak == 3
    m.rewound()
    assert (m.streak, m.rewinds, m.counters()["productive_seconds"]) == (0, 1, productive)
    assert make(m.counters()).rewinds == 1


def test_a_streak_is_of_steps_in_a_row():
    m, streaks = make(skipped=2), []
    for step, skipped in enumerate((3, 4, 4, 5), 1):
        m.add(step, metrics(skipped=skipped), 0.0)
        m.flush()
        streaks.append(m.streak)
    assert streaks == [1, 2, 0, 1]


def test_totals_go_on_and_the_bar_shows_what_is_wrong():
    m = make({"bad": 5.0, "overflow": 7}, log_every=1, samples=100)
    m.add(1, metrics(bad=2), 0.0)
    m.flush()
    assert (m.last["bad"], m.last["overflow"], m.last["samples"]) == (7, 7, 110)
    assert m.counters()["bad"] == 7
    assert m._writer.shown == {"loss": "2.0000", "bad": "7", "overflow": "7"}


def test_too_many_bad_samples_are_an_error_with_the_reasons():
    m = make(max_bad_fraction=0.1, reasons=lambda: "s7 is no zip file.")
    message = r"^10 % of the samples of the last 100 steps, to step 11, could not be read, more than .*=0\.1: s7 is no zip file\.$"
    with pytest.raises(ValueError, match=message):
        for step in range(1, 20):
            m.add(step, metrics(bad=10), 0.0)
    assert make()._max_bad == np.inf


def test_memory_is_the_most_that_a_device_of_this_process_held(monkeypatch):
    class Device:
        def __init__(self, peak):
            self._peak = peak

        def memory_stats(self):
            return self._peak and {"peak_bytes_in_use": self._peak}

    assert meter._memory() == {}  # CPUs do not tell
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(3), Device(None), Device(7)])
    assert meter._memory() == {"memory_bytes": 7}
