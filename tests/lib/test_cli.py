"""Errors are one line and exit code 2; random streams depend on their labels only."""

from __future__ import annotations

from lib.cli import UserError, derived_seed, rng, stage_main


def command(run):
    return stage_main(lambda parser: parser.add_argument("--epsilon", type=float, default=0.2), run, description="Doc.")


def test_user_error_is_one_line(capsys):
    def run(args, report):
        raise UserError("rules not found: x;\n  run stage 3")

    assert command(run)([]) == 2
    assert capsys.readouterr().err == "error: rules not found: x; run stage 3\n"


def test_seed_has_two_names_and_unknown_flags_are_refused():
    seen = []
    main = command(lambda args, report: seen.append((args.seed, args.epsilon)))
    assert main(["--random_seed", "7"]) == 0
    assert main(["--seed", "8", "--epsilon", "0.5"]) == 0
    assert seen == [(7, 0.2), (8, 0.5)]
    for argv in (["--eps", "1"], ["--nonsense"]):
        try:
            main(argv)
        except SystemExit as stop:
            assert stop.code == 2


def test_streams_differ_by_label_and_are_repeatable():
    assert rng(42, "stage6", 1).random() == rng(42, "stage6", 1).random()
    assert rng(42, "stage6", 1).random() != rng(42, "stage6", 2).random()
    assert rng(42, "a", "b").random() != rng(42, "ab").random()
    assert 0 <= derived_seed(42, "x") < 2**31
