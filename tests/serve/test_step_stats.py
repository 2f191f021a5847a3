"""credence.serve.step_stats: round trip, missing records, and every way the file can fail."""

import errno
import math
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from credence.serve.step_stats import StepStats, StepStatsError


def record(step: int, num_samples: int) -> tuple[int, float, float, float, float, float, list[float]]:
    return 7 * step, -0.5 - step, 2.0 + step, 1.5, 0.5 + step, 0.25, [-0.1 * k - step for k in range(num_samples)]


@pytest.mark.parametrize(("num_samples", "max_steps"), [(1, 1), (3, 5), (32, 2000), (300, 7)])
def test_records_written_by_the_worker_are_read_by_the_api_process(
    tmp_path: Path, num_samples: int, max_steps: int
) -> None:
    with (
        StepStats.create(tmp_path / "gang", num_samples, max_steps) as api,
        StepStats.open(tmp_path / "gang") as worker,
    ):
        assert (worker.num_samples, worker.max_steps) == (num_samples, max_steps)
        for step in range(max_steps):
            worker.write(step, *record(step, num_samples))
        table = api.read(max_steps)
        tail = api.read(max_steps, start=max_steps - 1)
    assert len(table) == max_steps and not table.missing.size
    for step in (0, max_steps // 2, max_steps - 1):
        token, log_prob, total, aleatoric, epistemic, ratio, members = record(step, num_samples)
        assert table.token_id[step] == token
        assert table.log_prob[step] == log_prob
        assert (table.total[step], table.aleatoric[step], table.epistemic[step]) == (total, aleatoric, epistemic)
        assert table.variation_ratio[step] == ratio
        assert table.member_log_probs[step].tolist() == members
    assert tail.token_id.tolist() == table.token_id[-1:].tolist()
    assert table.member_log_probs.dtype == np.float64 and table.log_prob.flags.writeable


@pytest.mark.parametrize(("num_samples", "num_top"), [(1, 1), (3, 5), (2, 1000)])
def test_the_most_likely_tokens_are_part_of_the_record(tmp_path: Path, num_samples: int, num_top: int) -> None:
    tokens = [[(7 * step + 1009 * rank) % 200_000 for rank in range(num_top)] for step in range(4)]
    log_probs = [[-0.25 * rank - step for rank in range(num_top)] for step in range(4)]
    tokens[3][-1], log_probs[3][-1] = -1, -math.inf  # a vocabulary smaller than the list
    with (
        StepStats.create(tmp_path / "gang", num_samples, 5, num_top) as api,
        StepStats.open(tmp_path / "gang") as worker,
    ):
        assert worker.num_top == num_top
        for step in (0, 1, 3):
            worker.write(
                step,
                *record(step, num_samples),
                -0.75,
                top_tokens=tokens[step],
                top_log_probs=log_probs[step],
                member_tokens=[100_000 + step + sample for sample in range(num_samples)],
                member_token_log_probs=[-0.5 * sample for sample in range(num_samples)],
            )
        table = api.read(4)
        tail = api.read(4, start=3)
    for step in (0, 1, 3):
        assert table.top_tokens[step].tolist() == tokens[step]
        assert table.top_log_probs[step].tolist() == log_probs[step]
        assert table.member_log_probs[step].tolist() == record(step, num_samples)[-1]
        assert table.calibrated_log_prob[step] == -0.75
        assert table.member_tokens[step].tolist() == [100_000 + step + sample for sample in range(num_samples)]
        assert table.member_token_log_probs[step].tolist() == [-0.5 * sample for sample in range(num_samples)]
    assert table.missing.tolist() == [2] and table.top_tokens[2].tolist() == [-1] * num_top
    assert table.member_tokens[2].tolist() == [-1] * num_samples
    assert table.top_tokens.dtype == np.int64
    assert tail.top_tokens.tolist() == [tokens[3]]


def test_files_without_top_lists_have_empty_columns(tmp_path: Path) -> None:
    with StepStats.create(tmp_path / "gang", 2, 3) as stats:
        stats.write(0, *record(0, 2))
        table = stats.read(3)
    assert table.top_tokens.shape == table.top_log_probs.shape == (3, 0)
    assert table.member_tokens.tolist() == [[-1, -1]] * 3


def test_the_waiting_time_is_unknown_until_it_is_written(tmp_path: Path) -> None:
    with StepStats.create(tmp_path / "gang", 2, 3) as api, StepStats.open(tmp_path / "gang") as scheduler:
        api.write(0, *record(0, 2))
        assert api.read_wait() is None
        scheduler.write_wait(0.125)
        assert api.read_wait() == 0.125
        scheduler.write_wait(0.0)
        assert api.read_wait() == 0.0
        assert (scheduler.num_samples, scheduler.max_steps) == (2, 3)
        assert api.read(1).token_id.tolist() == [0]
    with pytest.raises(StepStatsError, match="closed"):
        api.read_wait()
    with StepStats.open(tmp_path / "gang") as again:
        assert again.read_wait() == 0.0
        os.truncate(tmp_path / "gang", 8)
        with pytest.raises(StepStatsError, match="truncated"):
            again.read_wait()


def test_a_step_that_was_never_written_is_detected(tmp_path: Path) -> None:
    with StepStats.create(tmp_path / "gang", 2, 6) as stats:
        stats.write(0, *record(0, 2))
        stats.write(3, *record(3, 2))
        table = stats.read(5)
    assert table.token_id.tolist() == [0, -1, -1, 21, -1]
    assert table.missing.tolist() == [1, 2, 4]


def test_writing_a_step_again_replaces_it(tmp_path: Path) -> None:
    with StepStats.create(tmp_path / "gang", 2, 3) as stats:
        stats.write(1, *record(2, 2))
        stats.write(1, *record(1, 2))
        stats.write(1, *record(1, 2))
        assert stats.read(2).token_id.tolist() == [-1, 7]


def test_an_impossible_token_under_one_member_is_kept_as_minus_infinity(tmp_path: Path) -> None:
    with StepStats.create(tmp_path / "gang", 2, 1) as stats:
        stats.write(0, 1, -0.7, 1.0, 0.5, 0.5, 0.0, [-math.inf, -0.01])
        assert stats.read(1).member_log_probs[0].tolist() == [-math.inf, -0.01]


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1, got 0 and 4"):
        StepStats.create(tmp_path / "gang", 0, 4)
    for num_top in (-1, 1001):
        with pytest.raises(ValueError, match=f"num_top must be in 0..1000, got {num_top}"):
            StepStats.create(tmp_path / "gang", 1, 4, num_top)
    with StepStats.create(tmp_path / "top", 2, 4, 3) as stats:
        with pytest.raises(ValueError, match="needs 3 top tokens and log-probabilities, got 3 and 2"):
            stats.write(0, *record(0, 2), top_tokens=[1, 2, 3], top_log_probs=[0.0, 0.0])
        with pytest.raises(ValueError, match="needs 3 top tokens and log-probabilities, got 2 and 3"):
            stats.write(0, *record(0, 2), top_tokens=[1, 2], top_log_probs=[0.0, 0.0, 0.0])
    with StepStats.create(tmp_path / "gang", 2, 4) as stats:
        with pytest.raises(ValueError, match="needs 0 top tokens"):
            stats.write(0, *record(0, 2), top_tokens=[1], top_log_probs=[0.0])
        with pytest.raises(ValueError, match="2 member tokens and log-probabilities or none, got 3 and 2"):
            stats.write(
                0,
                *record(0, 2),
                member_tokens=[1, 2, 3],
                member_token_log_probs=[0.0, 0.0],
            )
        with pytest.raises(ValueError, match="step 4 is outside the 0..3"):
            stats.write(4, *record(4, 2))
        with pytest.raises(ValueError, match="2 member values, got 5 and 3"):
            stats.write(0, 5, 0.0, 0.0, 0.0, 0.0, 0.0, [0.0] * 3)
        with pytest.raises(ValueError, match="token id >= 0"):
            stats.write(0, -1, 0.0, 0.0, 0.0, 0.0, 0.0, [0.0] * 2)
        with pytest.raises(ValueError, match="not within the 0..4"):
            stats.read(5)


def test_create_refuses_an_existing_file_and_a_missing_folder(tmp_path: Path) -> None:
    StepStats.create(tmp_path / "gang", 1, 1).close()
    with pytest.raises(StepStatsError, match="File exists") as failure:
        StepStats.create(tmp_path / "gang", 1, 1)
    assert isinstance(failure.value, OSError) and failure.value.filename == str(tmp_path / "gang")
    with pytest.raises(StepStatsError, match="No such file"):
        StepStats.create(tmp_path / "none" / "gang", 1, 1)


def test_a_full_tmpfs_is_noticed_at_creation_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StepStatsError, match="cannot reserve 640032 bytes .*No space left") as failure:
        StepStats.create(tmp_path / "gang", 3, 5000)
    assert failure.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_a_file_the_system_does_not_let_grow_is_an_error_not_a_signal(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(StepStatsError, match="cannot reserve"):
            StepStats.create(tmp_path / "gang", 8, 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_every_block_is_reserved(tmp_path: Path) -> None:
    with StepStats.create(tmp_path / "gang", 8, 1000):
        status = (tmp_path / "gang").stat()
    assert status.st_blocks * 512 >= status.st_size > 8 * 14 * 1000
    assert status.st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "content", [b"", b"x" * 10, b"CRDSTEP2" + b"\0" * 24, b"CRDSTEP1" + b"\1\0\0\0" * 6, b"y" * 4096]
)
def test_open_refuses_what_is_no_statistics_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "gang").write_bytes(content)
    with pytest.raises(StepStatsError, match="statistics file"):
        StepStats.open(tmp_path / "gang")


def test_open_refuses_links_pipes_and_missing_files(tmp_path: Path) -> None:
    StepStats.create(tmp_path / "gang", 1, 1).close()
    (tmp_path / "link").symlink_to(tmp_path / "gang")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe", "none"):
        with pytest.raises(StepStatsError):
            StepStats.open(tmp_path / name)


def test_a_truncated_file_is_an_error_for_the_reader_and_never_kills_the_writer(tmp_path: Path) -> None:
    with StepStats.create(tmp_path / "gang", 2, 100) as api, StepStats.open(tmp_path / "gang") as worker:
        os.truncate(tmp_path / "gang", 40)
        with pytest.raises(StepStatsError, match="truncated"):
            api.read(100)
        worker.write(50, *record(50, 2))
        with pytest.raises(StepStatsError, match="not a complete"):
            StepStats.open(tmp_path / "gang")


def test_the_writer_goes_on_when_the_file_has_been_unlinked(tmp_path: Path) -> None:
    api = StepStats.create(tmp_path / "gang", 2, 4)
    with StepStats.open(tmp_path / "gang") as worker:
        api.unlink()
        api.unlink()
        worker.write(0, *record(0, 2))
        with pytest.raises(StepStatsError, match="closed"):
            api.read(1)
    with pytest.raises(StepStatsError, match="closed"):
        worker.write(1, *record(1, 2))


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = descriptors()
    for number in range(20):
        with StepStats.create(tmp_path / str(number), 1, 1), StepStats.open(tmp_path / str(number)):
            pass
        (tmp_path / str(number)).write_bytes(b"broken")
        with pytest.raises(StepStatsError):
            StepStats.open(tmp_path / str(number))
    assert descriptors() == before


def test_the_module_needs_neither_torch_nor_vllm() -> None:
    code = "import sys, credence.serve.step_stats; print(sorted({'torch', 'vllm'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
