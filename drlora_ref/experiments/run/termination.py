"""What becomes of a run whose process is told to end, as clusters do before they kill it."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM  # exit statuses


class Terminated(BaseException):
    """SIGTERM came. The message says what has been kept.

    As KeyboardInterrupt it is no Exception: it may come in the middle of reading a file, and who
    catches whatever a damaged file brings must not take it for damage.
    """


def end(number: int, frame: FrameType | None) -> None:
    """The command line's handler of SIGTERM, while no run listens; raises Terminated."""
    raise Terminated("SIGTERM: the same command goes on from the last checkpoint")


@contextmanager
def heard() -> Iterator[None]:
    """Within it Ctrl-C raises KeyboardInterrupt, and SIGTERM Terminated."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # A script's background commands ignore Ctrl-C from their start, and Python leaves it so.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.getsignal(signal.SIGTERM)
    if before == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Hearing:
    """Within it SIGTERM ends nothing: it is noted, and answered when that suits the run.

    So is SIGUSR2 where submitit listens to it, in a job on Slurm. Outside the main thread, where
    Python lets nobody listen, and where SIGTERM is ignored, all stays as it is.
    """

    def __init__(self) -> None:
        self.told = 0  # the signal that came last; 0: none
        self.before: dict[int, object] = {}

    def __enter__(self) -> "Hearing":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR2):
                handler = signal.getsignal(number)
                if callable(handler) or (number, handler) == (signal.SIGTERM, signal.SIG_DFL):
                    self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *problem: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.told = number

    def answer(self, kept: str) -> None:
        """Do what the signal would have done at once; raises Terminated if that was to end.

        `kept` is the message. Where somebody else listened (submitit, which queues the job again)
        it is printed, and that one is called.
        """
        number, self.told = self.told, 0
        handler = self.before[number]
        if not callable(handler) or handler is end:
            raise Terminated(kept)
        print(kept, flush=True)
        handler(number, None)
