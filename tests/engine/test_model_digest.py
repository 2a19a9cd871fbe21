"""A model's digest follows its bytes, not its name."""

import os

import pytest

from engine.model_digest import NoWeights, model_digest


def test_same_bytes_elsewhere_have_the_same_digest(model):
    before = model_digest(model)
    moved = model.rename(model.with_name("another-name"))
    assert model_digest(moved) == before == model_digest(moved)


def test_another_weight_under_the_same_name_has_another_digest(model):
    before = model_digest(model)
    (model / "model.safetensors").write_bytes(b"w" * 999 + b"x")
    assert model_digest(model) != before


def test_another_configuration_of_the_same_weights_has_another_digest(model):
    before = model_digest(model)
    (model / "config.json").write_text('{"rope_theta": 12345.0}')
    assert model_digest(model) != before


def test_another_weight_in_a_file_of_the_same_size_and_time_has_another_digest(model):
    file = model / "model.safetensors"
    before, times = model_digest(model), file.stat()
    with file.open("r+b") as stream:  # in place: its inode stays too
        stream.write(b"x")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file.stat().st_mtime_ns == times.st_mtime_ns
    assert model_digest(model) != before


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(NoWeights):
        model_digest(tmp_path)
