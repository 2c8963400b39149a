"""Progress on a terminal, or in lines where there is none."""

import sys
import time

from tqdm import tqdm

from air.training.events import Progress

LINE_SECONDS = 10.0  # between progress lines where there is no terminal for a progress bar


class ProgressBar:
    """A progress bar of training, of which `initial` steps are already taken."""

    def __init__(self, total: int, initial: int, silent: bool = False) -> None:
        self.total = total
        self.silent = silent
        disable = True if silent else None  # None: where there is no terminal
        self._bar = tqdm(
            total=total, initial=initial, unit="step", disable=disable, dynamic_ncols=True
        )
        self._shown_at = -LINE_SECONDS

    def close(self) -> None:
        """Ends the bar; `contextlib.closing` calls it."""
        self._bar.close()

    def show(self, progress: Progress) -> None:
        """Moves the bar, or prints a line from time to time."""
        self._bar.set_postfix_str(str(progress), refresh=False)
        self._bar.update(progress.step - self._bar.n)
        if self._bar.disable and time.monotonic() - self._shown_at > LINE_SECONDS:
            self._shown_at = time.monotonic()
            left = (self.total - progress.step) / max(progress.steps_per_second, 1e-9)
            time_left = tqdm.format_interval(left)  # as a bar on a terminal shows it
            self.write(f"step {progress.step:,} of {self.total:,}, {time_left} left: {progress}")

    def write(self, text: str) -> None:
        """Prints lines, above the bar if there is one."""
        if not self.silent:
            self._bar.write(text)
            sys.stdout.flush()  # a log shows the line at once
