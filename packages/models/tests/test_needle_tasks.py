"""The needle model's tasks, wordings and tokenizer; nothing here loads a model's weights."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import subprocess
import sys
from importlib import resources
from itertools import combinations, pairwise
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx_models.evaluation.needle import (
    TASKS,
    TRAINING_TASKS,
    Fact,
    TextSource,
    held_out_source,
    make_sample,
    plant,
    question_prompt,
    training_source,
)
from longctx_models.evaluation.needle.facts import fact_about, random_facts
from longctx_models.evaluation.needle.placement import sentence_boundary, word_boundary
from longctx_models.evaluation.needle.retired_templates import RETIRED
from longctx_models.evaluation.needle.tasks import needles_that_fit
from longctx_models.evaluation.needle.templates import HELD_OUT, TRAINING, Templates
from longctx_models.evaluation.needle.text import held_out_texts, training_texts
from longctx_models.evaluation.needle.unseen_templates import UNSEEN

ALL_TASKS = [*TASKS, *TRAINING_TASKS]
CHECKPOINTS = resources.files("longctx_models") / "checkpoints"
TRAINING_FOLDER = Path(__file__).parents[1] / "training" / "needle"
TEMPLATES = {
    "training": TRAINING,
    "retired": RETIRED,
    "held out": HELD_OUT,
    "unseen": UNSEEN,
}
# The retired wordings are trained on, so they are no test set.
either_test_set = pytest.mark.parametrize("templates", [HELD_OUT, UNSEEN], ids=["held", "unseen"])
two_sets = pytest.mark.parametrize(
    ("one", "other"),
    [*combinations(TEMPLATES.values(), 2)],
    ids=["-".join(names) for names in combinations(TEMPLATES, 2)],
)


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


@pytest.mark.parametrize(
    "task", ["single_needle", "multi_needle_16", "facts", "facts_unseen", "key_value_lines"]
)
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


@pytest.mark.parametrize("task", ["facts", "facts_unseen"])
def test_a_fact_answer_is_in_its_statement(task: str) -> None:
    for seed in range(50):
        sample = make_sample(task, 2048, 0.5, seed)
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


@two_sets
@pytest.mark.parametrize(
    "part",
    [
        *("attributes", "nouns", "adjectives", "names", "noun_phrases", "copulas"),
        *("openings", "closings", "questions", "verb_frames"),
    ],
)
def test_no_two_sets_share_a_template(one: Templates, other: Templates, part: str) -> None:
    shared = set(getattr(one, part)) & set(getattr(other, part))
    assert shared <= {"", "."}  # No opening and a plain full stop are not templates.


@two_sets
def test_no_two_sets_share_a_half_of_a_verb_frame(one: Templates, other: Templates) -> None:
    for half in (0, 1):
        assert not {f[half] for f in one.verb_frames} & {f[half] for f in other.verb_frames}


@two_sets
def test_no_two_sets_share_a_word(one: Templates, other: Templates) -> None:
    assert not one.words() & other.words()


@either_test_set
def test_words_of_a_test_set_are_not_trained_on(templates: Templates) -> None:
    kept_out = templates.words() | templates.frame_words()
    assert not kept_out.intersection(training_source().words)


def test_facts_unseen_uses_the_unseen_wordings() -> None:
    def stems(templates: Templates) -> set[str]:
        return {re.split(r"{\w+}", question)[0] for question in templates.questions} - {""}

    asked = [make_sample("facts_unseen", 1024, 0.5, seed).question.decode() for seed in range(100)]
    begun = {s for s in stems(UNSEEN) for a in asked if a.startswith(f"\nQuestion: {s}")}
    assert begun == stems(UNSEEN)
    assert not [
        a for a in asked if a.startswith(tuple(f"\nQuestion: {s}" for s in stems(HELD_OUT)))
    ]


@either_test_set
def test_there_are_many_wordings_to_test(templates: Templates) -> None:
    wordings = len(templates.noun_phrases) * len(templates.copulas) + len(templates.verb_frames)
    assert wordings >= 200
    rng = random.Random(0)
    facts = [fact_about(rng, templates, "tie", "Zoe", "7") for _ in range(2000)]
    assert len({(fact.statement, fact.question) for fact in facts}) >= 200


def test_unseen_is_as_large_as_held_out() -> None:
    sizes = [
        {part: len(set(entries)) for part, entries in vars(templates).items()}
        for templates in (HELD_OUT, UNSEEN)
    ]
    assert sizes[0] == sizes[1]


@either_test_set
def test_facts_of_one_sample_have_different_questions_and_findable_answers(
    templates: Templates,
) -> None:
    rng = random.Random(1)
    for _ in range(50):
        facts = random_facts(rng, templates, held_out_source().content_words, 8)
        assert len({fact.question for fact in facts}) == 8
        assert all(fact.answer in fact.statement for fact in facts)
        assert not any("the the " in fact.statement for fact in facts)


@pytest.fixture(scope="module")
def fact_mixture() -> ModuleType:
    path = TRAINING_FOLDER / "fact_mixture.py"
    if not path.exists():
        pytest.skip("needs the training folder")
    spec = importlib.util.spec_from_file_location("fact_mixture", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        # Data classes look their module up while it is executed.
        patch.setitem(sys.modules, spec.name, module)
        # The training scripts import one another by bare name.
        patch.syspath_prepend(TRAINING_FOLDER)
        spec.loader.exec_module(module)
    return module


@either_test_set
def test_training_never_makes_up_a_copula_of_a_test_set(
    fact_mixture: ModuleType, templates: Templates
) -> None:
    # Drawing from these very words and their stems makes a collision likely, not just possible.
    words = {word for copula in templates.copulas for word in copula.split()}
    words |= {word.removesuffix(ending) for word in words for ending in ("s", "ed", "ly")}
    source = TextSource((), (), tuple(sorted(words)))
    writer = fact_mixture.FactWriter(random.Random(0), source)
    drawn = {writer._any_copula() for _ in range(50_000)}
    assert len(drawn) > 1000
    assert not drawn.intersection(templates.copulas)


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
    command += ["--schedule-seconds", "90", "--seconds", "25", "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(TRAINING_FOLDER.parents[1] / "src")}
    steps = []
    for _ in range(2):
        subprocess.run(command, check=True, env=environment, timeout=120)
        steps.append(json.loads((tmp_path / "training.json").read_text())["step"])
    assert 0 < steps[0] < steps[1]
    assert (tmp_path / "model.safetensors").exists()
