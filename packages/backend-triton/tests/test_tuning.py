"""Tables of tuned tiles: the order in which they are asked, broken files, writing."""

from __future__ import annotations

import json
import threading
import warnings
from typing import NamedTuple

import pytest
import torch

from longctx_triton.launch import tuning
from longctx_triton.launch.tuning import (
    Entry,
    TableError,
    asked,
    forced,
    lookup,
    places,
    read_table,
    store,
    tuned,
)

GPU = "NVIDIA H100 80GB HBM3"


class Tiles(NamedTuple):
    """What a choice returns."""

    rows: int
    stages: int
    split: bool = False


OWN = Tiles(128, 2)


@pytest.fixture(autouse=True)
def shop(monkeypatch, tmp_path):
    """Pretend that this GPU is here, with Triton 3.6, no table and empty folders."""
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    monkeypatch.setenv("LONGCTX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(places, "_SHIPPED", shipped)
    for module in (places, lookup):
        monkeypatch.setattr(module, "triton_version", lambda: "3.6")
    monkeypatch.setattr(lookup, "current_gpu", lambda: GPU)
    lookup.tables.cache_clear()
    yield shipped
    lookup.tables.cache_clear()


def choice(kernel="walk", calls=None):
    """Return a choice of tiles, as the launch code has them."""

    @tuned(kernel, apart=("length",))
    def tiles(arch, width, length=1000, *, plain=True):
        if calls is not None:
            calls.append(width)
        return Tiles(128 if length > 100 else 64, 2)

    return tiles


def entry(tiles, *, width=64, default=OWN, plain=True, kernel="walk"):
    """Return an entry for `choice`."""
    facts = {"width": width, "plain": plain}
    return Entry(kernel, facts, default._asdict(), tiles._asdict(), "a case", 2.0, 1.5)


def put(path, *entries, gpu=GPU, triton="3.6"):
    """Store entries."""
    store(path, gpu, triton, {e.key: e for e in entries})


def test_the_users_table_comes_before_the_packages_and_that_before_the_code(shop):
    assert choice()((9, 0), 64) == Tiles(128, 2)
    lookup.tables.cache_clear()
    put(shop / "h100.json", entry(Tiles(32, 3)), entry(Tiles(16, 4), width=128))
    assert choice()((9, 0), 64) == Tiles(32, 3)
    lookup.tables.cache_clear()
    put(tuning.user_table(GPU), entry(Tiles(256, 5, True)))
    tiles = choice()
    assert tiles((9, 0), 64) == Tiles(256, 5, True)
    assert tiles((9, 0), 128) == Tiles(16, 4)
    assert tiles((9, 0), 256) == Tiles(128, 2)
    assert isinstance(tiles((9, 0), 64), Tiles)


def test_an_entry_holds_for_its_facts_and_for_the_tiles_that_it_was_compared_with(shop):
    put(shop / "h100.json", entry(Tiles(32, 3)), entry(Tiles(8, 8), default=Tiles(128, 3)))
    tiles = choice()
    assert tiles((9, 0), 64, 500) == tiles(arch=(9, 0), width=64, length=5000) == Tiles(32, 3)
    assert tiles((9, 0), 64, 50) == Tiles(64, 2)
    assert tiles((9, 0), 64, plain=False) == Tiles(128, 2)
    assert choice("other")((9, 0), 64) == Tiles(128, 2)


def test_no_gpu_no_table(shop, monkeypatch):
    put(shop / "h100.json", entry(Tiles(32, 3)))
    monkeypatch.setattr(lookup, "current_gpu", lambda: "")
    monkeypatch.setattr(lookup, "read_table", None)
    assert choice()((0, 0), 64) == Tiles(128, 2)


def test_gpus_have_tables_of_their_own(shop, monkeypatch):
    put(shop / "h100.json", entry(Tiles(32, 3)))
    put(shop / "h200.json", entry(Tiles(32, 4)), gpu="NVIDIA H200")
    tiles = choice()
    assert tiles((9, 0), 64) == Tiles(32, 3)
    monkeypatch.setattr(lookup, "current_gpu", lambda: "NVIDIA H200")
    assert tiles((9, 0), 64) == Tiles(32, 4)
    monkeypatch.setattr(lookup, "current_gpu", lambda: "NVIDIA A100-SXM4-80GB")
    assert tiles((9, 0), 64) == Tiles(128, 2)
    assert tuning.user_table("NVIDIA H200").name == "nvidia-h200-triton3.6.json"


def test_a_second_call_reads_no_file_and_chooses_nothing(shop, monkeypatch):
    put(shop / "h100.json", entry(Tiles(32, 3)))
    calls = []
    tiles = choice(calls=calls)
    assert tiles((9, 0), 64) == Tiles(32, 3)
    monkeypatch.setattr(lookup, "read_table", None)
    assert tiles((9, 0), 64) == tiles((9, 0), 64) == Tiles(32, 3)
    assert tiles((9, 0), 128) == Tiles(128, 2)
    assert calls == [64, 128]


def test_answers_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(lookup, "MOST_REMEMBERED", 3)
    calls = []
    tiles = choice(calls=calls)
    for length in range(1, 11):
        assert tiles((9, 0), length, length) == Tiles(64, 2)
    assert len(calls) == 10
    assert tiles((9, 0), 10, 10) == Tiles(64, 2)
    assert len(calls) == 10


GOOD = {
    "format": 1, "gpu": GPU, "triton": "3.6",
    "entries": [
        {
            "kernel": "walk", "facts": {"width": 64, "plain": True},
            "default": {"rows": 128, "stages": 2, "split": False},
            "tiles": {"rows": 32, "stages": 3, "split": False},
        }
    ],
}  # fmt: skip


def changed(**parts):
    """Return the text of a file with other parts; those of an entry by their names."""
    content = json.loads(json.dumps(GOOD))
    for name, value in parts.items():
        (content if name in content else content["entries"][0])[name] = value
    return json.dumps(content)


def test_the_file_of_these_tests_is_good():
    path = tuning.user_table(GPU)
    path.parent.mkdir(parents=True)
    path.write_text(changed())
    assert choice()((9, 0), 64) == Tiles(32, 3)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("\ufffd\x00", "not JSON"),
        ("[]", "not a table"),
        ('{"format": 1}', "not a table"),
        (changed(format=2), "format 2, this version reads 1"),
        (changed(gpu="NVIDIA A100-SXM4-80GB"), "made on NVIDIA A100-SXM4-80GB with Triton 3.6"),
        (changed(triton="3.9"), "with Triton 3.9"),
        (changed(gpu=None), "the GPU or the version of Triton is missing"),
        (changed(entries=[3]), "an entry names no kernel"),
        (changed(kernel=7), "an entry names no kernel"),
        (changed(facts=[1]), "facts of an entry of walk"),
        (changed(facts={"width": 1.5}), "facts of an entry of walk"),
        (changed(tiles={"rows": 32}), "other fields than its default"),
        (changed(tiles={"rows": "32", "stages": 3, "split": False}), "other fields"),
        (changed(tiles={"rows": True, "stages": 3, "split": False}), "other fields"),
        (changed(tiles={"rows": -1, "stages": 3, "split": False}), "negative"),
        (changed(default_ms="slow"), "of a wrong type"),
    ],
)
def test_a_broken_or_foreign_file_is_named_once_and_ignored(text, why):
    path = tuning.user_table(GPU)
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")
    tiles = choice()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert tiles((9, 0), 64) == tiles((9, 0), 128) == Tiles(128, 2)
    (warning,) = told
    assert str(path) in str(warning.message)
    assert why in str(warning.message)
    assert "longctx tune" in str(warning.message)


def test_a_folder_in_the_files_place_is_ignored_too():
    path = tuning.user_table(GPU)
    path.mkdir(parents=True)
    with pytest.warns(RuntimeWarning, match="directory"):
        assert choice()((9, 0), 64) == Tiles(128, 2)


def test_the_packages_table_of_another_compiler_is_not_used_and_not_complained_of(shop):
    put(shop / "h100.json", entry(Tiles(32, 3)), triton="3.9")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choice()((9, 0), 64) == Tiles(128, 2)


def test_no_home_no_table(monkeypatch):
    monkeypatch.delenv("LONGCTX_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(places.Path, "home", homeless)
    assert choice()((9, 0), 64) == Tiles(128, 2)


def test_store_keeps_replaces_and_removes(tmp_path):
    path = tmp_path / "folder" / "table.json"
    first, other = entry(Tiles(32, 3)), entry(Tiles(16, 4), width=128)
    put(path, first, other)
    better = entry(Tiles(256, 3))
    store(path, GPU, "3.6", {better.key: better, other.key: None})
    table = read_table(path)
    assert (table.gpu, table.triton, dict(table.entries)) == (GPU, "3.6", {first.key: better})
    assert path.read_text().count("\n") == 8
    store(path, GPU, "3.6", {better.key: None})
    assert not read_table(path).entries
    assert [p.name for p in path.parent.iterdir()] == ["table.json"]


def test_store_starts_anew_for_another_compiler_and_over_a_broken_file(tmp_path):
    path = tmp_path / "table.json"
    put(path, entry(Tiles(32, 3)))
    put(path, entry(Tiles(16, 4), width=128), triton="3.9")
    assert [e.tiles["rows"] for e in read_table(path).entries.values()] == [16]
    path.write_text("{")
    put(path, entry(Tiles(32, 3)))
    assert [e.tiles["rows"] for e in read_table(path).entries.values()] == [32]


def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    put(path, entry(Tiles(32, 3)))
    before = path.read_text()

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(tuning.table.os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        put(path, entry(Tiles(16, 4)))
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["table.json"]


def test_two_writers_lose_nothing_and_readers_see_whole_files(tmp_path):
    path = tmp_path / "table.json"
    put(path, entry(Tiles(1, 1), width=0))
    broken = []

    def write(kernel):
        for width in range(20):
            put(path, entry(Tiles(32, 3), width=width, kernel=kernel))

    def read():
        while any(writer.is_alive() for writer in writers):
            try:
                read_table(path)
            except (TableError, FileNotFoundError) as error:
                broken.append(error)

    writers = [threading.Thread(target=write, args=(name,)) for name in ("one", "two")]
    reader = threading.Thread(target=read)
    for thread in (*writers, reader):
        thread.start()
    for thread in (*writers, reader):
        thread.join()
    assert not broken
    assert len(read_table(path).entries) == 41


def test_facts_of_any_type_can_be_written(tmp_path):
    @tuned("typed")
    def tiles(dtype, window=None):
        return OWN

    with asked() as questions:
        tiles(torch.bfloat16)
    (question,) = questions.values()
    assert question.facts == {"dtype": "torch.bfloat16", "window": "None"}
    found = Entry("typed", question.facts, OWN._asdict(), Tiles(1, 1)._asdict())
    put(tmp_path / "table.json", found)
    assert question.key in read_table(tmp_path / "table.json").entries


def test_forced_tiles_hold_as_long_as_they_are_forced(shop):
    put(shop / "h100.json", entry(Tiles(32, 3)))
    tiles = choice()
    with asked() as questions:
        assert tiles((9, 0), 64) == Tiles(32, 3)
    (question,) = questions.values()
    assert (question.kernel, question.default) == ("walk", Tiles(128, 2))
    assert question.facts == {"width": 64, "plain": True}
    with forced(question.key, {"rows": 1, "stages": 1, "split": False}):
        assert tiles((9, 0), 64) == Tiles(1, 1)
        assert tiles((9, 0), 128) == Tiles(128, 2)
    assert tiles((9, 0), 64) == Tiles(32, 3)


def test_the_packages_own_tables_can_be_read():
    folder = places.Path(places.__file__).parents[2] / "tuned"
    names = [path.stem for path in folder.glob("*.json")]
    assert "h100" in names
    for name in names:
        table = read_table(folder / f"{name}.json")
        assert name.upper() in table.gpu
        for found in table.entries.values():
            assert found.tiles != found.default
            assert found.tuned_ms < found.default_ms
