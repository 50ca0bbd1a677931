"""Trainings by the recipes go on to the same bits, with what they draw from images, texts, clouds, clips and tasks."""

import glue_files
import pytest
import test_byte_glue
import test_byte_text
import test_clips_training
import test_perceiver_io_images
import test_points
from test_clips_training import data  # noqa: F401, the fixture
from test_resume import content

from mmkernels.__main__ import main
from mmkernels.train import checkpoint


def images(folder, _):
    options = test_perceiver_io_images.tables(folder)
    return ["train", "perceiver-io", *options, "--epochs", 2, "--batch-size", 6, "--randaugment", "4,5"]


def clouds(folder, _):
    test_points.write_clouds(folder / "data", each=3)
    (folder / "tiny.json").write_text(test_points.json.dumps(test_points.TINY))
    options = ["--config", folder / "tiny.json", "--points", 16, "--steps", 5, "--batch-size", 2, "--threads", 1]
    return ["train", "perceiver-points", "--data", folder / "data", *options]


def clips(folder, data):  # noqa: F811
    return [*test_clips_training.command(data, folder), "--epochs", 2]


def texts(folder, _):
    (folder / "text.txt").write_text(test_byte_text.TEXT * 40, encoding="utf-8")
    (folder / "more.txt").write_text("one two three\n" * 200)
    (folder / "tiny.json").write_text(test_byte_text.json.dumps(test_byte_text.TINY))
    return [*test_byte_text.command(folder), "--text", folder / "more.txt", "--weights", "7,3"]


def glue(folder, _):
    glue_files.write(folder / "glue", "cola", "rte", "stsb")
    (folder / "tiny.json").write_text(test_byte_glue.json.dumps(test_byte_glue.TINY))
    return test_byte_glue.command(folder)


@pytest.mark.parametrize("build", [images, clouds, clips, texts, glue])
def test_an_interrupted_training_goes_on_to_the_same_bits(build, data, tmp_path, monkeypatch, capsys):  # noqa: F811
    arguments = [str(argument) for argument in (*build(tmp_path, data), "--save-every", 1)]
    assert main([*arguments, "--output", str(tmp_path / "whole")]) == 0
    killed = [*arguments, "--output", str(tmp_path / "killed")]
    save, calls = checkpoint.save, []

    def dying(*state):
        calls.append(1)
        if len(calls) in (2, 4):
            raise KeyboardInterrupt
        save(*state)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", dying)
        assert main(killed) == 130 and main(killed) == 130
    capsys.readouterr()
    assert main(killed) == 0 and "resuming" in capsys.readouterr().out
    for name in ("model.safetensors", checkpoint.NAME):
        assert content(tmp_path / "killed" / name) == content(tmp_path / "whole" / name), name
