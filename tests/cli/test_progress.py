"""Progress: lines where there is no terminal, and nothing from ranks that are silent."""

from contextlib import closing

import pytest
from helpers import PROGRESS

from air.cli.progress import ProgressBar


@pytest.mark.parametrize("silent", [False, True])
def test_lines_come_from_rank_0_alone(silent: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(ProgressBar(total=1000, initial=0, silent=silent)) as bar:
        bar.show(PROGRESS)
        bar.show(PROGRESS)  # too early for another line
        bar.write("an evaluation")
    said = capsys.readouterr().out
    seconds = round(980 / PROGRESS.steps_per_second)
    time_left = f"{seconds // 60:02}:{seconds % 60:02}"
    line = f"step 20 of 1,000, {time_left} left: {PROGRESS}\nan evaluation\n"
    assert said == ("" if silent else line)
