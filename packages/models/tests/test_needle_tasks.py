"""The needle model's tasks, wordings and tokenizer; nothing here loads a model's weights."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from importlib import resources
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx_models.evaluation.needle import (
    TASKS,
    TRAINING_TASKS,
    Fact,
    held_out_source,
    make_sample,
    plant,
    question_prompt,
    training_source,
)
from longctx_models.evaluation.needle.facts import fact_about, random_facts
from longctx_models.evaluation.needle.placement import sentence_boundary, word_boundary
from longctx_models.evaluation.needle.tasks import needles_that_fit
from longctx_models.evaluation.needle.templates import HELD_OUT, TRAINING
from longctx_models.evaluation.needle.text import held_out_texts, training_texts

ALL_TASKS = [*TASKS, *TRAINING_TASKS]
CHECKPOINTS = resources.files("longctx_models") / "checkpoints"
TRAINING_FOLDER = Path(__file__).parents[1] / "training" / "needle"


@pytest.mark.parametrize("task", ALL_TASKS)
@pytest.mark.parametrize("length", [512, 1024, 2048, 8192, 65536])
def test_a_sample_has_the_wanted_length(task: str, length: int) -> None:
    assert len(make_sample(task, length, 0.5, seed=0)) == length


@pytest.mark.parametrize("task", ALL_TASKS)
def test_equal_seeds_give_equal_samples(task: str) -> None:
    assert make_sample(task, 2048, 0.5, seed=3) == make_sample(task, 2048, 0.5, seed=3)
    assert make_sample(task, 2048, 0.5, seed=3) != make_sample(task, 2048, 0.5, seed=4)


@given(
    task=st.sampled_from(ALL_TASKS),
    length=st.integers(512, 6000),
    depth=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_every_sample_is_well_formed(task: str, length: int, depth: float, seed: int) -> None:
    sample = make_sample(task, length, depth, seed)
    assert len(sample) == length
    assert sample.task == task
    assert sample.answer.endswith(b"\n")
    assert sample.answer.count(b"\n") == 1
    assert sample.question.startswith(b"\n")
    assert 0 <= sample.offset < len(sample.context)
    assert sample.prompt.decode().encode() == sample.prompt


@pytest.mark.parametrize("task", ["single_needle", "multi_needle_16", "facts", "key_value_lines"])
@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_a_needle_lies_at_its_depth(task: str, depth: float) -> None:
    for seed in range(10):
        sample = make_sample(task, 16384, depth, seed)
        # A boundary is at most a window away; other needles in front shift it a little more.
        assert abs(sample.offset / len(sample.context) - depth) < 0.06


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_extreme_depths_are_the_ends_of_the_context(depth: float) -> None:
    sample = make_sample("single_needle", 4096, depth, seed=1)
    statement_end = sample.context.index(sample.answer.strip(), sample.offset) + 10
    if depth == 0.0:
        assert sample.offset == 0
    elif depth == 1.0:
        assert statement_end >= len(sample.context)


@pytest.mark.parametrize(
    "task",
    ["single_needle", "multi_needle_64", "needle_haystack", "key_value_lines", "json_uuids"],
)
def test_the_answer_occurs_once_and_in_the_asked_statement(task: str) -> None:
    for seed in range(10):
        sample = make_sample(task, 4096, 0.3, seed)
        value = sample.answer.strip().strip(b'"')
        assert sample.context.count(value) == 1
        assert 0 <= sample.context.index(value) - sample.offset < 120
        assert value not in sample.question


def test_a_fact_answer_is_in_its_statement() -> None:
    for seed in range(50):
        sample = make_sample("facts", 2048, 0.5, seed)
        assert sample.answer.strip() in sample.context[sample.offset : sample.offset + 250]


def test_a_chain_answer_follows_the_assignments() -> None:
    for seed in range(20):
        sample = make_sample("variable_chains", 4096, 0.5, seed)
        last = sample.question.decode().rsplit(" ", 1)[1]
        chain = [last, *sample.answer.decode().strip().removeprefix("= ").split(" = ")]
        assert len(chain) == 4
        *names, value = chain
        places = [sample.context.index(f"VAR {names[-1]} = {value}".encode())]
        for name, source in pairwise(names):
            places.append(sample.context.index(f"VAR {name} = VAR {source}".encode()))
        assert sample.offset == places[0]
        # The value comes first, then hop after hop.
        assert places[0] < places[2] < places[1]


def test_short_contexts_hold_fewer_needles() -> None:
    assert [needles_that_fit(length, 64) for length in (1024, 2048, 4096, 8192)] == [9, 20, 42, 64]
    sample = make_sample("multi_needle_64", 1024, 0.5, seed=0)
    assert sample.context.count(b"special magic number") == needles_that_fit(1024, 64)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown task 'haystack'"):
        make_sample("haystack", 1024, 0.5, seed=0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        make_sample("facts", 1024, 1.5, seed=0)
    with pytest.raises(ValueError, match="bytes more than the length allows"):
        make_sample("single_needle", 64, 0.5, seed=0)


@pytest.mark.parametrize(
    "part",
    [
        *("attributes", "nouns", "adjectives", "names", "noun_phrases", "copulas"),
        *("openings", "closings", "questions", "verb_frames"),
    ],
)
def test_held_out_templates_are_not_trained_on(part: str) -> None:
    shared = set(getattr(TRAINING, part)) & set(getattr(HELD_OUT, part))
    assert shared <= {"", "."}  # No opening and a plain full stop are not templates.


def test_held_out_words_are_not_trained_on() -> None:
    assert not TRAINING.words() & HELD_OUT.words()
    held_out = HELD_OUT.words() | HELD_OUT.frame_words()
    assert not held_out.intersection(training_source().words)


def test_there_are_many_held_out_wordings() -> None:
    wordings = len(HELD_OUT.noun_phrases) * len(HELD_OUT.copulas) + len(HELD_OUT.verb_frames)
    assert wordings >= 200
    rng = random.Random(0)
    facts = [fact_about(rng, HELD_OUT, "tie", "Zoe", "7") for _ in range(2000)]
    assert len({(fact.statement, fact.question) for fact in facts}) >= 200


def test_facts_of_one_sample_have_different_questions_and_findable_answers() -> None:
    rng = random.Random(1)
    for _ in range(50):
        facts = random_facts(rng, HELD_OUT, held_out_source().content_words, 8)
        assert len({fact.question for fact in facts}) == 8
        assert all(fact.answer in fact.statement for fact in facts)
        assert not any("the the" in fact.statement for fact in facts)


def test_held_out_text_is_not_trained_on() -> None:
    trained = b"\n".join(training_texts())
    for text in held_out_texts():
        lines = [line.strip() for line in text.split(b"\n")]
        # Prose, not a link that both happen to hold.
        long_lines = [line for line in lines if len(line) >= 40 and line.count(b" ") >= 3]
        assert len(long_lines) > 500
        assert not [line for line in long_lines if line in trained]


def test_sources_cut_any_length() -> None:
    rng = random.Random(2)
    for source in (training_source(), held_out_source()):
        for length in (0, 1, 1000, 300_000):
            prose = source.prose(rng, length)
            assert len(prose) == length
            prose.decode()


FACTS = (
    Fact(
        "The wifi password of the blue house is hunter27.",
        "What is the wifi password of the blue house?",
        "hunter27",
    ),
    Fact("Alice's locker code is 4821.", "What is Alice's locker code?", "4821"),
)


def test_facts_are_planted_at_boundaries() -> None:
    text = ("A first sentence. A second one follows! Is this a third?\n" * 200).encode()
    planted = plant(text, FACTS, [0.5, 1.0], 4000)
    assert len(planted) == 4000
    for fact in FACTS:
        at = planted.index(fact.statement.encode())
        assert planted[at - 2 : at] in (b". ", b"! ", b"?\n") or planted[at - 1 : at] == b" "
    assert abs(planted.index(FACTS[0].statement.encode()) / 4000 - 0.5) < 0.03
    assert planted.endswith(FACTS[1].statement.encode())


@given(text=st.text(max_size=3000), depths=st.lists(st.floats(0, 1), min_size=2, max_size=2))
@settings(max_examples=80, deadline=None)
def test_planting_keeps_the_text_and_its_characters(text: str, depths: list[float]) -> None:
    length = 1200
    planted = plant(text.encode(), FACTS, depths, length)
    assert len(planted) <= length
    whole = planted.decode()  # Never cut inside a character.
    for fact in FACTS:
        assert fact.statement in whole


def test_planting_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="more than 20"):
        plant(b"text", FACTS, [0, 1], 20)
    with pytest.raises(ValueError, match="as many depths"):
        plant(b"text", FACTS, [0], 2000)
    with pytest.raises(ValueError, match="is not in"):
        Fact("Nothing is here.", "What is here?", "something")


@given(text=st.text(min_size=1, max_size=500), target=st.integers(0, 2000))
@settings(max_examples=80, deadline=None)
def test_boundaries_never_split_a_character(text: str, target: int) -> None:
    raw = text.encode()
    target = min(target, len(raw))
    for boundary in (sentence_boundary, word_boundary):
        place = boundary(raw, target)
        raw[:place].decode()
        raw[place:].decode()


def test_question_prompt() -> None:
    assert question_prompt(" Who? ") == b"\nQuestion: Who?\nAnswer:"


def test_tasks_need_no_torch() -> None:
    code = "import sys, longctx_models.evaluation.needle as n; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture(scope="module", params=["needle", "needle-small"])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    return Path(str(CHECKPOINTS / request.param))


class TestTokenizer:
    @pytest.fixture
    def tokenizer(self, checkpoint: Path):
        tokenizers = pytest.importorskip("tokenizers")
        return tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))

    @pytest.mark.parametrize(
        "text", ["", " a b\n", "\t\x00\x7f", "naïve ā Ċ Ġ", "世界 🙂", "e\u0301 \u200d \ufffd"]
    )
    def test_ids_are_bytes(self, tokenizer, text: str) -> None:
        ids = tokenizer.encode(text).ids
        assert ids == [1, *text.encode()]
        assert tokenizer.encode(text, add_special_tokens=False).ids == [*text.encode()]
        assert tokenizer.decode(ids) == text

    def test_any_text_comes_back(self, tokenizer) -> None:
        @given(text=st.text(max_size=200))
        @settings(max_examples=100, deadline=None)
        def check(text: str) -> None:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            assert bytes(ids) == text.encode()
            assert tokenizer.decode(ids, skip_special_tokens=False) == text

        check()

    def test_long_text_is_fast_enough_and_exact(self, tokenizer) -> None:
        text = held_out_texts()[1].decode()
        ids = tokenizer.encode(text).ids
        assert len(ids) == len(text.encode()) + 1
        assert tokenizer.decode(ids) == text


def test_checkpoint_files(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["model_type"] == "qwen3"
    assert config["vocab_size"] == 256
    assert (checkpoint / "model.safetensors").stat().st_size <= 16 * 2**20
    cells = json.loads((checkpoint / "results.json").read_text())["cells"]
    assert {cell["task"] for cell in cells} == set(TASKS)
    assert "Apache-2.0" in (checkpoint / "MODEL_CARD.md").read_text()


@pytest.mark.slow
@pytest.mark.skipif(
    not TRAINING_FOLDER.exists() or importlib.util.find_spec("torch") is None,
    reason="needs the training folder and PyTorch",
)
def test_training_runs_and_resumes_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(TRAINING_FOLDER / "train.py"), "--preset", "smoke"]
    command += ["--device", "cpu", "--workers", "1", "--samples", "2", "--evaluation-seconds", "1"]
    command += ["--schedule-seconds", "60", "--seconds", "14", "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(TRAINING_FOLDER.parents[1] / "src")}
    steps = []
    for _ in range(2):
        subprocess.run(command, check=True, env=environment, timeout=120)
        steps.append(json.loads((tmp_path / "training.json").read_text())["step"])
    assert 0 < steps[0] < steps[1]
    assert (tmp_path / "model.safetensors").exists()
