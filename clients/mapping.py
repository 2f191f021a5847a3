"""Many questions, some at once: in threads and in tasks, with a progress bar."""

import asyncio
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import TypeVar

from credence.clients.errors import CredenceError
from credence.clients.requests import MapOptions

DEFAULT_CONCURRENCY = 8

_QuestionT = TypeVar("_QuestionT")
_AnswerT = TypeVar("_AnswerT")


def map_in_threads(
    ask: Callable[[_QuestionT], _AnswerT],
    questions: Sequence[_QuestionT],
    options: MapOptions,
    *,
    return_errors: bool,
) -> list[_AnswerT | CredenceError]:
    """Ask in threads. After the first error no further question is begun; those under way are waited for.

    Args:
        ask: Asks one question.
        questions: All of them.
        options: Among others, those of the map.
        return_errors: Put an error in its answer's place.

    Returns:
        The answers, in the order of the questions.

    Raises:
        CredenceError: The first error that occurred, unless errors are returned.
        ValueError: concurrency is not a whole number of 1 or more.
    """

    answers: dict[int, _AnswerT | CredenceError] = {}
    waiting, lock = iter(range(len(questions))), threading.Lock()

    def take() -> int | None:
        with lock:
            return next(waiting, None)

    def begin_no_more() -> None:
        with lock:
            deque(waiting, maxlen=0)

    def answer(index: int) -> _AnswerT | CredenceError:
        try:
            return ask(questions[index])
        except CredenceError as error:
            error.add_note(f"question {index} of {len(questions)}")
            if return_errors:
                return error
            # Here, because the threads would take others before the caller's hears of it.
            begin_no_more()
            raise

    def work(advance: Callable[[], None]) -> None:
        while (index := take()) is not None:
            answers[index] = answer(index)
            advance()

    with _bar(len(questions), options.get("progress")) as advance, ThreadPoolExecutor(_concurrency(options)) as pool:
        workers = [pool.submit(work, advance) for _ in range(min(_concurrency(options), len(questions)))]
        try:
            for worker in as_completed(workers):
                worker.result()
        finally:
            begin_no_more()
    return [answers[index] for index in range(len(questions))]


async def map_in_tasks(
    ask: Callable[[_QuestionT], Awaitable[_AnswerT]],
    questions: Sequence[_QuestionT],
    options: MapOptions,
    *,
    return_errors: bool,
) -> list[_AnswerT | CredenceError]:
    """Ask in tasks; see `map_in_threads`. After the first error, or when cancelled, those under way are cancelled, too."""
    answers: dict[int, _AnswerT | CredenceError] = {}
    waiting = iter(range(len(questions)))

    async def answer(index: int) -> _AnswerT | CredenceError:
        try:
            return await ask(questions[index])
        except CredenceError as error:
            error.add_note(f"question {index} of {len(questions)}")
            if return_errors:
                return error
            raise

    async def work(advance: Callable[[], None]) -> None:
        for index in waiting:
            answers[index] = await answer(index)
            advance()

    with _bar(len(questions), options.get("progress")) as advance:
        tasks = [asyncio.create_task(work(advance)) for _ in range(min(_concurrency(options), len(questions)))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    return [answers[index] for index in range(len(questions))]


@contextmanager
def _bar(total: int, progress: bool | None) -> Iterator[Callable[[], None]]:
    """A progress bar on standard error; yields what moves it on by one."""
    if progress is False:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    shown = progress or console.is_terminal or console.is_jupyter
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), "left", TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not shown) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)


def _concurrency(options: MapOptions) -> int:
    concurrency = options.get("concurrency", DEFAULT_CONCURRENCY)
    if isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1:
        raise ValueError(f"concurrency is {concurrency!r}; give a whole number of 1 or more")
    return concurrency
