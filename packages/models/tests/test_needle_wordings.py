"""The English of the training facts: plenty of it, and none of it from a test set."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import ModuleType

import pytest

from longctx_models.evaluation.needle.templates import HELD_OUT, Templates
from longctx_models.evaluation.needle.unseen_templates import UNSEEN

TRAINING_FOLDER = Path(__file__).parents[1] / "training" / "needle"
DRAWS = 50_000
either_test_set = pytest.mark.parametrize("templates", [HELD_OUT, UNSEEN], ids=["held", "unseen"])


@pytest.fixture(scope="module")
def wordings() -> ModuleType:
    if not (TRAINING_FOLDER / "wordings.py").exists():
        pytest.skip("needs the training folder")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TRAINING_FOLDER)
        import wordings

        patch.delitem(sys.modules, "wordings")
    return wordings


@either_test_set
def test_no_copula_of_a_test_set(wordings: ModuleType, templates: Templates) -> None:
    rng = random.Random(0)
    drawn = {wordings.copula(rng) for _ in range(DRAWS)}
    assert len(drawn) > 3000
    assert not drawn.intersection(templates.copulas)


@either_test_set
def test_no_question_of_a_test_set(wordings: ModuleType, templates: Templates) -> None:
    rng = random.Random(0)
    drawn = {wordings.question(rng) for _ in range(DRAWS)}
    assert len(drawn) > 10_000
    assert not drawn.intersection(templates.questions)
    assert all(question.count("{np}") == 1 for question in drawn)


@either_test_set
def test_no_verb_frame_of_a_test_set(wordings: ModuleType, templates: Templates) -> None:
    rng = random.Random(0)
    drawn = {wordings.verb_frame(rng) for _ in range(DRAWS)}
    assert len(drawn) > 3000
    held_out = {part for pair in templates.verb_frames for part in pair}
    assert not held_out.intersection(part for pair in drawn for part in pair)
    for statement, question in drawn:
        assert statement.count("{v}") == question.count("{e}") == 1
        assert "{v}" not in question
        assert ("{w}" in statement) == ("{w}" in question)


@either_test_set
def test_nothing_else_of_a_test_set(wordings: ModuleType, templates: Templates) -> None:
    assert not set(wordings.NOUN_PHRASES).intersection(templates.noun_phrases)
    assert not set(wordings.OPENINGS).intersection(templates.openings)
    assert not set(wordings.CLOSINGS).intersection(templates.closings)
    assert len(wordings.NOUN_PHRASES) > 200
