"""Trees travel by content: nothing twice, nothing unverified, whatever breaks off; and the plan says what would go."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import durable
from jobs.trees import Tree
from orchestrator import agents, project, sync
from orchestrator.errors import BadAnswer, ConfigError, NotReachable, UsageError
from orchestrator.project import Content
from orchestrator.sync import Sent
from orchestrator.transport import LocalMachine
from worker import store


def make(files: Mapping[str, str]) -> None:
    for name, content in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(content, encoding="utf-8")


def tree(name: str) -> Content:
    return project.tree_of(Path(name), project.hashes())


class Watched(LocalMachine):
    """This computer as a machine with a real store; notes what it is asked, and misbehaves as told."""

    def __init__(self, root: Path, code: Path, *, apart: bool = False) -> None:
        super().__init__(root)
        root.mkdir()
        (root / "agent").symlink_to(code)
        self.agent = next(code.iterdir()).name
        self.apart = apart  # whether the agent runs as a process; else the same code answers, faster
        self.calls: list[tuple[list[str], bytes, float]] = []
        self.pushed: list[int] = []  # how many big files went together, each time
        self.answers: dict[str, Any] = {}  # by verb: what is answered instead of what the agent would
        self.happens: dict[str, Callable[[], object]] = {}  # before a verb or `pushing`, or once `pushed`
        self.alters: Callable[[bytes], bytes] = bytes  # what becomes of the data of a call on its way
        self.spoils = 0  # how many times big files arrive with another content
        self.dies: dict[str, int] = {}  # `before` or `after` which step the line breaks, once

    @property
    def verbs(self) -> list[str]:
        """What was asked, in order."""
        return [words[5] for words, _, _ in self.calls]

    def call(self, words: list[str], data: bytes, deadline_s: float = 60.0) -> bytes:
        """See Machine."""
        self.calls.append((words, data, deadline_s))
        self.happens.pop(words[5], lambda: None)()
        self.breaks("before")
        if words[5] in self.answers:
            answer = json.dumps(self.answers[words[5]]).encode()
        elif self.apart:
            answer = super().call(words, data, deadline_s)
        else:
            answer = json.dumps(store.answer(words[5], Path(words[6]), io.BytesIO(self.alters(data)))).encode()
        self.breaks("after")
        return answer

    def push_files(self, files: list[tuple[Path, str]], progress: Callable[[int], None]) -> None:
        """See Machine."""
        self.pushed.append(len(files))
        self.breaks("before")
        self.happens.pop("pushing", lambda: None)()
        super().push_files(files, progress)
        self.happens.pop("pushed", lambda: None)()
        if self.spoils:
            self.spoils -= 1
            for source, name in files:
                (self.root / "store" / "incoming" / name).write_bytes(bytes(source.stat().st_size))
        self.breaks("after")

    def breaks(self, when: str) -> None:
        """Break the line if this is the step for it."""
        if when in self.dies:
            self.dies[when] -= 1
            if self.dies[when] == -1:
                raise NotReachable("the line is dead")

    def push(self, *trees: Content) -> Sent:
        """What a push of these trees to here sends."""
        return sync.push(self, self.agent, trees, lambda _done, _total: None)

    def kept(self, content: Content) -> dict[str, bytes]:
        """What the store holds of a tree that it has: each file's content, verified."""
        manifest = durable.load_json(self.root / "store" / "trees" / f"{content.tree.digest()}.json")
        assert Tree.of(manifest) == content.tree
        names = {entry.path: entry.sha256 for entry in content.tree.entries if not entry.link}
        found = {path: (self.root / "store/blobs" / name[:2] / name).read_bytes() for path, name in names.items()}
        assert {path: hashlib.sha256(data).hexdigest() for path, data in found.items()} == names
        return found

    def has(self, content: Content) -> bool:
        """Whether the tree was written down as complete."""
        return (self.root / "store" / "trees" / f"{content.tree.digest()}.json").exists()


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `agent` of a machine, with a snapshot of our code in it."""
    folder = tmp_path_factory.mktemp("code") / "agent"
    files = agents.sources()
    agents.write(files, folder / agents.digest(files))
    (folder / ".writing").unlink()
    return folder


@pytest.fixture
def machine(tmp_path: Path, code: Path) -> Watched:
    """A machine whose agent runs as a process."""
    return Watched(tmp_path / "machine", code, apart=True)


@pytest.fixture
def near(tmp_path: Path, code: Path) -> Watched:
    """A machine whose agent's code answers in this process."""
    return Watched(tmp_path / "machine", code)


@pytest.fixture
def small_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files from 100 bytes on are big ones."""
    monkeypatch.setattr(sync, "_BIG_BYTES", 100)


def test_what_is_pushed_is_there(machine: Watched) -> None:
    """After a push the machine has every tree with every content, also empty files and links."""
    make({"code/a.py": "print()", "code/b/empty": "", "code/b/same": "print()", "model/big": "x" * (5 << 20)})
    Path("code/link").symlink_to("b/same")
    code, model = project.snapshot(Path.cwd() / "code", project.hashes()), tree("model")
    sent = machine.push(code, model)
    assert machine.kept(code) == {"a.py": b"print()", "b/empty": b"", "b/same": b"print()"}
    assert machine.kept(model) == {"big": b"x" * (5 << 20)}
    assert sent == Sent((code.tree.digest(), model.tree.digest()), 3, 7 + (5 << 20))
    assert machine.pushed == [1]
    assert machine.verbs == ["have", "missing", "take", "adopt", "keep", "keep"]


def test_where_nothing_is_unknown_there_is_one_call(machine: Watched) -> None:
    """A push of trees that the machine has is one question and sends nothing; of no trees, not even that."""
    make({"a/x": "1", "b/y": "2"})
    trees = [tree("a"), tree("b"), tree("a")]
    machine.push(*trees)
    machine.calls.clear()
    assert machine.push(*trees) == Sent(tuple(each.tree.digest() for each in trees), 0, 0)
    assert machine.verbs == ["have"]
    assert machine.push() == Sent((), 0, 0)
    assert machine.verbs == ["have"]


def test_only_what_is_new_is_sent(near: Watched) -> None:
    """Of a changed tree the changed contents alone travel, and what two trees share travels once."""
    make({f"code/{number}": f"file {number}" for number in range(20)})
    assert near.push(tree("code")).files == 20
    make({"code/3": "changed", "code/new": "file 4", "more/x": "changed", "more/y": "new"})
    sent = near.push(tree("code"), tree("more"))
    assert (sent.files, sent.bytes_total) == (2, len("changed") + len("new"))
    takes = [data for words, data, _ in near.calls if words[5] == "take"]
    assert [data.count(b"changed") for data in takes] == [0, 1]


@pytest.mark.parametrize(("size", "big"), [((4 << 20) - 1, False), (4 << 20, True)])
def test_big_files_go_their_own_way(near: Watched, size: int, big: bool) -> None:
    """A file of 4 MiB goes by a way that carries on where it broke off; a smaller one goes with others in one call."""
    make({"f": "x" * size})
    near.push(tree("f"))
    assert near.verbs == ["have", "missing", "adopt" if big else "take", "keep"]
    assert near.pushed == ([1] if big else [])


def test_an_agent_is_started_by_words(machine: Watched) -> None:
    """A call is Python, isolated, our program, a verb and the root; it may take longer the more data it carries."""
    make({"a; touch x": "1" * (1 << 20)})
    machine.push(tree("a; touch x"))
    main = machine.root / "agent" / machine.agent / "worker" / "__main__.py"
    for words, _, _ in machine.calls:
        assert words == [machine.python, "-I", "-X", "utf8", str(main), words[5], str(machine.root)]
    deadlines = {words[5]: deadline_s for words, _, deadline_s in machine.calls}
    assert 60 <= deadlines["have"] < 62
    assert deadlines["take"] > 60 + (1 << 20) / 25_000


def test_progress_grows_to_the_end(near: Watched, small_is_small: None) -> None:
    """Whoever watches is told of bytes that only grow, even when some are sent twice, and last that all were sent."""
    near.spoils = 1
    make({"d/a": "1" * 50, "d/b": "2" * 150, "d/c": "3" * 250})
    told: list[tuple[int, int]] = []
    sync.push(near, near.agent, [tree("d")], lambda done, total: told.append((done, total)))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (450, 450)
    assert {total for _, total in told} == {450}


@given(sizes=st.lists(st.integers(0, 5000), max_size=30), limit=st.integers(1, 8000))
def test_batches_keep_to_their_size(sizes: list[int], limit: int) -> None:
    """Cut into batches, every name is there once in its order, and no batch of more than one is over the limit."""
    named = {str(number): size for number, size in enumerate(sizes)}
    batches = list(sync._cut(list(named), named, limit))
    assert [name for batch in batches for name in batch] == list(named)
    assert all(len(batch) == 1 or sum(named[name] + 100 for name in batch) <= limit for batch in batches)


def test_no_call_carries_more_than_a_batch(near: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small files go in several calls, none over the limit, headers counted."""
    monkeypatch.setattr(sync, "_BATCH_BYTES", 2000)
    make({f"d/{number}": f"{number:300}" for number in range(20)})
    content = tree("d")
    near.push(content)
    sizes = [len(data) for words, data, _ in near.calls if words[5] == "take"]
    assert len(sizes) == 5
    assert max(sizes) <= 2000
    assert len(near.kept(content)) == 20


def test_big_files_go_in_groups(near: Watched, small_is_small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Big files share a connection up to a limit; one over it goes alone."""
    monkeypatch.setattr(sync, "_GROUP_BYTES", 1000)
    make({"d/a": "1" * 300, "d/b": "2" * 300, "d/c": "3" * 3000, "d/e": "4" * 300})
    content = tree("d")
    near.push(content)
    assert sorted(near.pushed) == [1, 1, 2]
    assert len(near.kept(content)) == 4


@pytest.mark.parametrize("size", [5, 500])
def test_a_file_that_changed_is_not_sent_as_what_it_was(near: Watched, small_is_small: None, size: int) -> None:
    """A file that changed or went since it was looked at is an error that names it; its tree is not written down."""
    make({"d/a": "1" * size, "d/b": "2"})
    content = tree("d")
    for change in (lambda: make({"d/a": "x" * size}), Path("d/a").unlink):
        change()
        with pytest.raises(ConfigError, match=r"/d/a changed while it was sent. Nothing was started") as said:
            near.push(content)
        assert said.value.hint == "Run it again."
        assert not near.has(content)


@pytest.mark.parametrize("when", ["pushing", "pushed"])
@pytest.mark.parametrize("change", ["grows", "goes", "is touched"])
def test_a_big_file_that_changes_while_it_is_sent(near: Watched, small_is_small: None, change: str, when: str) -> None:
    """A big file written to or removed while it travels is an error that names it; its tree is not written down."""
    make({"a": "1" * 500})
    content = tree("a")
    changes = {"grows": lambda: make({"a": "1" * 501}), "goes": Path("a").unlink}
    near.happens[when] = changes.get(change, lambda: os.utime("a", (1, 1)))
    with pytest.raises(ConfigError, match=r"/a changed while it was sent. Nothing was started"):
        near.push(content)
    assert not near.has(content)


@pytest.mark.parametrize("times", [1, 2])
def test_what_was_spoiled_on_its_way_is_sent_once_more(machine: Watched, small_is_small: None, times: int) -> None:
    """Big files that arrive with another content are sent again from scratch; spoiled twice, one is named."""
    make({"d/a": "1" * 500, "d/b": "2" * 500})
    content = tree("d")
    machine.spoils = times
    if times == 1:
        machine.push(content)
        assert machine.kept(content) == {"a": b"1" * 500, "b": b"2" * 500}
    else:
        with pytest.raises(NotReachable, match=r"/d/[ab] did not arrive at local intact, twice. Nothing was started"):
            machine.push(content)
        assert not machine.has(content)
    assert machine.pushed == [2, 2]


def test_what_is_spoiled_in_a_call_is_an_error(near: Watched) -> None:
    """A small file that arrives with another content is refused by the machine, and that is said."""
    make({"a": "original"})
    content = tree("a")
    near.alters = lambda data: data.replace(b"orig", b"0rig")
    with pytest.raises(NotReachable, match="/a did not arrive at local intact: damaged"):
        near.push(content)
    assert not near.has(content)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_push_that_breaks_off_anywhere_is_repeated(code: Path, small_is_small: None, when: str) -> None:
    """Broken off before or after any of its steps, a push done again has everything there, and is done."""
    make({"d/a": "1", "d/b": "2" * 500, "e/c": "3"})
    trees = [tree("d"), tree("e")]
    for step in range(7):  # have, missing, take, push, adopt, keep, keep
        near = Watched(Path.cwd() / f"machine-{step}", code)
        near.dies[when] = step
        with pytest.raises(NotReachable, match="dead"):
            near.push(*trees)
        near.push(*trees)
        assert [near.kept(each) for each in trees] == [{"a": b"1", "b": b"2" * 500}, {"c": b"3"}]


def test_what_the_machine_loses_meanwhile_is_sent_again(near: Watched) -> None:
    """When a content is gone before the tree is written down, it is sent again."""
    make({"a": "1"})
    name = tree("a").tree.entries[0].sha256
    near.happens["keep"] = (near.root / "store/blobs" / name[:2] / name).unlink
    near.push(tree("a"))
    assert near.kept(tree("a")) == {"a": b"1"}
    assert near.verbs == ["have", "missing", "take", "keep", "missing", "take", "keep"]


def test_a_machine_that_keeps_losing_is_given_up(near: Watched) -> None:
    """A machine that lacks files again each time it is to write a tree down is not asked for ever."""
    make({"a": "1"})
    near.answers["keep"] = {"missing": [tree("a").tree.entries[0].sha256]}
    with pytest.raises(NotReachable, match="loses files"):
        near.push(tree("a"))
    assert near.verbs.count("keep") == 3


SECRET = hashlib.sha256(b"secret").hexdigest()
NONSENSE: dict[str, list[Any]] = {
    "have": [{}, {"have": "all"}, {"have": [5]}],
    "missing": [{"missing": None}, {"missing": [["x"]]}, {"missing": [SECRET]}, {"missing": ["../../secret"]}],
    "take": [{"taken": 0}, {"taken": True, "error": "busy"}, {}],
    "adopt": [{}, {"adopted": "yes"}, {"error": "busy"}],
    "keep": [{}, {"kept": SECRET}, {"error": "refused", "why": "no"}],
}


@pytest.mark.parametrize(
    ("verb", "answer"), [(verb, answer) for verb, answers in NONSENSE.items() for answer in answers]
)
def test_a_machine_that_answers_nonsense_gets_nothing_else(
    near: Watched, small_is_small: None, verb: str, answer: Any
) -> None:
    """An answer that is none ends the push with an error; no file that was not offered is ever sent."""
    make({"d/a": "1", "d/b": "2", "d/c": "3" * 500, "secret": "secret"})
    near.answers[verb] = answer
    with pytest.raises(NotReachable):
        near.push(tree("d"))
    assert not [words for words, data, _ in near.calls if b"secret" in data]
    assert near.verbs.index(verb) == len(near.verbs) - 1


def test_a_machine_that_asks_often_is_sent_once(near: Watched) -> None:
    """A content that the machine names a thousand times is sent once."""
    make({"a": "1"})
    near.answers["missing"] = {"missing": [tree("a").tree.entries[0].sha256] * 1000}
    assert near.push(tree("a")).bytes_total == 1
    assert near.calls[2][1].count(b"sha256") == 1


def test_a_tree_that_the_machine_refuses_is_said(near: Watched) -> None:
    """Why a machine does not take a tree, here for a path of too many folders, is in the error."""
    make({"d/" * 250 + "x": "1"})
    with pytest.raises(BadAnswer, match="too long"):
        near.push(tree("d"))


def test_a_plan_is_the_promised_document() -> None:
    """A plan lists what goes, by path and size, what stays, by rule and size, and what is needed and missing."""
    make({".gitignore": "*.pt\ndata/\n", "a.py": "12345", "sub/b": "1", "ckpt.pt": "123", "x.pt": "1234567"})
    make({"data/keep": "1234", "data/rest": "12", "data/.git/x": "1", ".git/y": "123"})
    here, hashes = Path.cwd(), project.hashes()
    needs = project.needed(here, here, ["ckpt.pt", "data/keep", "a.py"], hashes)
    plan = sync.plan(project.snapshot(here, hashes), needs, ["gone.pt"])
    goes = {".gitignore": 11, "a.py": 5, "ckpt.pt": 3, "data/keep": 4, "sub/b": 1}
    stays = [(".git", "(git's own folder)", 3), ("data", ".gitignore:2: data/", 3), ("x.pt", ".gitignore:1: *.pt", 7)]
    assert plan == {
        "sent": [{"path": path, "bytes": size} for path, size in goes.items()],
        "left_out": [{"path": path, "rule": rule, "bytes": size} for path, rule, size in stays],
        "needed_missing": ["gone.pt"],
        "bytes_total": 24,
    }


@pytest.mark.parametrize("name", ["data", "."])
def test_what_is_needed_as_a_whole_is_not_left_out(name: str) -> None:
    """A folder that is needed is not among what stays, nor what is in it, but for git's own folder."""
    make({".gitignore": "*.pt\n", "data/a.pt": "1", "data/.git": "12", "data/sub/x": "3"})
    here, hashes = Path.cwd(), project.hashes()
    plan = sync.plan(project.snapshot(here, hashes), project.needed(here, here, [name], hashes), [])
    assert plan["left_out"] == [{"path": "data/.git", "rule": "(git's own folder)", "bytes": 2}]
    assert [entry["path"] for entry in plan["sent"]] == [".gitignore", "data/a.pt", "data/sub/x"]


def test_much_is_sent_only_when_somebody_says_so() -> None:
    """Up to 2 GB nobody is asked; more goes when `-y` was said, or the question, which names the size, gets a yes."""
    asked: list[str] = []
    sync.guard(2_000_000_000, False, None)
    sync.guard(2_000_000_001, True, None)
    sync.guard(2_340_000_000, False, lambda question: not asked.append(question))  # type: ignore[func-returns-value]
    assert "2.3 GB" in asked[0]
    for ask in (None, lambda _: False):
        with pytest.raises(UsageError, match=r"2.0 GB .* Nothing was sent") as said:
            sync.guard(2_000_000_001, False, ask)
        assert "-y" in said.value.hint
