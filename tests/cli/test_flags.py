"""The flags: their checks, where their defaults come from, and Pyro's own command line."""

import re

import pytest

from air.cli import flags
from air.training.training_settings import TrainingSettings

TUTORIAL = (
    "-n 200000 -blr 0.1 --z-pres-prior 0.01 --scale-prior-sd 0.2 --predict-net 200 "
    "--bl-predict-net 200 --decoder-output-use-sigmoid --decoder-output-bias -2 --seed 287710"
)


def parse(line: str) -> dict[str, object]:
    return vars(flags.build_parser().parse_args(line.split()))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", {}),
        (
            TUTORIAL,
            {
                "num_steps": 200_000, "baseline_learning_rate": 0.1, "z_pres_prior": 0.01,
                "scale_prior_sd": 0.2, "predict_net": [200], "bl_predict_net": [200],
                "decoder_output_use_sigmoid": True, "decoder_output_bias": -2.0, "seed": 287710,
            },
        ),
        ("--num-steps=1 --no-baseline", {"num_steps": 1, "use_baselines": False}),  # Pyro's tests
        ("--cuda --jit", {"device": "cuda", "compile": True}),
        ("--no-masking --baselines", {"use_masking": False, "use_baselines": True}),
        ("--anneal-prior-duration 1e6", {"anneal_prior_duration": 1_000_000}),
        (f"--seed {2**32 - 1} --encoder-net", {"seed": 2**32 - 1, "encoder_net": []}),
    ],
)  # fmt: skip
def test_only_flags_that_are_given_leave_a_value(line: str, expected: dict[str, object]) -> None:
    assert parse(line) == expected


def test_every_default_has_a_flag_and_every_flag_a_default() -> None:
    actions = flags.build_parser()._actions
    assert {a.dest for a in actions} - {"help", "help_all"} == set(flags.DEFAULTS)
    assert len(flags.FLAGS) <= 80


def help_of(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        parse(line)
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_lists_the_common_flags_and_help_all_all(capsys: pytest.CaptureFixture[str]) -> None:
    short, long = help_of("--help", capsys), help_of("--help-all", capsys)
    for text, shown in ((short, 15), (long, len(flags.FLAGS) + len(flags.ALIASES))):
        names = re.findall(r"^  (-.*?)(?:  |$)", text, re.M)
        assert len(names) == shown + 2  # --help and --help-all
        assert all(len(line) <= 100 for line in text.splitlines())
    titles = re.findall(r"^(\w.*):$", long, re.M)
    assert titles == ["options", *flags.GROUPS]
    words = " ".join(long.split())
    steps = str(TrainingSettings().num_steps)
    for value in (steps, "True", "0.001", "200", "ReLU", "-2.0", "auto", "runs/<time>-seed<k>"):
        assert f"(default: {value})" in words
    assert "None" not in long


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("-b 0", "argument -b/--batch-size: expected a whole number of at least 1, got '0'"),
        ("-n 1.5", "argument -n/--num-steps: expected a whole number of at least 0, got '1.5'"),
        ("-lr nan", "argument -lr/--learning-rate: expected a number above 0, got 'nan'"),
        ("--z-pres-prior 1.2", "--z-pres-prior: expected a number above 0, at most 1, got '1.2'"),
        ("--non-linearity Linear", "expected the name of an activation of torch.nn"),
        ("--anneal-prior cos", "argument --anneal-prior: invalid choice: 'cos'"),
        ("--batch 3", "unrecognized arguments: --batch 3"),  # no abbreviations
        ("--encoder-net 10 0", "argument --encoder-net: expected a whole number of at least 1"),
    ],
)
def test_wrong_values_end_in_one_line_and_exit_code_2(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(line)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_of_several_ranks_each_names_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(flags, "world_size", lambda: 2)
    monkeypatch.setattr(flags, "rank", lambda: 1)
    with pytest.raises(SystemExit):
        parse("-b 0")
    assert ": rank 1: error: argument -b/--batch-size: expected" in capsys.readouterr().err
