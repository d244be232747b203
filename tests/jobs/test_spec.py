"""Job definitions: every fault is named with what would be right, defaults fill the rest; the catalogue is sound."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import spec

JOB = """
name = "mine"
summary = "a job"
story = "evaluate"
task = "gsm8k"
[parameters]
model = "tiny"
samples = 5
temperature = 0.7
batch_size = "auto"
dtype = "auto"
trust_remote_code = false
revision = {}
[parameters.own]
type = "integer"
default = 3
min = 1
max = 9
words = ["all"]
help = "a parameter of this job only"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one job in it."""
    (tmp_path / "mine.toml").write_text(JOB, encoding="utf-8")
    return tmp_path


@pytest.fixture
def job(folder: Path) -> spec.Job:
    return spec.find("mine", [folder])


def changed(folder: Path, old: str, new: str) -> Path:
    """The job's file, with a piece of it replaced."""
    assert old in JOB
    path = folder / "mine.toml"
    path.write_text(JOB.replace(old, new, 1), encoding="utf-8")
    return path


def test_defaults_fill_what_is_not_set(job: spec.Job) -> None:
    """Without settings every parameter has its default, unset ones None; a setting replaces just its own."""
    defaults = {
        "model": "tiny", "samples": 5, "temperature": 0.7, "batch_size": "auto", "dtype": "auto",
        "trust_remote_code": False, "revision": None, "own": 3,
    }  # fmt: skip
    assert job.fill({}) == defaults
    assert job.fill({"samples": "8"}) == defaults | {"samples": 8}
    assert (job.name, job.summary, job.story, job.task, job.needs) == ("mine", "a job", "evaluate", "gsm8k", ())


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("model=org/name", "org/name"), ("model=", ""), ("model=a=b", "a=b"), ("revision=main", "main"),
        ("samples=1", 1), ("samples=1024", 1024), ("temperature=0", 0.0), ("temperature=5", 5.0),
        ("temperature=1e-3", 0.001), ("batch_size=auto", "auto"), ("batch_size=64", 64), ("dtype=float32", "float32"),
        ("trust_remote_code=TRUE", True), ("trust_remote_code=yes", True), ("trust_remote_code=1", True),
        ("trust_remote_code=0", False), ("own=all", "all"), ("own=9", 9),
    ],
)  # fmt: skip
def test_settings_are_typed(setting: str, value: Any, job: spec.Job) -> None:
    """A setting's text becomes a value of its parameter's type, to the bounds and with the words allowed besides."""
    key, _, text = setting.partition("=")
    filled = job.fill({key: text})[key]
    assert filled == value
    assert type(filled) is type(value)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("samples=0", "samples=0 is not a whole number from 1 to 1024"),
        ("samples=1025", "samples=1025 is not a whole number from 1 to 1024"),
        ("samples=5.5", "samples='5.5' is not a whole number"),
        ("samples=true", "samples='true' is not a whole number"),
        ("samples=", "samples='' is not a whole number"),
        ("temperature=-0.1", "temperature=-0.1 is not a number from 0.0 to 5.0"),
        ("temperature=nan", "temperature=nan is not a number"),
        ("temperature=inf", "temperature=inf is not a number"),
        ("temperature=-1e999", "temperature=-inf is not a number"),
        ("temperature=warm", "temperature='warm' is not a number"),
        ("batch_size=automatic", "batch_size='automatic' is not a whole number from 1 to 65536 or auto"),
        ("dtype=bfloat61", "dtype='bfloat61': did you mean bfloat16?"),
        ("dtype=int8", "dtype='int8': there are: auto, bfloat16, float16, float32, float64"),
        ("trust_remote_code=maybe", "trust_remote_code='maybe' is not true or false"),
        ("own=10", "own=10 is not a whole number from 1 to 9 or all"),
        ("sample=5", "mine has no parameter 'sample': did you mean samples?"),
        ("x=5", "mine has no parameter 'x': there are: batch_size, dtype, model, own,"),
    ],
)
def test_a_wrong_setting_is_named_with_what_would_be_right(setting: str, named: str, job: spec.Job) -> None:
    """Wrong types, values outside the bounds, unknown choices and unknown names are refused, in words that help."""
    key, _, text = setting.partition("=")
    with pytest.raises(spec.SpecError) as caught:
        job.fill({key: text})
    assert str(caught.value).startswith(named)


@pytest.mark.parametrize("text", ["inf", "-inf", "nan", "1e999"])
def test_a_number_without_bounds_is_still_one(text: str) -> None:
    """Infinities and NaN are no numbers, also where no bounds are set: JSON does not have them."""
    with pytest.raises(spec.SpecError, match="is not a number"):
        spec.Parameter("own", "number", "").parse(text)


def test_all_faults_are_named_at_once(job: spec.Job) -> None:
    """Several wrong settings are one error that names each."""
    with pytest.raises(spec.SpecError, match=r"samples=0 .*; mine has no parameter 'modle'.*; temperature='hot'"):
        job.fill({"samples": "0", "modle": "x", "temperature": "hot", "own": "4"})


@given(st.text())
def test_any_text_is_a_value_or_a_spec_error(text: str) -> None:
    """Whatever a user types for a parameter is a value that passes its own check again, or a SpecError."""
    for parameter in (
        spec.Parameter("a", "integer", "", min=-5, max=5, words=("auto",)),
        spec.Parameter("b", "number", "", min=0.5, max=2.0),
        spec.Parameter("c", "flag", ""),
        spec.Parameter("d", "text", "", choices=("one", "two")),
        spec.Parameter("e", "text", ""),
    ):
        try:
            value = parameter.parse(text)
        except spec.SpecError:
            continue
        assert parameter.check(value) == value
        assert json.loads(json.dumps(value)) == value


def test_a_users_own_job_comes_first(folder: Path, tmp_path: Path) -> None:
    """The first folder that has a job of the name gives it; the names of all folders are known, each once."""
    own = tmp_path / "own"
    own.mkdir()
    (own / "mine.toml").write_text(JOB.replace("a job", "my job"), encoding="utf-8")
    (own / "other.toml").write_text(JOB, encoding="utf-8")
    (own / "No Name.toml").write_text(JOB, encoding="utf-8")
    assert spec.find("mine", [own, folder]).summary == "my job"
    assert spec.find("mine", [folder, own]).summary == "a job"
    assert spec.find("mine", [tmp_path / "absent", folder]).summary == "a job"
    assert spec.names([own, folder, tmp_path / "absent"]) == ["mine", "other"]


def test_an_unknown_job_is_named_with_the_nearest(folder: Path) -> None:
    """A wrong name is answered with the one that was probably meant, or with all there are."""
    with pytest.raises(spec.UnknownJob, match=r"no job 'mien': did you mean mine\?"):
        spec.find("mien", [folder])
    with pytest.raises(spec.UnknownJob, match=r"no job 'xyz': there are: mine\."):
        spec.find("xyz", [folder])


@pytest.mark.parametrize(
    "name",
    [
        "../mine", "./mine", "sub/mine", "{folder}/mine", "..", "", "mine.toml", "MINE", "mine\n", "-mine", "m\x00",
        "m" * 64,
    ],
)  # fmt: skip
def test_a_name_that_is_a_path_is_never_looked_up(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names with separators, dots, capitals or other than plain characters are unknown without a look at any disk."""
    (folder / "sub").mkdir()
    for place in (folder / "sub" / "mine.toml", folder.parent / "mine.toml", folder / "MINE.toml"):
        place.write_text(JOB, encoding="utf-8")
    monkeypatch.setattr(spec, "load", lambda path: pytest.fail(f"{path} was loaded"))
    monkeypatch.setattr(Path, "is_file", lambda path: pytest.fail(f"{path} was looked at"))
    with pytest.raises(spec.UnknownJob):
        spec.find(name.format(folder=folder), [folder])


def test_broken_toml_is_named_with_file_and_line(folder: Path) -> None:
    """What is not TOML is an error with the file and the line; so is text that is not UTF-8, and a missing file."""
    path = changed(folder, 'summary = "a job"', 'summary = "a job')
    with pytest.raises(spec.SpecError, match=r"mine\.toml is not TOML: .*line 3"):
        spec.load(path)
    path.write_bytes(JOB.encode().replace(b"a job", b"\xff"))
    with pytest.raises(spec.SpecError, match=r"mine\.toml is not TOML"):
        spec.load(path)
    path.unlink()
    with pytest.raises(spec.SpecError, match=r"mine\.toml cannot be read: No such file"):
        spec.load(path)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('story = "evaluate"', 'story = "evaluat"', "unknown story 'evaluat': did you mean evaluate?"),
        ('name = "mine"', "name = 5", "'name' is missing or not text"),
        ("summary", "sumary", "unknown key 'sumary': did you mean summary?"),
        ("[parameters]\n", "[parameter]\n", "unknown key 'parameter': did you mean parameters?"),
        ("samples = 5", "samples = 0", "samples=0 is not a whole number from 1 to 1024"),
        ("samples = 5", 'samples = "5"', "samples='5' is not a whole number"),
        ("samples = 5", "samples = true", "samples=True is not a whole number"),
        ("samples = 5", "samples = [5]", "samples=[5] is not a whole number"),
        ("samples = 5", "samples = {defalt = 5}", "parameter 'samples': unknown key 'defalt': did you mean default?"),
        ("samples = 5", "sampels = 5", "parameter 'sampels' needs a type"),
        ('type = "integer"', 'type = "whole"', "parameter 'own' needs a type: text, integer, number, flag"),
        ("default = 3", "default = 10", "own=10 is not a whole number from 1 to 9 or all"),
        ("default = 3", "default = 3.0", "own=3.0 is not a whole number from 1 to 9 or all"),
        ("min = 1", 'min = "one"', "min"),
        ('words = ["all"]', "words = 5", "words"),
        ('words = ["all"]', 'choices = "abc"', "choices"),
        ('name = "mine"', 'name = "My Own"', "name 'My Own' must be small letters, digits and dashes"),
        ('task = "gsm8k"', "task = 5", "task"),
        ('task = "gsm8k"', 'needs = "file"', "needs"),
        ('help = "a parameter of this job only"', "help = 5", "help"),
    ],
)
def test_a_wrong_definition_is_named_with_file_and_key(old: str, new: str, named: str, folder: Path) -> None:
    """Unknown keys, missing ones, wrong types and defaults outside the bounds are refused when a job is loaded."""
    path = changed(folder, old, new)
    with pytest.raises(spec.SpecError) as caught:
        spec.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert named in str(caught.value)


def test_a_single_bound_is_said(folder: Path) -> None:
    """A parameter with only one bound says it when a value lies outside."""
    job = spec.load(changed(folder, "max = 9\n", ""))
    with pytest.raises(spec.SpecError, match="own=0 is not a whole number from 1"):
        job.fill({"own": "0"})


@pytest.mark.parametrize("name", spec.names([spec.CATALOG]))
def test_the_catalogue_is_sound(name: str) -> None:
    """Each job of the catalogue loads, bears its file's name, says what it does, and helps with every parameter."""
    job = spec.find(name, [spec.CATALOG])
    assert job.name == name
    assert job.summary
    assert job.fill({}).keys() == job.parameters.keys()
    for parameter in job.parameters.values():
        assert len(parameter.help) > 5, parameter.name
        assert not parameter.help.endswith("."), parameter.name
        document = parameter.document()
        assert json.loads(json.dumps(document)) == document
        assert document["expects"] == parameter.expected()


def test_the_catalogue_is_not_empty() -> None:
    """There is at least one job, and every TOML file of the catalogue is one."""
    assert spec.names([spec.CATALOG]) == sorted(path.stem for path in spec.CATALOG.iterdir())
    assert spec.names([spec.CATALOG])


@given(st.dictionaries(st.text(), st.one_of(st.integers(), st.text(), st.none(), st.floats(allow_nan=False,
       allow_infinity=False))))  # fmt: skip
def test_a_document_has_one_canonical_form(document: dict[str, Any]) -> None:
    """The canonical bytes are the same for any order of keys, plain ASCII, and the document itself."""
    turned = dict(reversed(list(document.items())))
    assert spec.canonical(document) == spec.canonical(turned)
    assert spec.canonical(document).isascii()
    assert json.loads(spec.canonical(document)) == document


def test_what_json_does_not_have_has_no_canonical_form() -> None:
    """NaN is refused, so that a digest never depends on how it would be written."""
    with pytest.raises(ValueError, match="JSON"):
        spec.canonical({"score": float("nan")})
