"""Tables of clips: what is read, and what is said of broken rows."""

import pytest
import torch
from media_files import numbered, tone, write_video, write_wav

from mmkernels.models import InputError
from mmkernels.train.data import manifest
from mmkernels.train.data.clips import Spectrogram, Video

READERS = {"spectrogram": Spectrogram(seconds=0.1, sample_rate=8000, mels=8)}


@pytest.fixture
def folder(tmp_path):
    for number in range(6):
        write_wav(tmp_path / f"{number}.wav", tone(300 + 100 * number, 0.2, 8000)[None], 8000)
    return tmp_path


def table(folder, *lines, name="clips.csv"):
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


def load(path, **options):
    return manifest.load(path, READERS, seed=0, **options)


def fails(message, path, **options):
    with pytest.raises(InputError) as error:
        load(path, **options)
    assert message in str(error.value), str(error.value)


GOOD = (
    "spectrogram,label,split",
    "0.wav,low,train",
    "1.wav,low,train",
    "4.wav,high,train",
    "5.wav,high,val",
    "2.wav,low,test",
)


def test_single_labels(folder):
    training, held_out, labels, problems = load(table(folder, *GOOD))
    assert len(training) == 3 and len(held_out) == 2 and problems == []
    assert labels.names == ["high", "low"] and labels.splits == [2] and not labels.multi_label
    assert training.targets.tolist() == [[0, 1], [0, 1], [1, 0]] and held_out.targets.tolist() == [[1, 0], [0, 1]]
    assert held_out[None, 0][0]["spectrogram"].shape == (4, 10, 8, 3) and training[0, 0][0]["spectrogram"].shape == (10, 8, 3)
    assert training.lengths[0]["spectrogram"] == 0.2


def test_many_labels_and_several_heads(folder):
    lines = ("labels,spectrogram,split", "dog;cat,0.wav,train", "bird,1.wav,train", "cat;cat,2.wav,test")
    training, held_out, labels, _ = load(table(folder, *lines))
    assert labels.multi_label and labels.names == ["bird", "cat", "dog"]
    assert training.targets.tolist() == [[0, 1, 1], [1, 0, 0]] and held_out.targets.tolist() == [[0, 1, 0]]
    lines = ("label.verb,label.noun,spectrogram,split", "cut,onion,0.wav,train", "wash,pan,1.wav,train", "cut,pan,2.wav,val")
    training, held_out, labels, _ = load(table(folder, *lines))
    assert labels.splits == [2, 2] and labels.names == ["cut", "wash", "onion", "pan"]
    assert held_out.targets.tolist() == [[1, 0, 0, 1]]


def test_parquet_says_the_same(folder):
    import pyarrow
    from pyarrow import parquet

    columns = {name: list(cells) for name, *cells in zip(*(line.split(",") for line in GOOD), strict=True)}
    parquet.write_table(pyarrow.table(columns), folder / "clips.parquet")
    found, expected = load(folder / "clips.parquet"), load(table(folder, *GOOD))
    for a, b in zip(found[:2], expected[:2], strict=True):
        assert a.paths == b.paths and torch.equal(a.targets, b.targets) and a.fingerprint() == b.fingerprint()
    columns = {
        "spectrogram": ["0.wav", "1.wav", "2.wav"],
        "labels": [["a", "b"], ["b"], ["a"]],
        "split": ["train", "train", "val"],
    }
    parquet.write_table(pyarrow.table(columns), folder / "lists.parquet")
    assert load(folder / "lists.parquet")[0].targets.tolist() == [[1, 1], [0, 1]]


def test_without_a_split_a_share_is_held_out(folder):
    lines = ["spectrogram,label", *(f"{n}.wav,{'ab'[n % 2]}" for n in range(6))]
    path = table(folder, *lines)
    training, held_out, _, _ = load(path, held_out=0.34)
    assert (len(training), len(held_out)) == (4, 2)
    assert load(path, held_out=0.34)[1].paths == held_out.paths
    every = {str(clip["spectrogram"]) for clip in training.paths + held_out.paths}
    assert len(every) == 6


BROKEN = {
    "gone.wav,low,train": "line 7: spectrogram: ",
    "text.wav,low,train": "text.wav cannot be read as audio",
    "quiet.wav,low,train": "quiet.wav is silent",
    ",low,train": "line 7: spectrogram is empty",
    "3.wav,,train": "line 7: label is empty",
    "3.wav,low,later": "line 7: split is 'later'; allowed are train, val, test",
    "3.wav,low,train,more": "line 7: it has more cells than the table has columns",
    "3.wav,middle,val": "line 7: label is 'middle', which no row to train on has",
    "3.wav": "line 7: label is empty",
}


@pytest.mark.parametrize("line", BROKEN)
def test_a_broken_row_stops_or_is_left_out(folder, line):
    (folder / "text.wav").write_text("no sound")
    write_wav(folder / "quiet.wav", torch.zeros(1, 800), 8000)
    path = table(folder, *GOOD, line)
    fails(BROKEN[line], path)
    fails("has 1 broken row: ", path)
    training, held_out, _, problems = load(path, on_error="skip")
    assert len(training) == 3 and len(held_out) == 2
    assert len(problems) == 1 and BROKEN[line] in problems[0]


def test_all_broken_rows_are_counted(folder):
    path = table(folder, *GOOD, *[f"gone{n}.wav,low,train" for n in range(5)])
    fails("has 5 broken rows: line 7", path)
    fails("and 2 more; --on-error skip", path)
    assert len(load(path, on_error="skip")[3]) == 5


@pytest.mark.parametrize("damage", ["half a file", "another shape"])
def test_damaged_frames_are_found_before_training(folder, damage):
    """Behind the first one, and where no window looks at first."""
    from PIL import Image

    for clip in ("a", "b", "c", "d"):
        (folder / clip).mkdir()
        for number in range(5):
            Image.new("RGB", (24, 20), (40 * number, 90, 9)).save(folder / clip / f"{number}.jpg")
    frame = folder / "b/3.jpg"
    if damage == "half a file":
        frame.write_bytes(frame.read_bytes()[: frame.stat().st_size * 2 // 3])
        told = "b/3.jpg cannot be read as an image"
    else:
        Image.new("RGB", (20, 24)).save(frame)
        told = "b/3.jpg has another shape than"
    path = table(folder, "rgb,label,split", "a,x,train", "b,x,train", "c,y,train", "d,x,val")
    readers = {"rgb": Video(frames=2, stride=1, size=8)}
    with pytest.raises(InputError, match="has 1 broken row: line 3: .*" + told):
        manifest.load(path, readers, seed=0)
    training, held_out, _, problems = manifest.load(path, readers, seed=0, on_error="skip")
    assert (len(training), len(held_out), len(problems)) == (2, 1, 1) and told in problems[0]


def test_truncated_videos_are_found_before_training(folder):
    for clip in "abcd":
        write_video(folder / f"{clip}.mkv", numbered(25, 20, 24), 25)
    content = (folder / "b.mkv").read_bytes()
    (folder / "b.mkv").write_bytes(content[: len(content) * 6 // 10])
    path = table(folder, "rgb,label,split", "a.mkv,x,train", "b.mkv,x,train", "c.mkv,y,train", "d.mkv,x,val")
    readers = {"rgb": Video(frames=4, stride=8, size=8)}
    with pytest.raises(InputError, match=r"has 1 broken row: line 3: .*b.mkv is truncated: its header says 1.00 seconds, 0\."):
        manifest.load(path, readers, seed=0)
    training, held_out, _, problems = manifest.load(path, readers, seed=0, on_error="skip")
    assert (len(training), len(held_out), len(problems)) == (2, 1, 1) and training.lengths[0]["rgb"] == pytest.approx(1.0)


def test_tables_that_cannot_be_used(folder):
    fails("no table of clips or images; allowed are files ending in .csv and .parquet", folder / "0.wav")
    fails("cannot be read as CSV", folder / "gone.csv")
    fails("cannot be read as Parquet", table(folder, "PAR1 not really", name="x.parquet"))
    (folder / "latin.csv").write_bytes("spectrogram,label\n0.wav,über\n".encode("latin-1"))
    fails("cannot be read as CSV", folder / "latin.csv")
    fails("has no rows", table(folder, "spectrogram,label"))
    fails("has no column 'spectrogram'; it has sound, label", table(folder, "sound,label", "0.wav,a"))
    fails("it must have labels in one form", table(folder, "spectrogram,class", "0.wav,a"))
    fails("it must have labels in one form", table(folder, "spectrogram,label,labels", "0.wav,a,a"))
    fails("has no row held out", table(folder, *GOOD[:4]))
    fails("has no row to train on", table(folder, GOOD[0], GOOD[4], GOOD[5]), on_error="skip")
    fails("only the class ['low']", table(folder, *GOOD[:3], GOOD[5]))
