"""SIGINT and SIGTERM: a run ends at its next batch, and what was trained is tested and told."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Interrupted(BaseException):
    """A signal ended a run; not an `Exception`, as KeyboardInterrupt is none. `status` is 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.status = 128 + number


class Interrupts(Callback):
    """Within `with`, SIGINT and SIGTERM raise `Interrupted`: at the next batch in a trainer that has this callback, at
    once elsewhere, and at once where a second one comes.

    Of several processes that one process started, that one decides, and ends the others: they ignore both signals.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received = 0
        self.waiting = False
        self.process = 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        self.process = os.getpid()
        self.before = {number: signal.getsignal(number) for number in self.SIGNALS}
        self._listen()
        return self

    def __exit__(self, *_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self.before.items():
                signal.signal(number, handler)

    def _listen(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # the main thread alone may set handlers
        started = os.environ.get("LOCAL_RANK", "0") != "0" and "RANK" not in os.environ  # by rank 0, not by torchrun
        for number in self.SIGNALS:
            own = os.getpid() == self.process and not started
            signal.signal(number, self._handle if own else signal.SIG_IGN)

    def _handle(self, number: int, frame: Any) -> None:
        if self.waiting and not self.received:
            self.received = number
            return
        raise Interrupted(number)

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen()  # in place of Lightning's handlers, with which SIGTERM ends a run as if all were well
        self.waiting = True

    def _stop(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        if self.received:
            raise Interrupted(self.received)

    def teardown(self, *_: Any, **__: Any) -> None:
        self.waiting = False

    def on_exception(self, *_: Any) -> None:
        self.waiting = False

    on_sanity_check_start = on_train_start = on_validation_start = on_test_start = on_predict_start = _start
    on_train_batch_start = on_validation_batch_start = on_test_batch_start = on_predict_batch_start = _stop
