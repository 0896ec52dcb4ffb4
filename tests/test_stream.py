"""The stream: which samples come when, over ranks, micro-batches, workers, epochs and resumed runs."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from higgs.batch import BatchFeature
from higgs.data.draws import Draw, Mixer, Source, read_sources
from higgs.data.stream import DataConfig, Rows, StepBatch, Stream, Unreadable, once
from higgs.errors import UserError
from higgs.labels import IGNORE


class Numbers:
    """A dataset whose batches say which draws they were made of; some samples are too long, others cannot be read."""

    in_tokens, digest = True, "numbers"

    def __init__(self, sizes: Sequence[int], weights: Sequence[float | None] | None = None, long: Sequence[int] = ()):
        self.sizes, self.weights, self.long = sizes, weights or [None] * len(sizes), set(long)
        self.broken: set[int] = set()

    def length(self, sample: int) -> int:
        return 1000 if sample in self.long else 5 + (sample * 7) % 20

    def id(self, sample: int) -> str:
        return f"s{sample}"

    def collate(self, rows: Sequence[Sequence[Draw]], seed: int | None, row_length: int | None) -> Rows:
        draws = [draw for row in rows for draw in row]
        unreadable = [Unreadable(self.id(draw.sample), "broken") for draw in draws if draw.sample in self.broken]
        if row_length is not None:
            assert all(sum(self.length(draw.sample) for draw in row) <= row_length for row in rows)
        table = torch.tensor([[draw.number, draw.sample] for draw in draws])
        width = row_length or max(self.length(draw.sample) for draw in draws)
        batch = BatchFeature(
            input_ids=torch.zeros(len(rows), width),
            rows=torch.tensor([len(row) for row in rows]),
            **dict.fromkeys(("draws", "labels", "audio_labels"), table),
        )
        return Rows(batch, [self.id(draw.sample) for draw in draws], unreadable)


class Crops(Numbers):
    in_tokens = False

    def length(self, sample: int) -> int:
        return 1


def config(**changes) -> DataConfig:
    return DataConfig(**{"train": "unused", "batch_size": 4, "row_length": 60, "bucket_batches": 3, **changes})


def draws_of(batch: StepBatch) -> list[tuple[int, int]]:
    return [tuple(pair) for micro in batch.micro for pair in micro["draws"].tolist()]


def steps_of(stream: Stream, count: int) -> list[list[tuple[int, int]]]:
    return [draws_of(batch) for batch in islice(stream, count)]


SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=3)
KINDS = st.sampled_from([(Numbers, "bucket"), (Numbers, "pack"), (Crops, "bucket")])
SPLITS = st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (1, 4)])


@given(sizes=SIZES, kind=KINDS, split=SPLITS, seed=st.integers(0, 5))
def test_ranks_and_micro_batches_share_a_step_without_overlap_or_loss(sizes, kind, split, seed) -> None:
    make, layout = kind
    ranks, accumulate = split
    whole = steps_of(Stream(make(sizes), config(layout=layout), seed=seed), 8)
    parts = [
        Stream(make(sizes), config(layout=layout), seed=seed, rank=rank, size=ranks, accumulate=accumulate)
        for rank in range(ranks)
    ]
    for step in whole:
        batches = [next(part) for part in parts]
        assert {len(batch.micro) for batch in batches} == {accumulate}
        assert {batch.samples for batch in batches} == {len(step)}
        assert sorted(pair for batch in batches for pair in draws_of(batch)) == sorted(step)
        assert [len(batch.ids) for batch in batches] == [len(draws_of(batch)) for batch in batches]
        rows = {len(micro["rows"]) for batch in batches for micro in batch.micro}
        assert rows == {4 // (ranks * accumulate)}
    assert len({json.dumps(part.state_dict()) for part in parts}) == 1


@given(sizes=SIZES, kind=KINDS, before=st.integers(0, 11), splits=st.tuples(SPLITS, SPLITS), seed=st.integers(0, 5))
def test_a_resumed_stream_goes_on_with_the_very_next_sample(sizes, kind, before, splits, seed) -> None:
    make, layout = kind
    long = range(0, sum(sizes), 4) if make is Numbers and min(sizes) > 1 else ()
    settings_of = config(layout=layout, max_unreadable=1.0)
    expected = steps_of(Stream(make(sizes, long=long), settings_of, seed=seed), before + 9)[before:]

    def ranks_of(split: tuple[int, int]) -> list[Stream]:
        ranks, accumulate = split
        return [
            Stream(make(sizes, long=long), settings_of, seed=seed, rank=rank, size=ranks, accumulate=accumulate)
            for rank in range(ranks)
        ]

    first, then = map(ranks_of, splits)
    for stream in first:
        list(islice(stream, before))
    state = json.loads(json.dumps(first[0].state_dict()))
    for stream in then:
        stream.load_state_dict(state)
        assert stream.state_dict() == state
    for step in expected:
        assert sorted(pair for stream in then for pair in draws_of(next(stream))) == sorted(step)


@given(sizes=SIZES, kind=KINDS, seed=st.integers(0, 5))
def test_every_sample_comes_once_an_epoch(sizes, kind, seed) -> None:
    make, layout = kind
    total = sum(sizes)
    seen: dict[int, int] = {}
    stream = Stream(make(sizes), config(layout=layout), seed=seed)
    # Packing holds back at most an epoch, a bucket window ends within one.
    while len(seen) < 5 * total:
        for number, sample in draws_of(next(stream)):
            assert number not in seen, "no draw comes twice"
            seen[number] = sample
    for epoch in range(3):
        drawn = [seen[number] for number in range(epoch * total, (epoch + 1) * total)]
        assert sorted(drawn) == list(range(total)), "without weights, all sources end their epochs together"


def test_orders_differ_between_epochs_sources_and_seeds() -> None:
    def order(seed: int, epoch: int, source: int = 0) -> list[int]:
        mixer = Mixer([20, 20], [None, None], seed)
        drawn = [mixer.next().sample for _ in range(40 * (epoch + 1))][-40:]
        return [sample % 20 for sample in drawn if sample // 20 == source]

    orders = [order(0, 0), order(0, 1), order(1, 0), order(0, 0, source=1), list(range(20))]
    assert len({tuple(one) for one in orders}) == len(orders)
    assert order(0, 1) == order(0, 1)


@given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=4),
    weights=st.lists(st.sampled_from([0.1, 0.25, 1, 1.5, 3, 10]), min_size=4, max_size=4),
)
def test_sources_are_mixed_by_weight_at_every_point(sizes, weights) -> None:
    weights = weights[: len(sizes)]
    mixer = Mixer(sizes, weights, seed=0)
    ends = [sum(sizes[: source + 1]) for source in range(len(sizes))]
    counts: Counter[int] = Counter()
    for drawn in range(1, 200):
        sample = mixer.next().sample
        counts[next(source for source, end in enumerate(ends) if sample < end)] += 1
        for source, weight in enumerate(weights):
            assert abs(counts[source] - drawn * weight / sum(weights)) < len(sizes) - 1 + 1e-9


@pytest.mark.parametrize(("make", "layout"), [(Numbers, "bucket"), (Numbers, "pack"), (Crops, "bucket")])
def test_workers_change_nothing(make, layout) -> None:
    """Neither the batches, nor the position, nor the global random numbers, which a resumed run needs as they were."""
    here = Stream(make([17, 9]), config(layout=layout), seed=3, size=2, rank=1)
    there = Stream(make([17, 9]), config(layout=layout, workers=2), seed=3, size=2, rank=1)
    torch.manual_seed(0)
    for _ in range(5):
        ours, theirs = next(here), next(there)
        assert draws_of(ours) == draws_of(theirs)
        assert (ours.ids, ours.samples) == (theirs.ids, theirs.samples)
        assert here.state_dict() == there.state_dict(), "the position counts what was handed out, not what was loaded"
    resumed = Stream(make([17, 9]), config(layout=layout, workers=1), seed=3, size=2, rank=1)
    resumed.load_state_dict(there.state_dict())
    assert steps_of(resumed, 3) == steps_of(here, 3)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(1))


SIGNALLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from test_stream import Numbers, Stream, config, steps_of
stream = Stream(Numbers([40]), config(workers=2), seed=0)
steps = steps_of(stream, 2)
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
print("ready", flush=True)
while not asked:
    pass
steps += steps_of(stream, 30)
assert steps == steps_of(Stream(Numbers([40]), config(), seed=0), 32)
print("done", flush=True)
raise RuntimeError("ends with its loaders at work")
"""


def test_a_signal_to_all_processes_leaves_the_loaders_to_the_main_one() -> None:
    """As SLURM and torchrun send it: the main process finishes its step and saves, for which it needs its loaders."""
    command = [sys.executable, "-c", SIGNALLED, str(Path(__file__).parent)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout.readline() == "ready\n"
        os.killpg(process.pid, signal.SIGTERM)
        assert process.stdout.readline() == "done\n"
        started = time.monotonic()
        _, said = process.communicate(timeout=30)
        assert said.rstrip().endswith("ends with its loaders at work")
        assert time.monotonic() - started < 4, "nothing waits for the loaders"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_mistake_in_a_worker_stays_one_sentence() -> None:
    class Broken(Numbers):
        def collate(self, *_) -> Rows:
            raise UserError("This is wrong; do that.")

    for workers in (0, 1):
        with pytest.raises(UserError, match=r"^This is wrong; do that\.$"):
            next(Stream(Broken([8]), config(workers=workers), seed=0))


@pytest.mark.parametrize("layout", ["bucket", "pack"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_too_long_samples_are_reported_by_one_rank_and_others_come_instead(layout, ranks) -> None:
    streams = [
        Stream(Numbers([40], long=[3, 11, 12]), config(layout=layout, max_unreadable=0.2), seed=0, rank=r, size=ranks)
        for r in range(ranks)
    ]
    reported, seen = [], []
    for _ in range(21):  # seven windows of three steps
        for stream in streams:
            batch = next(stream)
            reported += [one.id for one in batch.unreadable]
            seen += [sample for _, sample in draws_of(batch)]
    mixer = Mixer([40], [None], seed=0)
    drawn = [mixer.next().sample for _ in range(sum(streams[0].state_dict()["planner"]["counts"]))]
    assert len(drawn) > 80
    assert sorted(reported) == sorted(f"s{sample}" for sample in drawn if sample in (3, 11, 12))
    assert not {3, 11, 12} & set(seen)


def test_too_many_too_long_samples_end_the_run_on_every_rank_at_once() -> None:
    for layout in ("bucket", "pack"):
        for rank in range(2):
            stream = Stream(
                Numbers([40], long=range(0, 40, 4)),
                config(layout=layout, max_unreadable=0.1),
                seed=0,
                rank=rank,
                size=2,
            )
            with pytest.raises(UserError, match=r"10 of 40|\d+ of \d+ samples could not be used"):
                list(islice(stream, 20))


def test_too_many_broken_samples_end_the_run_but_not_among_the_first_twenty() -> None:
    dataset = Crops([100])
    dataset.broken = set(range(50))
    stream = Stream(dataset, config(max_unreadable=0.2), seed=0)
    list(islice(stream, 3))
    with pytest.raises(UserError, match=r"max_unreadable=0\.2 allows\. The last: s"):
        list(islice(stream, 20))


@pytest.mark.parametrize("layout", ["bucket", "pack"])
@pytest.mark.parametrize(("ranks", "accumulate"), [(1, 1), (2, 1), (4, 1), (2, 2), (8, 1)])
def test_validation_sees_every_sample_once_and_keeps_ranks_in_step(layout, ranks, accumulate) -> None:
    dataset = Numbers([11, 6], long=[4])
    runs = [
        list(once(dataset, config(layout=layout), rank=rank, size=ranks, accumulate=accumulate))
        for rank in range(ranks)
    ]
    assert len({len(run) for run in runs}) == 1
    assert all(len(batch.micro) == 1 for run in runs for batch in run)
    learnt, reported = [], []
    for batch in (batch for run in runs for batch in run):
        reported += [one.id for one in batch.unreadable]
        (micro,) = batch.micro
        if batch.ids:
            learnt += [sample for _, sample in draws_of(batch)]
            assert torch.equal(micro["labels"], micro["draws"])
        else:
            assert (micro["labels"] == IGNORE).all() and (micro["audio_labels"] == IGNORE).all()
    assert sorted(learnt) == [sample for sample in range(17) if sample != 4]
    assert reported == ["s4"]
    again = list(once(dataset, config(layout=layout, workers=1), rank=0, size=ranks, accumulate=accumulate))
    assert list(map(draws_of, again)) == list(map(draws_of, runs[0]))


def test_buckets_pad_little_and_packing_fills_rows() -> None:
    def padding(bucket_batches: int) -> float:
        stream = Stream(Numbers([500]), config(bucket_batches=bucket_batches), seed=0)
        lengths = [[Numbers([500]).length(sample) for _, sample in step] for step in steps_of(stream, 64)]
        return 1 - sum(map(sum, lengths)) / sum(4 * max(step) for step in lengths)

    assert padding(16) < 0.2 * padding(1)
    stream = Stream(Numbers([500]), config(layout="pack", row_length=100), seed=0)
    for batch in islice(stream, 32):
        tokens = sum(Numbers([500]).length(sample) for _, sample in draws_of(batch))
        assert batch.fill == tokens / (4 * 100) > 0.95


@settings(max_examples=20)
@given(size=st.integers(1, 12), batches=st.integers(1, 40))
def test_a_small_source_does_not_fill_a_step_with_copies(size, batches) -> None:
    stream = Stream(Numbers([size]), config(batch_size=2, bucket_batches=batches), seed=0)
    for step in steps_of(stream, 10):
        if size >= 4:
            assert max(Counter(sample for _, sample in step).values()) <= 2
    assert len({sample for step in steps_of(stream, 3 * size) for _, sample in step}) == size


def test_positions_of_other_data_are_refused() -> None:
    def stream(make=Numbers, sizes=(20,), seed=0, digest="numbers", weights=None, **changes) -> Stream:
        dataset = make(sizes, weights)
        dataset.digest = digest
        return Stream(dataset, config(**changes), seed=seed)

    state = stream().state_dict()
    for changes, said in (
        ({"sizes": [21]}, "data.train holds other samples"),
        ({"sizes": [10, 10]}, "data.train holds other samples"),
        ({"digest": "others"}, "data.train holds other samples"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"layout": "pack"}, "data.layout was bucket and is pack"),
        ({"row_length": 70}, "data.row_length was 60 and is 70"),
        ({"batch_size": 8}, "data.batch_size was 4 and is 8"),
        ({"bucket_batches": 2}, "data.bucket_batches was 3 and is 2"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            stream(**changes).load_state_dict(state)
    for workers in (0, 1):
        stream(workers=workers, weights=[2.0], max_unreadable=0.5).load_state_dict(state)
    # Where steps are not sorted together, a position is a number of draws, and steps may change their size.
    for changes in ({"make": Crops}, {"layout": "pack"}):
        stream(**changes, batch_size=8).load_state_dict(stream(**changes).state_dict())


def test_mistakes_in_the_config_are_named() -> None:
    with pytest.raises(UserError, match="multiple of 6"):
        Stream(Numbers([8]), config(), seed=0, size=3, accumulate=2)
    with pytest.raises(UserError, match=r"holds no sample of at most data\.row_length=60"):
        Stream(Numbers([8, 2], long=[8, 9]), config(), seed=0)
    for changes in ({"layout": "rows"}, {"batch_size": 0}, {"workers": -1}, {"max_unreadable": 2}, {"crop_seconds": 0}):
        with pytest.raises(UserError, match=f"data.{next(iter(changes))}"):
            config(**changes)


def test_sources_are_read_in_every_form() -> None:
    assert read_sources("a.jsonl") == [Source("a.jsonl")]
    assert read_sources({"path": "a", "weight": 2}) == [Source("a", 2)]
    assert read_sources(["a", {"path": "b"}]) == [Source("a"), Source("b")]
    for bad in ([], None, "", [{"weight": 1.0}], [{"path": "a", "wieght": 1.0}], {"path": "a", "weight": 0}, 3):
        with pytest.raises(UserError, match=r"data\.train"):
            read_sources(bad)
    with pytest.raises(UserError, match="all or to none"):
        read_sources(["a", {"path": "b", "weight": 1.0}])
