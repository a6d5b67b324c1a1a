"""The looped task, as actors make it: it can kill the process that it is in, be slow, or have a bad example."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from cutting import COUNT
from looped import LoopedTask


class RayTask(LoopedTask):
    """Fifty examples.

    Args:
        driver: pid of the process in which nothing happens.
        marker: a file; while it is not there, the first actor to get so far makes it and kills itself.
        kills: whether actors kill themselves every time.
        pause_s: of each call of the losses.
        raises: what an actor's losses raise.
        nonfinite: whether the last example has no finite loss.
    """

    def __init__(
        self,
        driver: int = 0,
        marker: str | None = None,
        kills: bool = False,
        pause_s: float = 0,
        raises: str | None = None,
        nonfinite: bool = False,
    ) -> None:
        super().__init__(count=COUNT)
        self._driver, self._marker, self._kills = driver, marker, kills
        self._pause_s, self._raises, self._nonfinite = pause_s, raises, nonfinite

    def losses(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        time.sleep(self._pause_s)
        values = super().losses(model, batch)
        if os.getpid() == self._driver:
            return values
        if self._raises:
            raise RuntimeError(self._raises)
        if self._kills or (self._marker and not Path(self._marker).exists()):
            if self._marker:
                Path(self._marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return values / 0 if self._nonfinite and len(values) < 8 else values
