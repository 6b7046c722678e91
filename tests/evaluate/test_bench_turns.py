import math
from types import SimpleNamespace

import pytest
import torch

from attnconv.evaluate.bench import memory as memory_module
from attnconv.evaluate.bench.cases import Case, Piece
from attnconv.evaluate.bench.clock import Stopwatch
from attnconv.evaluate.bench.guards import refusal
from attnconv.evaluate.bench.memory import ResidentPeak, SampledPeak, peak_meter
from attnconv.evaluate.bench.models import ModelRunner
from attnconv.evaluate.bench.turns import DecodeLane, Lane, take_turns

CPU = torch.device("cpu")


def case(measure="prefill", role="model", context=512, seconds=(1.0,), batch=1, cache_bytes=None, peak_bytes=None):
    return Case.measured(Piece(measure, context, batch), role, seconds, peak_bytes=peak_bytes, cache_bytes=cache_bytes)


class TestGuards:
    def refuse(self, piece, *earlier, positions=math.inf, limit=100.0, available=None):
        return refusal(piece, "model", earlier, positions=positions, limit=limit, available=available)

    def test_time_grows_with_the_square(self) -> None:
        earlier = case(context=512, seconds=(5.0,))
        assert self.refuse(Piece("prefill", 2048, 1), earlier) is None
        assert "80 s" in self.refuse(Piece("prefill", 2048, 1), earlier, limit=79)
        assert self.refuse(Piece("prefill", 2048, 2), earlier, limit=79) is None
        assert self.refuse(Piece("decode", 2048, 1), earlier, limit=79) is None
        assert refusal(Piece("prefill", 2048, 1), "base", [earlier], positions=9e9, limit=79, available=None) is None

    def test_time_follows_the_trend(self) -> None:
        piece = Piece("prefill", 8192, 1)

        def reason(first, second):
            earlier = [case(context=2048, seconds=(second,)), case(context=512, seconds=(first,))]
            return self.refuse(piece, *earlier, limit=1)

        # Linear: 40 s; quadratic 160 s, and never more than that; faster with length is not believed.
        assert "40 s" in reason(2.5, 10.0)
        assert "80 s" in reason(1.25, 10.0)
        assert "160 s" in reason(0.1, 10.0)
        assert "40 s" in reason(20.0, 10.0)

    def test_memory_grows_at_least_in_proportion(self) -> None:
        earlier = case(context=512, peak_bytes=2**30)
        piece = Piece("prefill", 2048, 1)
        assert self.refuse(piece, earlier, available=2**32) is None
        assert "at least 4.0 GiB" in self.refuse(piece, earlier, available=2**32 - 1)

    def test_longer_ones_are_not_tried(self) -> None:
        first = Case.left_out(Piece("prefill", 512, 1), "model", "out of memory")
        reason = self.refuse(Piece("prefill", 1024, 1), first)
        assert reason == "not tried, since 512 tokens were left out: out of memory"
        second = Case.left_out(Piece("prefill", 1024, 1), "model", reason)
        assert self.refuse(Piece("prefill", 2048, 1), first, second) == reason
        assert self.refuse(Piece("decode", 512, 1), first) == "out of memory"
        assert self.refuse(Piece("prefill", 256, 1), first) is None
        assert self.refuse(Piece("prefill", 1024, 4), first) is None

    def test_positions(self) -> None:
        assert self.refuse(Piece("prefill", 513, 1), positions=512) == "the model was made for 512 positions"
        assert self.refuse(Piece("prefill", 512, 1), positions=512) is None


class Fake(Lane):
    """Appends its name to a list, and fails from some turn on."""

    def __init__(self, role, log, *, fails_at=None, error=None) -> None:
        super().__init__(role)
        self.log, self.fails_at, self.error, self.turns = log, fails_at, error, 0

    def act(self) -> None:
        self.log.append(self.role)
        self.turns += 1
        if self.turns == self.fails_at:
            raise self.error


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 8 GiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 400000000000 bytes. Error code 12 (Cannot allocate memory)"
    ),
    MemoryError(),
]


class TestTurns:
    def test_models_take_turns(self) -> None:
        log = []
        lanes = [Fake("base", log), Fake("model", log)]
        take_turns(lanes, Stopwatch(CPU), repeats=3, limit=60)
        assert log == ["base", "model"] * 4
        assert [len(lane.seconds) for lane in lanes] == [3, 3]

    @pytest.mark.parametrize("error", OUT_OF_MEMORY)
    @pytest.mark.parametrize("fails_at", [1, 3])
    def test_memory_that_runs_out_leaves_one_out(self, error, fails_at) -> None:
        log = []
        lanes = [Fake("base", log, fails_at=fails_at, error=error), Fake("model", log)]
        take_turns(lanes, Stopwatch(CPU), repeats=4, limit=60)
        assert (log.count("base"), log.count("model")) == (fails_at, 5)
        base, model = (lane.case(Piece("prefill", 8, 1)) for lane in lanes)
        assert base.skipped.startswith("out of memory")
        assert base.median is None
        assert model.skipped is None
        if "20.00" in str(error):
            assert base.skipped == "out of memory when asking for 20.00 GiB"

    def test_torch_really_says_so(self) -> None:
        class Greedy(Fake):
            def act(self) -> None:
                torch.empty(2**50)

        lane = Greedy("model", [])
        take_turns([lane], Stopwatch(CPU), repeats=1, limit=60)
        assert lane.skipped == f"out of memory when asking for {2**52} bytes"

    def test_without_a_cache_there_is_no_decoding(self) -> None:
        class Forgetful:
            def forward(self, input_ids, past_key_values, use_cache):
                return SimpleNamespace(logits=torch.zeros(1, input_ids.shape[1], 5))

            __call__ = forward

        lane = DecodeLane("model", ModelRunner(Forgetful()), torch.arange(8)[None])
        take_turns([lane], Stopwatch(CPU), repeats=2, limit=60)
        assert lane.case(Piece("decode", 8, 1)).skipped == "the model returns no cache to continue from"

    def test_other_errors_are_raised(self) -> None:
        with pytest.raises(RuntimeError, match="shapes"):
            take_turns(
                [Fake("model", [], fails_at=1, error=RuntimeError("shapes differ"))], Stopwatch(CPU), repeats=1, limit=9
            )


class TestPeakMemory:
    SIZE = 200 * 2**20

    def work(self) -> None:
        torch.ones(self.SIZE // 4)
        torch.ones(self.SIZE // 8)

    @pytest.mark.parametrize("kind", [ResidentPeak, SampledPeak])
    def test_of_a_known_size(self, kind) -> None:
        if kind is ResidentPeak and not memory_module._keeps_high_water_mark():
            pytest.skip("the system keeps no high-water mark that can be reset")
        watch = Stopwatch(CPU)
        watch.meter = kind()
        for _ in range(2):
            assert self.SIZE * 0.9 < watch.read(self.work).peak_bytes < self.SIZE * 1.2
        assert watch.read(lambda: None).peak_bytes < self.SIZE * 0.1

    def test_what_is_there_already_does_not_count(self) -> None:
        held = torch.ones(self.SIZE // 4)
        assert Stopwatch(CPU).read(lambda: held.sum()).peak_bytes < self.SIZE * 0.1

    def test_the_thread_ends_with_the_action(self) -> None:
        watch = Stopwatch(CPU)
        watch.meter = SampledPeak()
        with pytest.raises(ValueError, match="stop"):
            watch.read(lambda: int("stop"))
        assert not watch.meter.thread.is_alive()

    def test_where_the_mark_cannot_be_reset(self, monkeypatch, tmp_path) -> None:
        memory_module._keeps_high_water_mark.cache_clear()
        monkeypatch.setattr(memory_module, "CLEAR", tmp_path / "missing" / "clear_refs")
        try:
            assert isinstance(peak_meter(CPU), SampledPeak)
        finally:
            memory_module._keeps_high_water_mark.cache_clear()
        assert peak_meter(torch.device("meta")) is None

    def test_of_a_gpu_is_what_torch_handed_out(self, monkeypatch) -> None:
        told = []
        device = torch.device("cuda", 0)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", told.append)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1700)
        meter = peak_meter(device)
        meter.start()
        assert told == [device]
        assert meter.stop() == 700

    def test_without_a_meter_there_is_a_note(self) -> None:
        found = case(peak_bytes=None)
        assert found.peak_bytes is None
        assert "cannot be measured" in found.note
