"""The command line on a random tiny model: what is printed, what is written, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.scoring.server import completion, serving

EXAMPLE = str(Path(__file__).parents[2] / "docs" / "examples" / "happiness.yaml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture
def direction(run, folder: Path, tiny_folder) -> Path:
    """A direction fitted on a random model by the command, once."""
    place = folder / "happy"
    if not place.exists():
        code, _, err = run("fit", "-c", EXAMPLE, "-o", place, "-m", tiny_folder("llama"), "--max-new-tokens", 4)
        assert code == 0, err
    return place


def test_help_and_version(run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert all(command in out for command in ("demo", "concepts", "fit", "inspect", "generate"))
    assert run("--version")[1].strip().count(".") == 2


def test_unknown_command_is_wrong_usage(run) -> None:
    assert run("steer")[0] == 2


def test_concepts(run, tmp_path: Path) -> None:
    packs = json.loads(run("concepts", "list", "--json")[1])
    assert {"dishonesty", "sycophancy", "dismissiveness", "hostility"} <= {pack["concept"] for pack in packs}
    shown = json.loads(run("concepts", "show", "hostility", "--json")[1])
    assert shown["poles"]["violating"] == "hostile"
    assert "hostile" in run("concepts", "show", "hostility")[1]
    code, out, _ = run("concepts", "check", EXAMPLE)
    assert (code, "usable" in out) == (0, True)
    broken = tmp_path / "broken.yaml"
    broken.write_text("schema: 1\nconcept: broken\ntrian: []\n")
    code, out, _ = run("concepts", "check", broken, "--json")
    report = json.loads(out)
    assert (code, report["usable"]) == (1, False)
    assert {"line": 3, "field": "trian"}.items() <= next(f for f in report["faults"] if f["field"] == "trian").items()


def test_unknown_concept_names_the_nearest(run, tmp_path: Path) -> None:
    code, _, err = run("fit", "-c", "dishonestly", "-o", tmp_path / "x")
    assert code == 1
    assert "Did you mean 'dishonesty'?" in err


def test_fit_and_inspect(run, direction: Path, tiny_folder) -> None:
    shown = json.loads(run("inspect", direction, "--json")[1])
    assert (shown["concept"], shown["method"], len(shown["layers"])) == ("happiness", "logistic", 4)
    assert all(layer["separation"] > 0 for layer in shown["layers"])
    assert "Cohen's d" in " ".join(run("inspect", direction)[1].split())


def test_fit_refuses_an_unknown_method_before_it_loads_anything(run, tmp_path: Path) -> None:
    code, _, err = run("fit", "-c", EXAMPLE, "-o", tmp_path / "x", "--method", "logistik", "-m", "/nowhere")
    assert (code, "Did you mean 'logistic'?" in err) == (1, True)


def test_fit_reads_where_it_is_told(run, tiny_folder, tmp_path: Path) -> None:
    words = ("fit", "-c", EXAMPLE, "-o", tmp_path / "d", "-m", tiny_folder("llama"), "--max-new-tokens", 2)
    assert run(*words, "--pool", "prompt_last")[0] == 0
    assert json.loads(run("inspect", tmp_path / "d", "--json")[1])["provenance"]["pool"] == "prompt_last"
    assert "(prompt_last)" in run("inspect", tmp_path / "d")[1]
    code, _, err = run("fit", "-c", EXAMPLE, "-o", tmp_path / "x", "--pool", "last", "-m", "/nowhere")
    assert (code, "'response_mean', 'prompt_last'" in err) == (2, True)


def test_generate_streams_and_shows_the_receipt(run, direction: Path, tiny_folder) -> None:
    words = ("generate", "Hello", "-m", tiny_folder("llama"), "--max-new-tokens", 5)
    code, plain, _ = run(*words, "--receipt")
    assert code == 0
    assert "this answer was not steered" in plain
    code, steered, _ = run(*words, "--direction", direction, "-l", 1, "--method", "swfc", "--strength", 5, "--receipt")
    assert code == 0
    assert "swfc(happiness toward aligned, strength 5), layer 1, position all:" in steered


def test_generate_file_with_policies(run, direction: Path, tiny_folder, tmp_path: Path) -> None:
    rows = [{"prompt": "Hi", "system": "Be kind."}, {"messages": [{"role": "user", "content": "Yo"}]}, {"text": "Once"}]
    asked, answered = tmp_path / "asked.jsonl", tmp_path / "answered.jsonl"
    asked.write_text("\n".join(json.dumps(row) for row in rows))
    for name, strength in (("a", 1.0), ("b", 2.0)):
        policy = f"direction: {direction}\nmethod: swfc\nlayers: [1]\nstrength: {strength}\n"
        (tmp_path / f"{name}.yaml").write_text(policy)
    words = ("generate", "--input", asked, "-o", answered, "-m", tiny_folder("llama"), "--max-new-tokens", 4)
    code, _, err = run(*words, "--policy", tmp_path / "a.yaml", "--policy", tmp_path / "b.yaml")
    assert code == 0, err
    found = [json.loads(line) for line in answered.read_text().splitlines()]
    assert len(found) == 3
    for row in found:
        first, second = row["receipt"]["terms"]
        assert second["perturbation"] == pytest.approx(2 * first["perturbation"], rel=1e-4)
    assert found[2]["text"] == "Once"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("generate",), "PROMPT or --input"),
        (("generate", "hi", "--layer", "1"), "--direction: missing"),
        (("generate", "hi", "--direction", "D", "--layer", "1"), "--strength: missing"),
        (("generate", "hi", "--direction", "D", "--strength", "1"), "--layer: missing"),
        (("generate", "hi", "--direction", "/nowhere", "--layer", "1", "--strength", "1"), "artifact.json is missing"),
        (
            ("generate", "hi", "--direction", "D", "--layer", "9", "--strength", "1"),
            "unknown layer 9; known: 0, 1, 2, 3",
        ),
        (("generate", "hi", "--direction", "D", "--layer", "1", "--strength", "1", "--method", "stp"), "Did you mean"),
        (("generate", "hi", "--direction", "D", "--layer", "1", "--strength", "nan"), "expected a finite number"),
        (("generate", "hi", "--temperature", "-1"), "temperature"),
        (("generate", "hi", "--plain", "--system", "x"), "leave out --system"),
        (("generate", "--input", "/nowhere.jsonl"), "cannot be read"),
        (("generate", "hi", "-m", "/nowhere"), "cannot load model"),
        (("inspect", "/nowhere"), "artifact.json is missing"),
    ],
)
def test_mistakes_are_told_and_nothing_runs(run, direction: Path, words: tuple[str, ...], said: str) -> None:
    code, out, err = run(*(str(direction) if word == "D" else word for word in words))
    assert code == 1
    assert said in " ".join(err.split())
    assert out == ""


def test_direction_of_another_model_is_refused(run, direction: Path, tiny_folder) -> None:
    words = ("generate", "hi", "-m", tiny_folder("gpt2"), "--direction", direction, "-l", 1, "--strength", 1)
    code, _, err = run(*words)
    assert (code, "was made for" in err) == (1, True)


def test_an_input_line_that_is_no_prompt_is_named(run, tiny_folder, tmp_path: Path) -> None:
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"prompt": "ok"}\n{"promt": "x"}\n')
    code, _, err = run("generate", "--input", asked, "-m", tiny_folder("llama"))
    assert (code, "line 2" in err) == (1, True)


def test_sweep_writes_a_policy_that_generate_reads(run, tmp_path: Path) -> None:
    words = ("sweep", "-c", "dishonesty", "-o", tmp_path, "-l", 0, "-s", "swfc=0,1", "--pool", "prompt_last")
    words = (*words, "--estimator", "mean_difference")
    code, shown, err = run(*words, "--validation", 4, "--test", 4, "--max-new-tokens", 96, "--json")
    assert code == 0, err
    found = json.loads(shown)
    assert found["operating_points"][0]["configuration"]["method"] == "swfc"  # strength 0 at least is coherent
    policy = found["policy"]
    code, steered, _ = run("generate", "Tell me a joke.", "--policy", policy, "--max-new-tokens", 5, "--receipt")
    assert (code, "swfc(dishonesty toward aligned" in steered) == (0, True)
    assert run(*words, "--validation", 5)[0] == 1  # another sweep in the same folder
    code, _, err = run("sweep", "-c", "hostility", "-o", tmp_path, "-s", "stmp=much")
    assert (code, "expected a method and numbers, like 'sttp=0,6,12'" in " ".join(err.split())) == (1, True)


def test_sweep_asks_a_language_model_where_there_is_no_exact_judge(run, tiny_folder, tmp_path: Path) -> None:
    words = ("sweep", "-c", EXAMPLE, "-o", tmp_path, "-m", tiny_folder("llama"), "-l", 1, "-s", "swfc=0,1")
    words = (*words, "--pool", "response_mean", "--validation", 2, "--test", 2, "--max-new-tokens", 3)
    code, _, err = run(*words)
    assert (code, "judge: got 'exact', which knows the bundled model's world only" in err) == (1, True)
    with serving(lambda *_: completion("80", {"80": 0.9})) as server:
        asked = ("--judge-model", "grader", "--judge-url", server.url)
        code, shown, err = run(*words, *asked, "--json")
        assert code == 0, err
        assert "0 missing" in err
        requests = len(server.asked)
        assert run(*words, *asked, "--json")[:2] == (0, shown)
        assert len(server.asked) == requests  # everything was in the ledger
    attacked = json.loads(shown)["unsteered"]["attacked"]
    assert (attacked["trait"], attacked["coherence"], attacked["n"], attacked["missing"]) == (80, 80, 2, 0)
