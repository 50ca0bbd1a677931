"""Small files in the layouts in which GLUE and SuperGLUE are distributed, and what T5 makes of their first dev examples."""

import json


def _tsv(*rows):
    return "".join("\t".join(row) + "\n" for row in rows)


def _jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


MNLI_HEAD = (
    "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse sentence1 "
    "sentence2 label1"
).split()
MNLI_ROW = ["0", "1", "1e", "telephone", "( a )", "( b )", "(ROOT a)", "(ROOT b)"]
STSB_HEAD = "index genre filename year old_index source1 source2 sentence1 sentence2 score".split()
PAIR_HEAD = ["index", "sentence1", "sentence2", "label"]
QUESTION = {"question": "Did it rain?", "idx": 3, "answers": [{"text": "<b>Yes</b>", "idx": 0, "label": 1}]}
QUESTION["answers"] += [{"text": "No", "idx": 1, "label": 0}]
PARAGRAPH = {"text": "<b>Sent 1: </b>It rained.<br><b>Sent 2: </b>Then not.<br>", "questions": [QUESTION]}
NEWS = "Ann met Bob in Rome.\n@highlight\nIt was warm\n@highlight\nBob left"
ENTITIES = [
    {"start": 0, "end": 2},
    {"start": 8, "end": 10},
    {"start": 15, "end": 18},
    {"start": NEWS.rindex("Bob"), "end": NEWS.rindex("Bob") + 2},
]
QUERY = {"query": "@placeholder met Bob", "idx": 5, "answers": [{"start": 0, "end": 2, "text": "Ann"}]}
QUERY["answers"] += [{"start": 15, "end": 18, "text": "Rome"}]
WSC = {
    "text": "Mitchell asked Tom if he could lend some money.",
    "target": {"span1_index": 2, "span1_text": "tom", "span2_index": 4, "span2_text": "he"},
    "idx": 0,
    "label": True,
}

# task -> (folder, {file: content}, input and target of the first dev example)
DATA = {
    "cola": (
        "CoLA",
        {
            "train.tsv": _tsv(["gj04", "1", "", 'He said "so.'], ["gj04", "0", "*", "Him said."]),
            "dev.tsv": _tsv(["gj04", "1", "", "John made Bill master of himself."]),
        },
        ("cola sentence: John made Bill master of himself.", "acceptable"),
    ),
    "sst2": (
        "SST-2",
        {
            "train.tsv": "sentence\tlabel\nfine \t1\nbad \t0\n",
            "dev.tsv": "sentence\tlabel\nit confirms fincher 's status \t1\n",
        },
        ("sst2 sentence: it confirms fincher 's status ", "positive"),
    ),
    "mrpc": (
        "MRPC",
        {
            # Microsoft's files begin with a byte order mark, and quotes mean nothing.
            "train.tsv": "\ufeff" + _tsv(["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"], ["0", "1", "2", '"A', "B"]),
            "dev.tsv": _tsv(
                ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"],
                [
                    "1",
                    "1",
                    "2",
                    '" We acted because we saw the existing evidence in a new light , "',
                    "Rather , the US acted .",
                ],
            ),
        },
        (
            'mrpc sentence1: " We acted because we saw the existing evidence in a new light , " sentence2: Rather , the US '
            "acted .",
            "equivalent",
        ),
    ),
    "qqp": (
        "QQP",
        {
            "train.tsv": _tsv(
                ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"], ["1", "2", "3", "A?", "B?", "0"]
            )
            + "402\tcut off\n",
            "dev.tsv": _tsv(
                ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
                [
                    *("1", "2", "3"),
                    "Why do I easily get bored of my friends?",
                    "Why do I get bored of my friends so quickly?",
                    "1",
                ],
            ),
        },
        (
            "qqp question1: Why do I easily get bored of my friends? question2: Why do I get bored of my friends so quickly?",
            "duplicate",
        ),
    ),
    "stsb": (
        "STS-B",
        {
            "train.tsv": _tsv(
                STSB_HEAD, ["0", "a", "b", "2012", "0001", "none", "none", "A plane.", "An air plane.", "5.000"]
            ),
            "dev.tsv": _tsv(
                STSB_HEAD,
                [
                    *("0", "a", "b", "2012", "0001", "none", "none"),
                    "Representatives for Puretunes could not immediately be reached for comment Wednesday.",
                    "Puretunes representatives could not be located Thursday to comment on the suit.",
                    "3.250",
                ],
            ),
        },
        (
            "stsb sentence1: Representatives for Puretunes could not immediately be reached for comment Wednesday. sentence2: "
            "Puretunes representatives could not be located Thursday to comment on the suit.",
            "3.2",
        ),
    ),
    "mnli": (
        "MNLI",
        {
            "train.tsv": _tsv([*MNLI_HEAD, "gold_label"], [*MNLI_ROW, "P", "H", "neutral", "neutral"]),
            "dev_matched.tsv": _tsv(
                [*MNLI_HEAD, "label2", "gold_label"],
                [
                    *MNLI_ROW,
                    "yeah well losing is",
                    "The St. Louis Cardinals have always won.",
                    "neutral",
                    "x",
                    "contradiction",
                ],
            ),
            "dev_mismatched.tsv": _tsv(
                [*MNLI_HEAD, "label2", "gold_label"], [*MNLI_ROW, "P", "H", "neutral", "x", "entailment"]
            ),
        },
        ("mnli hypothesis: The St. Louis Cardinals have always won. premise: yeah well losing is", "contradiction"),
    ),
    "qnli": (
        "QNLI",
        {
            "train.tsv": _tsv(["index", "question", "sentence", "label"], ["0", "Q?", "S.", "not_entailment"]),
            "dev.tsv": _tsv(
                ["index", "question", "sentence", "label"],
                ["0", "Where did Jebe die?", "Jebe died on the road back to Samarkand.", "entailment"],
            ),
        },
        ("qnli question: Where did Jebe die? sentence: Jebe died on the road back to Samarkand.", "entailment"),
    ),
    "rte": (
        "RTE",
        {
            "train.tsv": _tsv(PAIR_HEAD, ["0", "A.", "B.", "entailment"]),
            "dev.tsv": _tsv(PAIR_HEAD, ["0", "A smaller proportion.", "Slovenia has 3,000 inhabitants.", "not_entailment"]),
        },
        ("rte sentence1: A smaller proportion. sentence2: Slovenia has 3,000 inhabitants.", "not_entailment"),
    ),
    "wnli": (
        "WNLI",
        {"dev.tsv": _tsv(PAIR_HEAD, ["0", "The fish ate the worm. It was tasty.", "The worm was tasty.", "1"])},
        ("wsc: The fish ate the worm. *It* was tasty.", "The worm"),
    ),
    "boolq": (
        "BoolQ",
        {
            "train.jsonl": _jsonl({"question": "is it", "passage": "It -- is.", "idx": 0, "label": True}),
            "val.jsonl": _jsonl({"question": "was it", "passage": "It was not.", "idx": 0, "label": False}),
        },
        ("boolq passage: It was not. question: was it", "False"),
    ),
    "cb": (
        "CB",
        {
            "train.jsonl": _jsonl({"premise": "P", "hypothesis": "H", "label": "neutral", "idx": 0}),
            "val.jsonl": _jsonl(
                {"premise": "Did he think he was helping?", "hypothesis": "Valence was helping", "label": "contradiction"}
            ),
        },
        ("cb hypothesis: Valence was helping premise: Did he think he was helping?", "contradiction"),
    ),
    "copa": (
        "COPA",
        {
            "train.jsonl": _jsonl({"premise": "P", "choice1": "A", "choice2": "B", "question": "cause", "label": 0, "idx": 0}),
            "val.jsonl": _jsonl(
                {
                    "premise": "Political violence broke out in the nation.",
                    "choice1": "Many citizens relocated to the capitol.",
                    "choice2": "Many citizens took refuge in other territories.",
                    "question": "effect",
                    "label": 1,
                    "idx": 0,
                }
            ),
        },
        (
            "copa choice1: Many citizens relocated to the capitol. choice2: Many citizens took refuge in other territories. "
            "premise: Political violence broke out in the nation. question: effect",
            "choice2",
        ),
    ),
    "multirc": (
        "MultiRC",
        {
            "train.jsonl": _jsonl({"idx": 0, "version": 1.1, "passage": PARAGRAPH}),
            "val.jsonl": _jsonl({"idx": 0, "version": 1.1, "passage": PARAGRAPH}),
        },
        (
            "multirc question: Did it rain? answer: Yes paragraph: Sent 1: It rained. Sent 2: Then not. ",
            "True",
        ),
    ),
    "record": (
        "ReCoRD",
        {
            "train.jsonl": _jsonl({"idx": 0, "source": "X", "passage": {"text": NEWS, "entities": ENTITIES}, "qas": [QUERY]}),
            "val.jsonl": _jsonl({"idx": 0, "source": "X", "passage": {"text": NEWS, "entities": ENTITIES}, "qas": [QUERY]}),
        },
        (
            "record query: @placeholder met Bob entities: Ann, Bob, Rome passage: Ann met Bob in Rome. It was warm. Bob left",
            "Ann",
        ),
    ),
    "superglue_rte": (
        "RTE",
        {
            "train.jsonl": _jsonl({"premise": "P", "hypothesis": "H", "label": "entailment", "idx": 0}),
            "val.jsonl": _jsonl({"premise": "Dana died.", "hypothesis": "Dana lives.", "label": "not_entailment", "idx": 0}),
        },
        ("rte hypothesis: Dana lives. premise: Dana died.", "not_entailment"),
    ),
    "wic": (
        "WiC",
        {
            "train.jsonl": _jsonl(
                {"word": "b", "sentence1": "b c", "sentence2": "a b", "idx": 0, "label": False, "start1": 0}
            ),
            "val.jsonl": _jsonl(
                {
                    "word": "deliberation",
                    "sentence1": "It was the deliberation of his act that was insulting .",
                    "sentence2": "The deliberations of the jury .",
                    "label": False,
                }
            ),
        },
        (
            "wic sentence1: It was the deliberation of his act that was insulting . sentence2: The deliberations of the jury "
            ". word: deliberation",
            "False",
        ),
    ),
    "wsc": (
        "WSC",
        {"train.jsonl": _jsonl(WSC, {**WSC, "label": False}), "val.jsonl": _jsonl({**WSC, "label": False})},
        ("wsc: Mitchell asked Tom if *he* could lend some money.", "Tom"),
    ),
}


def write(folder, *names):
    """Writes the files of the tasks, of all without names; both tasks RTE into one folder."""
    for name in names or DATA:
        directory, files, _ = DATA[name]
        (folder / directory).mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            (folder / directory / file).write_text(content, encoding="utf-8")
    return folder
