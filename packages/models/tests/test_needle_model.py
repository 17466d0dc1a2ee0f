"""The shipped weights answer questions at 4K, and the engine agrees with transformers on them."""

from __future__ import annotations

import pytest
import torch

from longctx_models import LongContextLLM, packaged_checkpoints
from longctx_models.evaluation.needle import TASKS, held_out_source, make_sample

LENGTH = 4096
SAMPLES = 5


@pytest.fixture(scope="module")
def llm():
    return LongContextLLM.load("needle", device="cpu")


@pytest.fixture(scope="module")
def source():
    return held_out_source()


@pytest.mark.parametrize("task", TASKS)
def test_shipped_weights_answer_at_4k(llm, source, task):
    right = 0
    for number in range(SAMPLES):
        depth = number / (SAMPLES - 1)
        sample = make_sample(task, LENGTH, depth, f"{task}-{number}", source)
        out = llm.generate(
            sample.context.decode(), query=sample.question.decode(), max_new_tokens=80
        )
        right += out.text + "\n" == sample.answer.decode()
    # the stated accuracies are 0.97 and more: two wrong of five is a broken model or engine
    assert right >= SAMPLES - 1


def test_both_checkpoints_are_packaged_within_their_size():
    found = packaged_checkpoints()
    assert set(found) == {"needle", "needle-small"}
    for folder in found.values():
        assert (folder / "model.safetensors").stat().st_size <= 16 * 2**20
        assert (folder / "MODEL_CARD.md").is_file()


@pytest.mark.parametrize("name", ["needle", "needle-small"])
def test_logits_equal_those_of_transformers(name, source):
    transformers = pytest.importorskip("transformers")
    folder = packaged_checkpoints()[name]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = LongContextLLM.load(name, device="cpu", dtype=torch.float32)
    sample = make_sample("single_needle", 1024, 0.4, 5, source)
    ids = ours.prompt(sample.context.decode(), sample.question.decode()).ids
    with torch.inference_mode():
        expected = theirs(torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(ours.prefill_logits(ids), expected, atol=1e-4, rtol=0)
