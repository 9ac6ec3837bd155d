"""`--config`: the file sets every option, the command line wins, mistakes name file and key."""

import json

import pytest

from tsdiff.cli.app import cli

FILE = """
prompt = ["near (1, 1)"]
steps = 10
seed = [0, 3]
baseline = false
verifier = "gaussian-target"
[policy]
name = "beam"
width = 3
levels = [0.5]
"""


@pytest.fixture
def planned(tsdiff, tmp_path):
    """The plan of a config file and arguments."""
    (tmp_path / "c.toml").write_text(FILE)

    def plan(*arguments):
        result = tsdiff("plan", "--config", "c.toml", "--json", *arguments)
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    return plan


def test_the_file_sets_options(planned):
    plan = planned()
    assert plan["prompts"] == ["near (1, 1)"]
    assert (plan["steps"], plan["seeds"], plan["baseline_cost"], plan["verifiers"]) == (10, [0, 3], None, ["gaussian-target"])
    assert (plan["policy"]["name"], plan["policy"]["width"], plan["policy"]["levels"]) == ("beam", 3, [0.5])


def test_the_command_line_wins_option_by_option(planned):
    plan = planned("near (2, 2)", "--steps", "5", "--baseline", "-P", "width=2", "--seed", "9")
    assert plan["prompts"] == ["near (2, 2)"]
    assert (plan["steps"], plan["seeds"]) == (5, [9])
    assert plan["baseline_cost"]["nfe"] == 5
    assert (plan["policy"]["width"], plan["policy"]["levels"]) == (2, [0.5])


def test_typed_prompts_win_over_the_files_prompt_file_and_the_reverse(tsdiff, tmp_path):
    (tmp_path / "p.txt").write_text("near (7, 7)\n")
    (tmp_path / "a.toml").write_text('prompts = "p.txt"')
    (tmp_path / "b.toml").write_text('prompt = "near (1, 1)"')
    typed = tsdiff("plan", "near (2, 2)", "--config", "a.toml", "--json")
    filed = tsdiff("plan", "--prompts", "p.txt", "--config", "b.toml", "--json")
    assert json.loads(typed.stdout)["prompts"] == ["near (2, 2)"]
    assert json.loads(filed.stdout)["prompts"] == ["near (7, 7)"]


def test_another_policy_does_not_inherit_the_files_parameters(tsdiff, tmp_path):
    (tmp_path / "c.toml").write_text(FILE)
    result = tsdiff("plan", "--config", "c.toml", "--policy", "best-of-n", "--json")
    assert json.loads(result.stdout)["policy"]["name"] == "best-of-n"
    assert "those of beam and not used for best-of-n" in result.stderr


def test_a_table_without_name_belongs_to_whatever_policy_is_chosen(tsdiff, tmp_path):
    (tmp_path / "c.toml").write_text("[policy]\nn = 7")
    result = tsdiff("plan", "--config", "c.toml", "--policy", "best-of-n", "--json")
    assert json.loads(result.stdout)["policy"]["n"] == 7


def test_every_option_is_a_key(tsdiff, tmp_path):
    """Whatever `search` takes, a file can say: no key may be refused as unknown."""
    names = {option[2:] for parameter in cli.get_command(None, "search").params for option in parameter.opts if option.startswith("--")}
    for name in names - {"config", "policy-option"}:
        (tmp_path / "c.toml").write_text(f"{name} = [[1]]")  # no option takes this value
        result = tsdiff("search", "--config", "c.toml")
        assert result.exit_code == 2
        assert f"c.toml: {name} is [[1]] but must be" in result.stderr


def test_underscores_and_negated_flags_are_understood(tsdiff, tmp_path):
    (tmp_path / "c.toml").write_text("no_baseline = true\nmax_batch = 3")
    plan = json.loads(tsdiff("plan", "--config", "c.toml", "--json").stdout)
    assert (plan["baseline_cost"], plan["rows_per_call"]["network"]) == (None, 3)


@pytest.mark.parametrize(
    ("text", "hints"),
    [
        ("stpes = 3", ["'stpes'", "'steps'"]),
        ("steps = 3.5", ["steps", "3.5"]),
        ("steps = true", ["steps", "True"]),
        ("steps = [3, 4]", ["steps", "3,4"]),
        ("baseline = 1", ["baseline", "true or false"]),
        ("baseline = true\nno-baseline = true", ["no-baseline", "keep one"]),
        ('device = "gpu"', ["device", "'gpu'"]),
        ('config = "other.toml"', ["'config'"]),
        ("[policy]\nwidht = 3", ["'widht'", "'width'"]),
        ("[policy]\nwidth = {a = 1}", ["width", "dict"]),
        ("[policy]\nname = 3", ["policy", "'3'"]),
        ("steps = \nseed = 1", ["not TOML", "line 1"]),
    ],
)
def test_mistakes_name_file_and_key(tsdiff, tmp_path, text, hints):
    (tmp_path / "c.toml").write_text(text)
    result = tsdiff("plan", "--config", "c.toml")
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert all(hint in line for hint in hints), line
