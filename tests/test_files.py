"""Files of data: what ends a line, what is no text, and what is in training and dev at once."""

from pathlib import Path

import pytest
from tiny_runs import tiny

from drlora_ref.experiments.run import one_run
from drlora_ref.experiments.tasks import glue
from drlora_ref.experiments.tasks.commonsense import write_commonsense
from drlora_ref.experiments.tasks.families import FAMILIES
from drlora_ref.experiments.tasks.glue_generated import write_glue
from drlora_ref.experiments.tasks.squad import write_squad
from drlora_ref.experiments.tasks.xsum import write_xsum

COLA, BOOLQ = "CoLA/train.tsv", "BoolQ/train.jsonl"
HELLASWAG = "HellaSwag/hellaswag_train.jsonl"
SQUAD, XSUM = "train-v1.1.json", "bbc-summary-data/train0.summary"
SPLIT = "XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json"
WRITERS = {"cola": write_glue, "sst2": write_glue, "mrpc": write_glue, "stsb": write_glue,
           "boolq": write_commonsense, "hellaswag": write_commonsense,
           "squad_v1": write_squad, "xsum": write_xsum}  # fmt: skip
# (task, file, a text in it): each kind of file that the families read
TEXTS = [("cola", COLA, " the "), ("boolq", BOOLQ, "is it true"),
         ("squad_v1", SQUAD, '"question": "'), ("xsum", XSUM, " the ")]  # fmt: skip
each_kind_of_file = pytest.mark.parametrize("task, file, text", TEXTS, ids=lambda v: str(v)[:8])


def load(task, folder, **given):
    return FAMILIES[task].load_task(task, str(folder), **given)


@pytest.fixture
def made(tmp_path):
    """A function that writes a task's files, with `old` replaced by `new` in one of them."""

    def make(task, file="", old="", new="", times=1) -> Path:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        WRITERS[task](task, folder)
        if file:
            content = (folder / file).read_bytes()
            assert old.encode() in content
            new = new.encode() if isinstance(new, str) else new
            (folder / file).write_bytes(content.replace(old.encode(), new, times))
        return folder

    return make


# JSON itself forbids the others within a string.
ENDS = ["\u2028", "\u2029", "\u0085"]
INSIDE = [(*kind, end) for kind in TEXTS for end in ENDS]
INSIDE += [(*kind, end) for kind in TEXTS if "json" not in kind[1] for end in "\x0b\x0c\x1c\x1e"]


@pytest.mark.parametrize("task, file, text, inside", INSIDE, ids=lambda v: repr(v)[:9])
def test_what_ends_no_line_stays_in_the_text(task, file, text, inside, made):
    before = load(task, made(task))
    after = load(task, made(task, file, text, text + inside))
    assert len(after.train) == len(before.train) and "dropped" not in after.source
    texts = [
        word for row in after.train.to_list() for word in row.values() if isinstance(word, str)
    ]
    assert sum(inside in word for word in texts) == 1


def test_a_lone_cr_is_text_in_tsv_and_cr_before_lf_is_the_lines_end(made):
    before = load("cola", made("cola"))
    sentences = load("cola", made("cola", COLA, " the ", " th\re ")).train["sentence"][:]
    assert sum("th\re" in sentence for sentence in sentences) == 1 and len(sentences) == 64
    crlf = load("cola", made("cola", COLA, "\n", "\r\n", times=-1))
    assert crlf.fingerprint == before.fingerprint
    with pytest.raises(ValueError, match=r"train\.tsv: its lines end in CR alone"):
        load("cola", made("cola", COLA, "\n", "\r", times=-1))


@pytest.mark.parametrize("bad", [b"\xe9", b"\xff\xfe", b"\x80"])
@each_kind_of_file
def test_another_encoding_names_file_and_line(task, file, text, bad, made):
    with pytest.raises(ValueError, match=rf"{Path(file).name}, line \d+: byte 0x.. is not UTF-8"):
        load(task, made(task, file, text, text.encode() + bad))


NO_OBJECT = ["3", "null", "[1]", "true", '"question passage answer"', "-1.5", "[" * 100_000,
             '{"question": ' * 5000, "{", '{"question": "\\ud800", "passage": "", "answer": true}',
             '{"question": "", "passage": "", "answer": ' + "1" * 5000 + "}"]  # fmt: skip


@pytest.mark.parametrize("line", NO_OBJECT, ids=lambda line: line[:20])
def test_a_line_of_json_that_is_no_row_is_named(line, made):
    folder = made("boolq", BOOLQ, "\n", f"\n{line}\n")
    with pytest.raises(ValueError, match=r"train\.jsonl, line 2: ") as refused:
        load("boolq", folder)
    assert len(str(refused.value)) < 400 and "\n" not in str(refused.value)


BOUNDLESS = [
    ("cola", COLA, "\t1\t", "\t" + "9" * 10**6 + "\t"),
    ("sst2", "SST-2/train.tsv", "sentence", "x" * 10**6),
    ("boolq", BOOLQ, '"question"', '"' + "x" * 10**6 + '"'),
    ("boolq", BOOLQ, '"answer": true', '"answer": "' + "y" * 10**6 + '"'),
    ("hellaswag", HELLASWAG, '"endings": [', '"endings": ["' + "z" * 10**6 + '",'),
    ("squad_v1", SQUAD, '"text": "', '"text": "' + "q" * 10**6),
    ("squad_v1", SQUAD, '"answer_start": ', '"answer_start": 99999999999999999999'),
    ("squad_v1", SQUAD, "{", "[" * 100_000),
    ("xsum", SPLIT, '"train0"', '"' + "w" * 10**6 + '"'),
    ("xsum", SPLIT, "{", "[" * 100_000),
]  # fmt: skip


@pytest.mark.parametrize("task, file, old, new", BOUNDLESS, ids=lambda v: str(v)[:12])
def test_no_message_about_a_file_is_longer_than_a_screen(task, file, old, new, made):
    folder = made(task, file, old, new)
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        load(task, folder)
    assert len(str(refused.value)) < 3000 and "\n" not in str(refused.value)


# --- the same text in train and dev ------------------------------------------------------------


def first_line(path: Path, header: bool) -> str:
    return path.read_text().split("\n")[int(header)]


LEAKS = [("cola", "CoLA", "tsv", False), ("mrpc", "MRPC", "tsv", True),
         ("stsb", "STS-B", "tsv", True), ("boolq", "BoolQ", "jsonl", False)]  # fmt: skip


@pytest.mark.parametrize("task, name, ending, header", LEAKS)
def test_texts_in_train_and_dev_are_counted_and_never_refused(task, name, ending, header, made):
    folder = made(task)
    assert load(task, folder).also_in_train == {} and load(task, folder).warning() == ""
    line = first_line(folder / name / f"train.{ending}", header)
    with open(folder / name / f"dev.{ending}", "a") as dev:
        dev.write(f"{line}\n{line}\n")
    data = load(task, folder)
    assert (
        data.also_in_train == {"validation": 2}
        and data.about()["also_in_train"] == data.also_in_train
    )
    assert data.warning() == f"{task}: texts that are in train too: 2 of 26 in validation"


def test_another_label_is_the_same_text_and_another_second_sentence_is_not(made):
    folder = made("mrpc")
    label, *others = first_line(folder / "MRPC" / "train.tsv", header=True).split("\t")
    changed = ["1" if label == "0" else "0", *others]
    halved = [label, *others[:-1], "Something else ."]
    with open(folder / "MRPC" / "dev.tsv", "a") as dev:
        dev.write("\t".join(changed) + "\n" + "\t".join(halved) + "\n")
    assert load("mrpc", folder).also_in_train == {"validation": 1}


def test_only_rows_that_are_trained_on_count_and_those_held_out_do_not(made):
    folder = made("sst2")  # five good words and five bad ones: every text comes often
    data = load("sst2", folder, holdout=20)
    assert set(data.also_in_train) == {"validation", "holdout"}
    few = load("sst2", folder, holdout=20, train_size=3)
    trained = set(few.train["sentence"])
    assert few.also_in_train["holdout"] == sum(s in trained for s in few.holdout["sentence"])


def test_a_run_says_so_in_one_line_and_in_its_record(tmp_path, capsys):
    record = one_run.run(tiny(tmp_path, task="sst2", max_steps=4))
    data = glue.load_task("sst2", "generated")
    assert record["data"] == data.about() and record["data"]["also_in_train"] == {"validation": 24}
    assert capsys.readouterr().out.splitlines().count(data.warning()) == 1
