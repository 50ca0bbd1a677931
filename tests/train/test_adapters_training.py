"""Adapters, AdapterFusion and MAD-X from the command line: what is frozen, resuming, serving tasks together, messages."""

import json
import random
import struct

import docstring_files
import pytest
import torch
from test_resume import content

from mmkernels.__main__ import main
from mmkernels.models import InputError
from mmkernels.models.adapterhub import AdapterHub
from mmkernels.modules import MultiTask
from mmkernels.train import adapters, checkpoint, loop, masked_lm
from mmkernels.train.data import catalogues

pytest.importorskip("transformers")
SIZES = (
    "--hidden-size 32 --layers 1 --vocab-size 500 --max-length 16 --pretraining-steps 3 --steps 3 --batch-size 8 --threads 1"
)
SIZES = SIZES.split()
TASKS = ["kind", "spell", "verb"]


def interrupt(monkeypatch, after):
    """The user's Ctrl-C after so many steps."""
    step, count = loop.train_step, iter(range(after))

    def train_step(*arguments):
        if next(count, None) is None:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(loop, "train_step", train_step)


def results(folder) -> dict:
    """{path: what it holds}, but for locks, pictures and times; without what differs between files of equal content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == checkpoint.NAME:  # the order in its header is none
            found[name] = content(path)
        elif path.suffix == ".bin":
            found[name] = {key: t.numpy().tobytes() for key, t in torch.load(path, weights_only=True).items()}
        elif path.is_file() and path.name not in (".lock", "serving.json") and path.suffix != ".png":
            found[name] = path.read_bytes().replace(str(folder).encode(), b"")  # configs name their model
    return found


# --- The demo ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(folder, what was printed, command) of a whole run on a part of the standard library."""
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("demo")
    command = ["train", "adapters-demo", *SIZES, "--tasks", ",".join(TASKS), "--examples", "300", "--held-out", "30"]
    command += ["--rounds", "1", "--reduction", "4"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        docstring_files.few(patch)
        torch.set_num_threads(1)
        assert main([*command, "--output", str(folder)]) == 0
    return folder, printed.getvalue(), command


def test_demo_compares_and_serves(demo):
    folder, printed, _ = demo
    found = json.loads((folder / "comparison.json").read_text())
    methods = ["commonest answer", "head only", "adapter", "fusion", "full fine-tuning"]
    assert list(found["held out"]) == methods and all(list(row) == [*TASKS, "average"] for row in found["held out"].values())
    # From the folders of the adapters, in batches of all tasks: the answers are those that each adapter gave alone.
    assert found["served"] == {task: found["held out"]["adapter"][task] for task in TASKS}
    counts = found["parameters"]
    assert counts["head only"] < counts["adapter"] < counts["fusion"] < counts["full fine-tuning"]
    assert all(sum(shares) == pytest.approx(1.0) for shares in found["attention"].values())
    rates = json.loads((folder / "serving.json").read_text())["rows_per_second"]
    assert len(rates) == 4 and all(rate > 0 for rate in rates.values())
    for text in (*methods, *rates, "the same to the bit", "trained a task"):
        assert text in printed
    assert all((folder / name).read_bytes()[:4] == b"\x89PNG" for name in ("comparison.png", "serving.png"))


def test_states_and_folders_hold_what_was_trained_alone(demo):
    from safetensors import safe_open

    folder, _, _ = demo
    for part, wanted in (
        ("adapter/kind", ("adapters.kind.", "heads.kind.")),
        ("fusion/kind", ("fusion_layer", "heads.kind.")),
    ):
        with safe_open(folder / part / checkpoint.NAME, "pt") as file:
            names = [name for name in file.keys() if name.startswith("model/")]
        assert names and all(any(kind in name for kind in wanted) for name in names)
    hub = AdapterHub(adapters.load(folder / "backbone"))
    before = checkpoint.digest(dict(hub.model.named_parameters()))
    assert before == checkpoint.digest(dict(AdapterHub(adapters.load(folder / "backbone")).model.named_parameters()))
    for task in TASKS:
        hub.load_adapter(folder / "adapter" / task)
    hub.load_adapter_fusion(folder / "fusion" / "spell")
    assert list(hub.configs) == TASKS and list(hub.fusions) == [",".join(TASKS)] and list(hub.model.heads) == TASKS


@pytest.mark.parametrize(
    "after", [1, 14, 32]
)  # of 39 steps: the new model, an adapter, full fine-tuning; a fusion is resumed, done
def test_demo_goes_on_to_the_same_bits(demo, after, tmp_path, monkeypatch, few_files, capsys):
    folder, _, command = demo
    command = [*command, "--output", str(tmp_path)]
    with monkeypatch.context() as patch:
        interrupt(patch, after)
        assert main(command) == 130
    assert "goes on where the last checkpoint stands" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    assert "resuming" in capsys.readouterr().out
    whole, resumed = results(folder), results(tmp_path)
    assert whole.keys() == resumed.keys() and not {name for name in whole if whole[name] != resumed[name]}


def test_mixed_batches_are_each_task_alone(demo):
    folder, _, _ = demo
    torch.manual_seed(0)
    hub = AdapterHub(adapters.load(folder / "backbone"))
    tokens = adapters.tokenizer.Pretrained(folder / "backbone")
    draw, tasks = random.Random(0), {}
    for number, name in enumerate(TASKS):
        hub.add_adapter(name, reduction_factor=2 + number)
        hub.add_head(name, num_labels=2 + number)
        for parameter in hub.parameters_of(name):
            torch.nn.init.normal_(parameter, std=0.5)
        examples = [adapters.Pair(0, " ".join(draw.choices(WORDS["en"], k=4)), None, 0.0, "") for _ in range(9)]
        tasks[name] = adapters.Pairs(examples, tokens, 16, fixed=False)
    hub.model.eval()
    requests = adapters.Requests(hub, tasks, 8, 0)
    assert requests.size == 27 and sum(len(batch["task_id"]) for batch in requests.apart) == 27
    assert requests.check()[0] <= 1e-5  # what torch calls close to zero in float32
    batch = requests.mixed[0]
    assert len(batch["task_id"].unique()) > 1
    together, looped = requests.together(batch), requests.looped(batch)
    for name in together:
        torch.testing.assert_close(together[name], looped[name])
    assert all(len(set(map(tuple, logits.tolist()))) > 1 for logits in together.values() if len(logits) > 1)
    hub.set_active(MultiTask(*reversed(TASKS)))  # rows with the adapters of others
    wrong = requests._heads(batch["task_id"], batch, task_ids=batch["task_id"])
    assert not all(torch.allclose(together[name], wrong[name], atol=1e-2) for name in together)


def test_frozen_parameters_are_no_part_of_a_state_and_must_be_the_same(tmp_path):
    class Model(torch.nn.Module):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.below, self.above = torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)
            self.below.requires_grad_(False)
            self.config = loop.Settings(None, 1, 1.0)  # any dataclass

    def fit(model):
        data = [[torch.ones(4) * number, number % 2] for number in range(8)]
        dataset = type("Data", (), {"__len__": lambda self: 8, "__getitem__": lambda self, key: data[key[1]]})()

        def loss(model, batch):
            return torch.nn.functional.cross_entropy(model.above(model.below(batch[0])), batch[1])

        task = loop.Task(dataset, dataset, loss, lambda model, batches: {"held_out_loss": 0.0}, "data")
        return loop.fit(model, task, loop.Settings(1, 2, 0.1), tmp_path)

    model = Model(0)
    below = model.below.weight.clone()
    fit(model)
    assert torch.equal(model.below.weight, below)
    again = Model(0)
    fit(again)
    assert torch.equal(again.above.weight, model.above.weight)
    with pytest.raises(InputError, match="holds a training with frozen"):
        fit(Model(1))


# --- MAD-X -------------------------------------------------------------------------------------------------------------------

WORDS = {
    "en": "red green blue dog cat bird runs sits flies here there".split(),
    "de": "rot grün blau hund katze vogel rennt sitzt fliegt hier dort".split(),
}


@pytest.fixture(scope="module")
def languages(tmp_path_factory):
    """Text of two languages, and a task: which colour a sentence has."""
    folder, draw = tmp_path_factory.mktemp("languages"), random.Random(0)
    for language, words in WORDS.items():
        (folder / f"{language}.txt").write_text("\n".join(" ".join(draw.choices(words, k=8)) for _ in range(120)))
        rows = [(draw.randrange(3), draw.choices(words[3:], k=5)) for _ in range(40)]
        rows = [{"input": " ".join([words[color], *rest]), "target": WORDS["en"][color]} for color, rest in rows]
        (folder / f"{language}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def mad_x(folder, *more):
    texts = [
        word for name in WORDS for word in ("--text", f"{name}={folder / name}.txt", "--dev", f"{name}={folder / name}.jsonl")
    ]
    return ["train", "mad-x", *SIZES, "--language-steps", "3", *texts, "--train", str(folder / "en.jsonl"), *more]


def test_mad_x_and_resuming_it(languages, tmp_path, monkeypatch, capsys):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main([*mad_x(languages), "--output", str(whole)]) == 0
    printed = capsys.readouterr().out
    found = json.loads((whole / "comparison.json").read_text())
    rows = ["commonest answer", "task adapter alone", "en's adapter for all", "each its own adapter"]
    assert list(found["held out"]) == rows and all(list(row) == ["en", "de"] for row in found["held out"].values())
    assert found["held out"][rows[2]]["en"] == found["held out"][rows[3]]["en"]
    assert all(row in printed for row in rows) and found["source"] == "en"
    hub = AdapterHub(adapters.load(whole / "backbone"))
    for folder in ("languages/en", "languages/de", "task"):
        hub.load_adapter(whole / folder)
    assert hub.configs["de"].inv_adapter == "nice" and set(hub.model.invertible_adapters) == {"en", "de"}
    for after in (2, 4, 7, 10, 13):  # one step of each of its trainings, and of the first one two
        with monkeypatch.context() as patch:
            interrupt(patch, min(after, 3))
            assert main([*mad_x(languages), "--output", str(broken)]) == 130
    assert main([*mad_x(languages), "--output", str(broken)]) == 0
    once, again = results(whole), results(broken)
    assert once.keys() == again.keys() and not {name for name in once if once[name] != again[name]}
    # A model of the user's own; the first language of --text need not be the source.
    command = [*mad_x(languages), "--model", str(whole / "backbone"), "--output", str(tmp_path / "own"), "--source", "en"]
    assert main(command) == 0 and not (tmp_path / "own" / "backbone").exists()
    assert json.loads((tmp_path / "own" / "comparison.json").read_text()) == found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--source", "fr"], "--source is 'fr'; allowed are the languages of --text: en, de"),
        (["--dev", "fr=x"], "--dev has en, de, fr; it must have each language of --text once: en, de"),
        (["--dev", "de=x"], "--dev has en, de, de; it must have each"),
        (["--text", "task=x"], "--text has the language 'task', which is the name of the task's adapter"),
        (["--text", "keys=x"], "--text has the language 'keys', but it names an adapter: name is 'keys'; it must be a word"),
        (["--text", "de=none"], "none cannot be read as UTF-8 text"),
        (["--train", "none.tsv"], "none.tsv cannot be read"),
        (["--model", "none"], "--model is none, which is no folder with a config.json"),
        (["--hidden-size", "100"], "--hidden-size is 100"),
        (["--resume"], "--resume: "),
    ],
)
def test_messages(languages, change, message, tmp_path, capsys):
    assert main([*mad_x(languages, *change), "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error


def test_more_messages(languages, demo, tmp_path, capsys, few_files):
    folder, _, command = demo
    assert main([*command, "--tasks", "kind,colour", "--output", str(tmp_path)]) == 2
    assert "--tasks has 'colour'; allowed are cloze, kind, spell, topic, verb" in capsys.readouterr().err
    model = ["--model", str(folder / "backbone"), "--output", str(tmp_path)]
    assert main([*mad_x(languages, "--max-length", "17"), *model]) == 2
    assert "--max-length is 17" in capsys.readouterr().err
    one = mad_x(languages)
    first = one.index("--text")
    assert main([*one[:first], *one[first : first + 4], *one[first + 8 :], *model]) == 2
    assert "--text has en alone" in capsys.readouterr().err
    (tmp_path / "other.tsv").write_text("input\ttarget\na\tblack\n")
    changed = [f"de={tmp_path / 'other.tsv'}" if word.startswith("de=") and "jsonl" in word else word for word in one]
    assert main([*changed, *model, "--restart"]) == 2
    assert "--dev de has the target 'black', which training has not: blue, green, red" in capsys.readouterr().err
    for wrong in ("en", "=x", "en=", "a.b=x"):
        with pytest.raises(SystemExit, match="2"):
            main([*one, "--text", wrong])
        assert f"{wrong!r} is not LANG=FILE" in capsys.readouterr().err


def test_logits_of_masked_tokens_alone(demo):
    model = adapters.load(demo[0] / "backbone", language_model=True).eval()
    ids = torch.randint(5, 50, (3, 8))
    labels = torch.where(torch.rand(3, 8) < 0.4, ids, masked_lm.IGNORED)
    logits, asked = masked_lm.asked_logits(model, {"input_ids": ids, "labels": labels})
    torch.testing.assert_close(logits, model(input_ids=ids).logits[labels >= 0])
    assert asked.tolist() == labels[labels >= 0].tolist()
    nothing = {"input_ids": ids, "labels": torch.full_like(ids, masked_lm.IGNORED)}
    assert masked_lm.loss(model, nothing) == 0.0


def test_held_out_blocks(tmp_path):
    (tmp_path / "text").write_text("1 2 3 4 5 6 7 8 9")
    masking = masked_lm.Masking(mask_id=0, vocab_size=10)

    def texts(length):
        return masked_lm.TextBlocks([tmp_path / "text"], lambda line: list(map(int, line.split())), length, masking)

    training, held_out = texts(2).split(0.3)
    assert training.blocks.tolist() == [[1, 2], [3, 4], [5, 6]] and held_out.blocks.tolist() == [[7, 8]]
    with pytest.raises(InputError, match="the texts fill 1 blocks"):
        texts(9).split(0.3)


# --- Messages of programs ----------------------------------------------------------------------------------------------------


def write_catalogue(path, messages: dict):
    """A .mo file: a head, tables of (length, place) of messages in order and of translations, and the bytes of both."""
    messages = {"": "Content-Type: text/plain; charset=UTF-8\n", **messages}
    rows = [[text.encode() for text in pair] for pair in sorted(messages.items())]
    place, tables, data = 28 + 16 * len(rows), ([], []), b""
    for column in (0, 1):
        for row in rows:
            tables[column].append(struct.pack("<2I", len(row[column]), place + len(data)))
            data += row[column] + b"\0"
    head = struct.pack("<7I", 0x950412DE, 0, len(rows), 28, 28 + 8 * len(rows), 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + b"".join(tables[0] + tables[1]) + data)


def test_messages_of_programs(tmp_path):
    root = tmp_path / "locale"
    for program in ("grep-3.1", "sed"):
        own = {f"{program} says the number {i}": f"{program} sagt die Zahl {i}" for i in range(60)}
        shared = {
            "this is said by everybody": "das sagen hier alle",
            "two words": "zwei Worte",
            "they are the same": "they are the same",
        }
        write_catalogue(root / "de" / "LC_MESSAGES" / f"{program}.mo", {**own, **shared})
    (root / "de" / "LC_MESSAGES" / "broken.mo").write_bytes(b"no catalogue")
    sizes = catalogues.write(tmp_path / "data", root, "de")
    assert sizes["text"] == 121 and sizes["train"] + sizes["dev"] == 120 and sizes["dev"] > 3
    text = {name: (tmp_path / "data" / f"{name}.txt").read_text().splitlines() for name in ("en", "de")}
    rows = {
        name: [json.loads(line) for line in (tmp_path / "data" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "dev-en", "dev-de")
    }
    assert len(text["en"]) == len(text["de"]) and {row["target"] for row in rows["train"]} == {"grep", "sed"}
    assert all("says" in row["input"] or "sagt" in row["input"] for part in rows.values() for row in part)
    assert {row["input"] for row in rows["train"]} <= set(text["en"])
    for name in ("en", "de"):  # what is held out is in neither language
        assert not {row["input"] for row in rows[f"dev-{name}"]} & set(text[name])
    assert [row["input"].replace("says the number", "sagt die Zahl") for row in rows["dev-en"]] == [
        row["input"] for row in rows["dev-de"]
    ]
    with pytest.raises(InputError, match="--catalogues .* has 0 messages in 'fr'"):
        catalogues.write(tmp_path / "data", root, "fr")
