"""The bundled model inside lm_eval: its numbers are the engine's, and unsteered those of lm_eval's own model."""

from __future__ import annotations

import json
import re
from functools import partialmethod
from pathlib import Path

import numpy as np
import pytest
import yaml

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

import steerwell as sw
from steerwell.apps.harnesses.lm_eval import SteeredLM, main
from steerwell.core.errors import ArgumentError, UnknownNameError
from steerwell.testbed.bundled import bundled_path

TEXT = "It is Paris. It is Paris and not Rome. You can look it up at any time."


def requests(kind: str, *arguments: tuple[object, ...]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=args, idx=0) for args in arguments]


def sentence(answer: str) -> str:
    return f"It is {answer}."


@pytest.fixture(scope="module")
def tokens():
    tokenizer = AutoTokenizer.from_pretrained(bundled_path())
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def plain() -> SteeredLM:
    return SteeredLM(batch_size=8)


@pytest.fixture(scope="module")
def steered(args) -> SteeredLM:
    return SteeredLM(batch_size=8, **args)


@pytest.fixture(scope="module")
def tasks(choices, sums, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of lm_eval tasks: YAML beside JSONL, one task per request type."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = {
        "choice": [
            {
                "question": turn.prompt,
                "choices": [sentence(item) for item in turn.offered],
                "answer": turn.offered.index(turn.true_answer),
            }
            for turn in choices
        ],
        "sums": [{"question": turn.prompt, "answer": turn.true_answer} for turn in sums],
        "text": [{"text": TEXT}],
    }
    shared = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{question}}"}
    ending = {
        "choice": {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        },
        "sums": {
            "output_type": "generate_until",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 40, "do_sample": False},
            "filter_list": [
                {
                    "name": "number",
                    "filter": [{"function": "regex", "regex_pattern": "is (\\d+)"}, {"function": "take_first"}],
                }
            ],
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
        "text": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
    }
    for name, lines in rows.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        source = {"dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": f"sw_{name}"} | shared | source | ending[name]))
    return folder


def evaluate(model: SteeredLM, tasks: Path, *names: str, **options: object) -> dict:
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    options = {"apply_chat_template": True, "bootstrap_iters": 0} | options
    return lm_eval.simple_evaluate(model, tasks=list(names), task_manager=manager, **options)


def by_document(results: dict, name: str) -> list[dict]:
    return sorted(results["samples"][name], key=lambda sample: sample["doc_id"])


def test_accuracy_is_the_engines(plain, pilot, tasks, tokens, choices, sums) -> None:
    results = evaluate(plain, tasks, "sw_choice", "sw_sums")
    right = []
    for turn in choices:
        rows = [tokens(sentence(item)) for item in turn.offered]
        scores = pilot.score([sw.Prompt.chat(turn.prompt)] * len(rows), rows)
        best = int(np.argmax([score.logprobs.sum() for score in scores]))
        right.append(turn.offered[best] == turn.true_answer)
    assert [sample["acc"] for sample in by_document(results, "sw_choice")] == right
    assert results["results"]["sw_choice"]["acc,none"] == pytest.approx(np.mean(right))
    answers = pilot.generate([sw.Prompt.chat(turn.prompt) for turn in sums], sw.Sampling(max_new_tokens=40))
    found = [re.search(r"is (\d+)", answer.text) for answer in answers]
    exact = [match is not None and match[1] == turn.true_answer for match, turn in zip(found, sums, strict=True)]
    assert [sample["exact_match"] for sample in by_document(results, "sw_sums")] == exact
    assert results["results"]["sw_sums"]["exact_match,number"] == pytest.approx(np.mean(exact))
    assert results["config"]["steering"] is None
    assert np.mean(right) > 0.5
    assert np.mean(exact) > 0.5


def test_steered_loglikelihoods_are_the_engines(steered, pilot, edit, tasks, tokens, choices) -> None:
    results = evaluate(steered, tasks, "sw_choice")
    for turn, sample in zip(choices, by_document(results, "sw_choice"), strict=True):
        rows = [tokens(sentence(item)) for item in turn.offered]
        scores = pilot.score([sw.Prompt.chat(turn.prompt)] * len(rows), rows, edit)
        bare = pilot.score([sw.Prompt.chat(turn.prompt)] * len(rows), rows)
        found = [response[0][0] for response in sample["resps"]]
        assert found == pytest.approx([score.logprobs.sum() for score in scores], abs=1e-3)
        assert found != pytest.approx([score.logprobs.sum() for score in bare], abs=1e-2)
    steering = results["config"]["steering"]
    (term,) = steering["terms"]
    assert steering["edit_id"] == edit.id
    assert steering["answers"] >= 3 * len(choices)
    assert term["tokens_edited"] == term["tokens_seen"] > 0


def test_steered_answers_are_the_engines(steered, pilot, edit, tasks, sums) -> None:
    results = evaluate(steered, tasks, "sw_sums", "sw_text")
    answers = pilot.generate([sw.Prompt.chat(turn.prompt) for turn in sums], sw.Sampling(max_new_tokens=40), edit)
    found = [sample["resps"][0][0] for sample in by_document(results, "sw_sums")]
    assert sum(a == b.text for a, b in zip(found, answers, strict=True)) >= len(sums) - 1  # one may tie in rounding
    assert results["results"]["sw_text"]["word_perplexity,none"] > 1


def test_unsteered_it_agrees_with_lm_evals_own_model(plain) -> None:
    """Parity with a reference on plain text, where both take the context as it is."""
    reference = HFLM(pretrained=str(bundled_path()), device="cpu", dtype="float32", batch_size=4)
    context = "<|bos|><|user|>What is the capital of France?<|end|><|assistant|>"
    pairs = [(context, "It is Paris."), (context + "It is ", "Paris"), ("", TEXT), ("The capital", " of France")]
    pairs += [(context, "The capital of France is Paris."), (context, "It")]
    asked = requests("loglikelihood", *pairs)
    ours, theirs = plain.loglikelihood(asked, disable_tqdm=True), reference.loglikelihood(asked, disable_tqdm=True)
    assert [total for total, _ in ours] == pytest.approx([total for total, _ in theirs], abs=1e-3)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert {greedy for _, greedy in ours} == {True, False}
    texts = requests("loglikelihood_rolling", (TEXT,), ("Rome",))
    assert plain.loglikelihood_rolling(texts) == pytest.approx(reference.loglikelihood_rolling(texts), abs=1e-3)
    asked = requests("generate_until", (context, {"until": [" and"], "max_gen_toks": 24}), (context, {"until": "."}))
    assert plain.generate_until(asked) == reference.generate_until(asked)


def test_greedy_is_what_greedy_decoding_writes(steered, pilot, edit) -> None:
    prompt = sw.Prompt.chat("What is the capital of France?")
    context = steered.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}])
    (written,) = pilot.generate([prompt], sw.Sampling(max_new_tokens=12), edit)
    begun = written.text.rsplit(" ", 1)[0]
    asked = requests("loglikelihood", (context, begun), (context, begun + " zebra"), (context, "zebra"))
    assert [greedy for _, greedy in steered.loglikelihood(asked)] == [True, False, False]


def test_a_text_longer_than_the_context_is_scored_once_per_token(plain, steered, pilot, edit, tokens) -> None:
    text = " ".join([TEXT] * 60)
    ids = tokens(text)
    assert len(ids) > 1100
    begin = sw.Prompt(text="<|bos|>")
    for model, how in ((plain, None), (steered, edit)):
        (found,) = model.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
        first, last = pilot.score([begin, begin], [ids[:1022], ids[-1023:]], how)
        assert found == pytest.approx(first.logprobs.sum() + last.logprobs[1022 - len(ids) :].sum(), rel=1e-4)
    assert plain.loglikelihood_rolling(requests("loglikelihood_rolling", ("",))) == [0.0]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_text_without_context_follows_the_begin_token(tiny_folder, name: str) -> None:
    model = SteeredLM(str(tiny_folder(name)))
    ((total, _),) = model.loglikelihood(requests("loglikelihood", ("", "Once upon")))
    assert model.loglikelihood_rolling(requests("loglikelihood_rolling", ("Once upon",))) == pytest.approx([total])


def test_conversations_keep_their_turns_and_the_answers_beginning(plain, pilot) -> None:
    turns = [
        {"role": "system", "content": "Always tell the truth."},
        {"role": "user", "content": "What is the capital of France?"},
    ]
    begun = [*turns, {"role": "assistant", "content": "It is "}]
    prompt = sw.Prompt.chat(turns[1]["content"], turns[0]["content"])
    kwargs = {"until": ["."], "max_gen_toks": 20}
    asked = requests(
        "generate_until",
        (plain.apply_chat_template(turns), kwargs),
        (plain.apply_chat_template(begun, add_generation_prompt=False), kwargs),
    )
    prompts = [prompt, sw.Prompt(prompt.messages, prefill="It is ")]
    answers = pilot.generate(prompts, sw.Sampling(max_new_tokens=20, stop=(".",)))
    assert plain.generate_until(asked) == [answer.text for answer in answers]


def test_sampling_is_the_engines(plain, pilot) -> None:
    context = plain.apply_chat_template([{"role": "user", "content": "Tell me 6 minus 1."}])
    kwargs = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "max_new_tokens": 12, "num_beams": 1}
    found = plain.generate_until(requests("generate_until", (context, kwargs), (context, kwargs)))
    how = sw.Sampling(1.5, 0.9, 12)
    assert found == [answer.text for answer in pilot.generate([sw.Prompt.chat("Tell me 6 minus 1.")] * 2, how)]


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"top_k": 5}, "top_k=5"),
        ({"num_beams": 4}, "num_beams=4"),
        ({"penalty_alpha": 0.6}, "penalty_alpha=0.6"),
        ({"do_sample": True}, "temperature: missing"),
    ],
)
def test_generation_arguments_that_would_be_ignored_are_errors(plain, kwargs: dict, said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        plain.generate_until(requests("generate_until", ("Hello", kwargs)))


def test_model_arguments_that_would_be_ignored_are_errors(args, tasks, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="load_in_4bit"):
        SteeredLM.create_from_arg_string("pretrained=pilot,load_in_4bit=true", {"batch_size": 1, "device": None})
    with pytest.raises(ArgumentError, match="layer: missing"):
        SteeredLM.create_from_arg_string(f"direction={args['direction']},method=swfc,strength=1")
    steered = SteeredLM(**args)
    with pytest.raises(ArgumentError, match="use_cache"):
        evaluate(steered, tasks, "sw_choice", use_cache=str(tmp_path / "cache"))
    with pytest.raises(ArgumentError, match="give no name"):
        steered.chat_template("tool_use")


def test_the_command_line_writes_the_edit_into_the_results(
    args, edit, tasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ",".join(f"{key}={value}" for key, value in {"pretrained": "pilot", **args}.items())
    words = ["--model", "steerwell", "--model_args", given, "--tasks", "sw_choice", "--include_path", str(tasks)]
    words += ["--apply_chat_template", "--batch_size", "8", "--limit", "3", "--output_path", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["lm_eval", *words])
    everything = TaskManager.__init__
    only_ours = partialmethod(everything, include_defaults=False)  # thousands of files are not listed
    monkeypatch.setattr(TaskManager, "__init__", only_ours)
    main()
    (file,) = tmp_path.rglob("results_*.json")
    written = json.loads(file.read_text())
    assert written["config"]["steering"]["edit_id"] == edit.id
    assert written["n-samples"]["sw_choice"]["effective"] == 3


def test_the_command_line_ends_on_our_errors_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise ArgumentError("method: missing")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", refuse)
    with pytest.raises(SystemExit, match=r"^error: method: missing$"):
        main()
