"""Small trainings from the command line to the prediction, and what happens with bad input."""

import json
import shutil

import pytest
import torch
from PIL import Image

from mmkernels import models
from mmkernels.__main__ import main
from mmkernels.train import compare, loop
from mmkernels.train.data import batches, digits, loader
from mmkernels.train.data.images import Preprocessing

SMALL = "--latents 8 --latent-dim 16 --heads 2 --cross-attends 2 --layers 1 --bands 4 --threads 1 --backend eager".split()


def run(capsys, *arguments):
    """(exit status, standard output, standard error)."""
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def fails(capsys, message, *arguments):
    """The command ends with status 2 and one line on standard error that has `message`."""
    status, _, error = run(capsys, *arguments)
    assert status == 2
    assert message in error and error.count("\n") == 1 and error.startswith("error: "), error


# --- Digits -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short training of the digits at a low resolution."""
    folder = tmp_path_factory.mktemp("digits")
    options = [*SMALL, "--image-size", "8", "--epochs", "5", "--batch-size", "32", "--lr", "8e-3", "--no-compare"]
    assert main(["train", "perceiver-digits", "--output", str(folder), *options]) == 0
    return folder


def test_accuracy_rises(trained):
    history = json.loads((trained / "task.json").read_text())["history"]
    assert [row["epoch"] for row in history] == list(range(1, 6))
    assert history[-1]["accuracy"] > 0.6 > history[0]["accuracy"]
    assert history[-1]["loss"] < history[0]["loss"] and history[-1]["held_out_loss"] < history[0]["held_out_loss"]


def test_what_a_training_leaves(trained):
    assert {path.name for path in trained.iterdir()} == {
        ".lock",
        "config.json",
        "learning-curve.png",
        "model.safetensors",
        "task.json",
        "training.safetensors",
    }
    with Image.open(trained / "learning-curve.png") as image:
        image.verify()
    assert models.load(trained).config.input_shape == (8, 8)


def test_predict_reads_files_of_any_size_and_polarity(trained, tmp_path, capsys):
    _, held_out, _ = digits.load(8, seed=0)
    model, expected = models.load(trained).eval(), []
    for i in range(20):
        pixels = (held_out.images[i, 0] * 255).byte().numpy()
        image = Image.fromarray(pixels).resize((64, 64), Image.Resampling.NEAREST)
        if i % 2:  # dark on white, in colour
            image = Image.eval(image, lambda v: 255 - v).convert("RGB")
        image.save(tmp_path / f"{i:02}.png")
        expected.append(model(held_out[None, i][0][None]).softmax(-1)[0].max(-1))
    status, out, _ = run(capsys, "predict", *sorted(tmp_path.glob("*.png")), "--checkpoint", trained, "--backend", "eager")
    rows = [line.split("\t") for line in out.splitlines()]
    assert status == 0 and len(rows) == 20 and rows[3][0].endswith("03.png")
    for (_, name, probability), (highest, label) in zip(rows, expected, strict=True):
        assert abs(float(probability) - highest) < 0.02  # the files have 256 levels, the data has 17
        assert int(name) == label or highest < 0.5


def test_comparison_line(trained):
    model = models.load(trained, backend="eager")
    costs = compare.compare(model, batch_size=32, budget=0.1)
    line = compare.describe(costs, model, 32)
    assert "plain PyTorch" in line and "batch 32" in line and "\n" not in line
    # The same model on the same path twice: the same memory, within the noise of a process.
    assert abs(costs["fused"].bytes - costs["eager"].bytes) < 4 * 2**20 and costs["fused"].bytes > 2**18


# --- A folder of images ------------------------------------------------------------------------------------------------


def write_images(folder, per_class=8, classes=("blue", "red")):
    generator = torch.Generator().manual_seed(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = torch.randint(0, 100, (20, 30, 3), generator=generator, dtype=torch.uint8)
            pixels[..., {"red": 0, "green": 1, "blue": 2}[name]] += 150
            Image.fromarray(pixels.numpy()).save(folder / name / f"{i}.{'jpg' if i % 2 else 'png'}")
    return folder


def test_folder_training_and_prediction(tmp_path, capsys):
    data, output = write_images(tmp_path / "data"), tmp_path / "run"
    options = [*SMALL, "--image-size", 8, "--epochs", 10, "--batch-size", 4, "--lr", "5e-3", "--no-compare", "--flip"]
    status, out, _ = run(capsys, "train", "perceiver", "--data", data, "--output", output, "--val-fraction", 0.25, *options)
    assert status == 0 and "12 images to train on, 4 held out, 2 classes" in out and "accuracy 100.00%" in out
    status, out, _ = run(capsys, "predict", data / "red/0.png", data / "blue/1.jpg", "--checkpoint", output)
    assert status == 0 and [line.split("\t")[1] for line in out.splitlines()] == ["red", "blue"]


def test_folder_with_held_out_folder(tmp_path, capsys):
    data, held = write_images(tmp_path / "a", 3), write_images(tmp_path / "b", 2)
    options = [*SMALL, "--image-size", 8, "--epochs", 1, "--batch-size", 4, "--no-compare", "--output", tmp_path / "run"]
    status, out, _ = run(capsys, "train", "perceiver", "--data", data, "--val-data", held, *options)
    assert status == 0 and "6 images to train on, 4 held out" in out
    other = write_images(tmp_path / "c", 2, ("green", "red"))
    fails(capsys, "other classes", "train", "perceiver", "--data", data, "--val-data", other, *options)


def test_files_of_the_system_are_no_images(tmp_path, capsys):
    data = write_images(tmp_path / "data", 3)
    (data / "red/._0.png").write_bytes(b"what a Mac puts beside a copied file")
    (data / ".git").mkdir()
    options = [*SMALL, "--image-size", 8, "--epochs", 1, "--no-compare", "--output", tmp_path / "run"]
    status, out, _ = run(capsys, "train", "perceiver", "--data", data, *options)
    assert status == 0 and "4 images to train on, 2 held out, 2 classes" in out


def test_bad_folders(tmp_path, capsys):
    def check(message, data):
        output = tmp_path / "run"
        fails(capsys, message, "train", "perceiver", "--data", data, "--output", output, *SMALL)
        assert not output.exists()

    check("is not a folder", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    check("has no class folders", tmp_path / "empty")
    check("only the class 'red'", write_images(tmp_path / "one", 2, ("red",)))
    (write_images(tmp_path / "two", 2) / "green").mkdir()
    check("green has no images", tmp_path / "two")
    check("blue has one image", write_images(tmp_path / "three", 1))
    options = ["--val-fraction", "0.9", "--output", tmp_path / "run", *SMALL]
    fails(
        capsys,
        "--val-fraction is 0.9, which holds out 5 of 6",
        "train",
        "perceiver",
        "--data",
        write_images(tmp_path / "five", 3),
        *options,
    )
    whole = write_images(tmp_path / "four", 3) / "red/0.png"
    whole.write_bytes(whole.read_bytes()[:300])
    check("red/0.png cannot be read as an image", tmp_path / "four")
    whole.write_text("not an image")
    check("red/0.png cannot be read as an image", tmp_path / "four")


# --- Other bad input --------------------------------------------------------------------------------------------------


def test_bad_flags(tmp_path, capsys):
    def check(message, *arguments):
        fails(capsys, message, "train", "perceiver-digits", "--output", tmp_path / "run", *arguments)
        assert not (tmp_path / "run").exists()

    check("known are ca-mtl-base", "--config", "perceiver-digit")
    check("which is no Perceiver; allowed are perceiver-imagenet", "--config", "mbt-digits")
    check("latent_channels is 30; it must be a multiple of self_heads, 4", "--latent-dim", "30", "--heads", "4")
    check("does not fit into memory", "--latents", "1000000000000000")
    check("--device is 'meta'", "--device", "meta")
    check("--device is ''", "--device", "")
    check("backend is 'gpu'", "--backend", "gpu")
    check("--device is 'tpu'", "--device", "tpu")
    for arguments in (
        ["--epochs", "0"],
        ["--lr", "nan"],
        ["--latents", "x"],
        ["--lr", "-1"],
        ["--resume", "--restart"],
        ["--seed", "-1"],
        ["--seed", str(2**32)],
        ["--threads", "100000"],
    ):
        with pytest.raises(SystemExit) as error:
            main(["train", "perceiver-digits", *arguments])
        assert error.value.code == 2


def test_bad_checkpoints(trained, tmp_path, capsys):
    image = tmp_path / "image.png"
    Image.new("L", (8, 8)).save(image)
    fails(capsys, "is not a folder", "predict", image, "--checkpoint", tmp_path / "nowhere")
    fails(capsys, "has no config.json", "predict", image, "--checkpoint", tmp_path)
    fails(capsys, "gone.png cannot be read", "predict", image, tmp_path / "gone.png", "--checkpoint", trained)
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("config.json", "model.safetensors", "task.json"):
        (copy / name).write_bytes((trained / name).read_bytes())
    (copy / "model.safetensors").write_bytes((trained / "model.safetensors").read_bytes()[:-10])
    fails(capsys, "model.safetensors cannot be read", "predict", image, "--checkpoint", copy)
    (copy / "model.safetensors").write_bytes((trained / "model.safetensors").read_bytes())
    task = json.loads((copy / "task.json").read_text())
    (copy / "task.json").write_text(json.dumps({**task, "classes": ["a"]}))
    fails(capsys, "8 x 8 x 1, config.json has 10 classes", "predict", image, "--checkpoint", copy)
    (copy / "task.json").write_text(json.dumps({"classes": task["classes"]}))
    fails(capsys, "task.json", "predict", image, "--checkpoint", copy)


def test_a_missing_library_names_the_extra(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    fails(capsys, "pip install mmkernels[train]", "train", "perceiver-digits", "--output", tmp_path / "run")


# --- The parts ------------------------------------------------------------------------------------------------------------


def test_order_and_augmentation_come_from_seed_epoch_and_index():
    first = batches(10, 4, 0, 3)
    assert first == batches(10, 4, 0, 3) != batches(10, 4, 0, 4) and batches(10, 4, 1, 3) != first
    assert [len(batch) for batch in first] == [4, 4] and len({key for batch in first for key in batch}) == 8
    assert batches(5, 4, None, None) == [[(None, 0), (None, 1), (None, 2), (None, 3)], [(None, 4)]]
    training, *_ = digits.load(12, seed=0)
    assert torch.equal(training[3, 7][0], training[3, 7][0])
    assert not torch.equal(training[3, 7][0], training[4, 7][0])
    state = torch.get_rng_state()
    (images, labels), *_ = loader(training, [[(0, 1), (0, 2)]])
    assert images.shape == (2, 12, 12, 1) and labels.tolist() == training.labels[1:3]
    assert torch.equal(torch.get_rng_state(), state)  # loading draws nothing from the global generator


def test_learning_rate():
    settings = loop.Settings(epochs=1, batch_size=1, learning_rate=2.0, warmup_steps=10)
    rates = [loop.learning_rate(settings, step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[10] == pytest.approx(2.0, rel=0.03) and rates[100] == 0
    assert rates[:10] == sorted(rates[:10]) and rates[15:] == sorted(rates[15:], reverse=True)


def test_preprocessing(tmp_path):
    preprocessing = Preprocessing("L", 6, [0.5], [0.5], native_size=3, dark_background=True)
    image = torch.zeros(3, 3)
    image[1, 1] = 1.0
    Image.fromarray((image * 255).byte().numpy()).save(tmp_path / "dark.png")
    Image.fromarray(((1 - image) * 255).byte().numpy()).save(tmp_path / "bright.png")
    for name in ("dark.png", "bright.png"):
        assert torch.equal(preprocessing.read(tmp_path / name)[0], image)
    finished = preprocessing.finish(image[None])
    assert finished.shape == (6, 6, 1) and finished.min() == -1  # (0 - 0.5) / 0.5
    with pytest.raises(ValueError, match="mode is 'CMYK'"):
        Preprocessing("CMYK", 6, [0.5], [0.5])


def test_pixels_as_a_viewer_shows_them(tmp_path):
    """16 bits a channel, transparency and rotation by EXIF give what the plain 8-bit image gives."""
    grey = torch.randint(0, 256, (12, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image, preprocessing = Image.fromarray(grey.numpy()), Preprocessing("L", 12, [0.0], [1.0])

    def read(saved, name, **options):
        saved.save(tmp_path / name, **options)
        return preprocessing.read(tmp_path / name)

    expected = read(image, "grey.png")
    assert torch.equal((expected[0] * 255).round().byte(), grey)
    assert torch.equal(read(Image.fromarray(grey.numpy().astype("uint16") * 257), "sixteen.png"), expected)
    strokes = Image.new("LA", (12, 12), 0)
    strokes.putalpha(Image.eval(image, lambda v: 255 - v))  # black, as opaque as the grey image is dark
    assert (read(strokes, "transparent.png") - expected).abs().max() <= 1 / 255
    turned = Image.Exif()
    turned[0x0112] = 6
    assert torch.equal(read(image.transpose(Image.Transpose.ROTATE_90), "turned.png", exif=turned), expected)
    for pixels in (grey.float(), grey.int() - 1):
        Image.fromarray(pixels.numpy()).save(tmp_path / "unknown.tif")
        with pytest.raises(models.InputError, match="unknown.tif cannot be read as an image: its pixels .* 8 and 16 bits"):
            preprocessing.read(tmp_path / "unknown.tif")


def test_damaged_images_raise_one_error(tmp_path):
    """Whatever the decoder raises; `as_seen` and `read` never let anything else through."""
    generator = torch.Generator().manual_seed(0)
    preprocessing = Preprocessing("RGB", 8, [0.0] * 3, [1.0] * 3)
    pixels = torch.randint(0, 256, (9, 9, 3), generator=generator, dtype=torch.uint8)
    for extension in ("png", "gif", "jpg", "tif", "bmp", "webp", "ppm"):
        path = tmp_path / f"image.{extension}"
        Image.fromarray(pixels.numpy()).save(path)
        whole = path.read_bytes()
        for _ in range(30):
            damaged, at = bytearray(whole), torch.randint(len(whole), (4,), generator=generator).tolist()
            for position in at:
                damaged[position] ^= 0xFF
            path.write_bytes(damaged[: at[0] + 1] if at[1] % 2 else damaged)
            try:
                assert preprocessing.read(path).shape == (3, 8, 8)
            except models.InputError as error:
                assert str(path) in str(error)


def test_a_training_that_diverges_says_so(tmp_path, capsys):
    options = [*SMALL, "--image-size", 8, "--epochs", 2, "--batch-size", 32, "--lr", "1e30", "--no-compare"]
    fails_last = run(capsys, "train", "perceiver-digits", "--output", tmp_path / "run", *options)
    assert fails_last[0] == 2 and "the training diverged" in fails_last[2] and "Traceback" not in fails_last[2]
    assert not (tmp_path / "run/model.safetensors").exists()


def test_restart_leaves_no_result_of_the_old_training(trained, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    options = [*SMALL, "--image-size", 8, "--lr", "1e30", "--no-compare", "--output", copy]
    assert run(capsys, "train", "perceiver-digits", "--restart", *options)[0] == 2
    assert {path.name for path in copy.iterdir()} <= {".lock", "training.safetensors"}


def test_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file/below"):
        status, _, error = run(capsys, "train", "perceiver-digits", *SMALL, "--image-size", 8, "--output", output)
        assert status == 2 and f"--output is {output}, where nothing can be written" in error


@pytest.mark.parametrize(
    "change, message",
    [
        ({"classes": 5}, "does not describe an image classification"),
        ({"classes": ["a"]}, "has 1 classes and images of 8 x 8 x 1"),
        ({"preprocessing": {"mode": "L", "size": 9, "mean": [0.5], "std": [1]}}, "images of 9 x 9 x 1"),
        ({"preprocessing": {"mode": "L", "size": "8", "mean": [0.5], "std": [1]}}, "size is '8'"),
        ({"preprocessing": {"mode": "L", "size": 8, "mean": [0.5], "std": [0]}}, "std is"),
        ({"preprocessing": {"mode": "L", "size": 8, "mean": ["x"], "std": [1]}}, "mean and std"),
    ],
)
def test_task_of_another_training(trained, tmp_path, capsys, change, message):
    image = tmp_path / "image.png"
    Image.new("L", (8, 8)).save(image)
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    task = json.loads((copy / "task.json").read_text())
    (copy / "task.json").write_text(json.dumps({**task, **change}))
    fails(capsys, message, "predict", image, "--checkpoint", copy)


def test_interrupt(trained, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "train_step", interrupted)
    options = [*SMALL, "--image-size", 8, "--epochs", 1, "--no-compare", "--output", tmp_path / "run"]
    status, _, error = run(capsys, "train", "perceiver-digits", *options)
    assert status == 130 and "goes on where the last checkpoint stands" in error and "Traceback" not in error
    monkeypatch.setattr(Preprocessing, "read", interrupted)
    assert run(capsys, "predict", "image.png", "--checkpoint", trained) == (130, "", "interrupted\n")
