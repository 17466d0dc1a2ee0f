"""A checkpoint may state the method options that suit it; the caller's options win."""

from __future__ import annotations

import json
import shutil

import pytest

from longctx.errors import CheckpointError
from longctx_models import LongContextLLM, packaged_checkpoints
from longctx_models.methods import TokenSparse, make_method
from longctx_models.selectors.layers import LayerList


@pytest.fixture
def folder(tmp_path):
    copy = tmp_path / "checkpoint"
    shutil.copytree(packaged_checkpoints()["needle-small"], copy)
    return copy


def test_stated_options_hold_until_the_caller_says_otherwise(folder):
    stated = {"methods": {"token-sparse": {"layers": "1,3", "drop_mass": 0.25}}}
    (folder / "longctx.json").write_text(json.dumps(stated))
    llm = LongContextLLM.load(folder, method="token-sparse", device="cpu")
    assert llm.method == TokenSparse(drop_mass=0.25, layers=LayerList((1, 3)))
    changed = llm.make_method("token-sparse", drop_mass="0.5")
    assert changed == TokenSparse(drop_mass=0.5, layers=LayerList((1, 3)))
    assert llm.make_method("star") == make_method("star")
    given = TokenSparse()
    assert llm.make_method(given) is given


def test_without_the_file_nothing_is_stated(folder):
    llm = LongContextLLM.load(folder, method="token-sparse", device="cpu")
    assert llm.method == TokenSparse()


@pytest.mark.parametrize("text", ["{", "{}", '{"methods": []}', '{"methods": {"star": 4}}'])
def test_a_damaged_file_is_refused(folder, text):
    (folder / "longctx.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"longctx\.json"):
        LongContextLLM.load(folder, device="cpu")


def test_the_needle_checkpoint_leaves_all_but_its_last_layer_dense():
    llm = LongContextLLM.load("needle", method="token-sparse", device="cpu")
    assert llm.method.layers == LayerList((5,))
