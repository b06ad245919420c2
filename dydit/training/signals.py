"""SIGTERM and Ctrl-C as a request to stop after the current step, so that the step can be saved."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import parent_process
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SENDER_IS_TOLD = hasattr(signal, "sigtimedwait")  # not on macOS and Windows
_WATCH_S = 5.0  # how often a loader process looks whether the main process is still there


class StopRequest:
    """Whether somebody asked the run to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal_name = ""

    def __bool__(self) -> bool:
        return bool(self.signal_name)


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Collect SIGTERM and SIGINT in a ``StopRequest`` instead of dying; scoped.

    The first signal asks. From then on Ctrl-C stops at once, by the handler that was there before; SIGTERM
    does nothing more, as supervisors and launchers each send their own while the step is being saved.
    Outside the main thread Python allows no handlers; the request then stays empty.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous: dict[int, Any] = {number: signal.getsignal(number) for number in _SIGNALS}

    def restore(number: int) -> None:
        handler = previous[number]
        signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def ask(number: int, _frame: FrameType | None) -> None:
        request.signal_name = request.signal_name or signal.Signals(number).name
        restore(signal.SIGINT)

    for number in _SIGNALS:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        for number in _SIGNALS:
            restore(number)


@contextmanager
def sigterm_blocked() -> Iterator[None]:
    """Processes and threads that are started within begin with SIGTERM blocked: it waits for them.

    Meant for loader processes, which then take it up with ``leave_signals_to_parent``.
    """
    if not _SENDER_IS_TOLD:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_parent(_worker: int) -> None:
    """In a loader process: the main process alone decides when loaders end.

    Ctrl-C, and SIGTERM from schedulers and launchers, reach every process of a run; a loader that died of
    them would take the main process along before it has saved. SIGTERM cannot be ignored altogether: it is
    how torch ends a loader that hangs, and how multiprocessing ends those that are left at exit and then
    waits for them. So it counts only from the main process; when that is gone, the loader ends by itself.
    Where the sender is not told (macOS), SIGTERM ends a loader whoever sends it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main = parent_process()
    if _SENDER_IS_TOLD and main is not None:
        threading.Thread(target=_end_by, args=(main, os.getppid()), daemon=True).start()


def _end_by(main: BaseProcess, parent: int) -> None:
    """End this process, whatever it is doing, at a SIGTERM from ``main`` or when that is gone.

    Loaders inherit each other's pipe by which they see it alive, so that it being their parent, number
    ``parent``, tells sooner; with a fork server it is not their parent.
    """
    while os.getppid() == parent and main.is_alive():
        told = signal.sigtimedwait({signal.SIGTERM}, _WATCH_S)
        if told is not None and told.si_pid == main.pid:
            break
    os._exit(0)
