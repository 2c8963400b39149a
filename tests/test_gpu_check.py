"""The first command on a machine with a GPU, as far as it goes without one."""

import re

import pytest
import torch

from tests.benchmarks import gpu_check
from tests.benchmarks.gpu_check import Options

pytestmark = pytest.mark.slow


@pytest.mark.benchmark
def test_all_that_needs_no_gpu_is_ok_on_the_cpu(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert gpu_check.main(["--device", "cpu", "--quick"]) == 0
    lines = capfd.readouterr().out.splitlines()
    expected = {"tests": "skipped", "speed": "skipped", "ranks": "skipped"}
    assert [line.split()[:2] for line in lines] == [
        [expected.get(check.__name__, "ok"), check.__name__] for check in gpu_check.CHECKS
    ]
    assert re.search(r"difference is 0\.0e\+00$|difference is \d\.\de-\d\d$", lines[2])
    assert re.search(r"stopped at step \d+ of \d+, ELBO .*, the same evaluation$", lines[4])


def test_a_check_that_fails_fails_the_command_and_the_others_still_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(options: Options) -> str:
        raise RuntimeError("CUDA error: a long story\nof many lines")

    def works(options: Options) -> str:
        return f"{options.device}, quick {options.quick}"

    def run(options: Options) -> str:
        gpu_check.run_program(options, "--device cud --output-dir run")
        return ""

    assert gpu_check.main(["--device", "cpu"], [raises, run, works]) == 1
    captured = capsys.readouterr()
    first, second, third = (line.split(maxsplit=1) for line in captured.out.splitlines())
    assert first == ["FAIL", "raises   RuntimeError: CUDA error: a long story"]
    assert re.fullmatch(r"run .* exit code 2: main.py: error: .*", second[1])
    assert third == ["ok", "works    cpu, quick False"]
    assert "of many lines" in captured.err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        gpu_check.main([])
    assert ended.value.code == 2
    assert "finds no GPU" in capsys.readouterr().err


def test_a_result_that_differs_from_the_cpus_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    def other(estimator: str, captured: bool, *_: object) -> dict[str, torch.Tensor]:
        return {"loss": torch.tensor(2.0 + captured)}

    monkeypatch.setattr(gpu_check, "one_step", other)
    with pytest.raises(AssertionError, match=r"marginal, captured True, loss: 5\.0e-01"):
        gpu_check.step(Options("cpu", True, tmp_path))  # type: ignore[arg-type]
