"""English prose from Debian packages of documentation: python data/prose.py --out DIR DEB...

Reads HTML and XML files (DocBook, Mallard); of a package that has none, txt, rst and md. All may be
.gz. Writes DIR/PACKAGE.json.gz, JSON lines {"text": ..., "source": "package/path"}. The same
packages in the same order give the same bytes. It needs dpkg-deb. The rules:

- Left out: paths with change, release, delta, licence, copy, gpl, artistic, index, search or
  _sources/ in them.
- Of HTML, scripts, navigation, listings and preformatted text are dropped.
- A paragraph is kept if it has 8 words, ends in . ! ? or :, is letters a to z for 85% of it, blanks
  apart, has 20% words of the commonest ("the", "of"), and no earlier one has the same words.
- A document is kept if at least half of it is such paragraphs, seen before or not, and 1,000
  characters of it are new.
"""
import argparse
import gzip
import html
import json
import re
import sys
import tarfile
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen

sys.path.insert(0, str(Path(__file__).parents[1]))
from minitf.errors import Parser, require                                  # noqa: E402
from minitf.training import checkpoint                                     # noqa: E402

READ = r"\.(?:(x?html?|xml|docbook|page)|txt|rst|md)(?:\.gz)?$"
LEFT_OUT = r"(?i)_sources/|change|delta|release|licen[cs]e|copy|gpl|artistic|index|search"
HIDDEN = r"(?s)<!--.*?-->|<(script|style|nav|pre|svg|math|screen|programlisting)\b.*?</\1\s*>"
BLOCK = r"</?(p|div|li|d[dlt]|t[dhr]|h[\dr]|blockquote|title|\w*para|section|\w*item|entry|note)\b"
COMMON = set("the of and to a in is that for it as be this with on are you or by not can".split())


def main(arguments=None):
    """Parses the flags and converts. Whatever a user can get wrong: one line, exit status 2."""
    parser = Parser(prog="prose.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="+", type=Path, metavar="DEB", help="package files")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder")
    flags, seen = parser.parse_args(arguments), set()
    for path in flags.packages:
        try:
            convert(path, flags.out, seen)
        except (EOFError, OSError, ValueError, tarfile.TarError) as error:
            parser.error(f"{path} cannot be converted: {error}")


def convert(path, out, seen):
    """Writes out/PACKAGE.json.gz, whole, with the prose of one package that is not `seen`."""
    package, found, lines = path.name.split("_")[0], sorted(documents(path)), []
    if any(is_html for is_html, _, _ in found):
        found = [each for each in found if each[0]]
    for _, name, text in found:
        text = prose(text, seen)
        if text:
            document = {"text": text, "source": f"{package}/{name}"}
            lines.append(json.dumps(document, ensure_ascii=False) + "\n")
    out.mkdir(parents=True, exist_ok=True)
    packed = gzip.compress("".join(lines).encode(), mtime=0)
    checkpoint.write(out / f"{package}.json.gz", lambda file: file.write(packed))
    print(f"{package}: {len(lines)} of {len(found)} documents, {sum(map(len, lines))} characters")


def documents(path):
    """Yields (whether it is HTML, name, text) of the files of a package."""
    with Popen(["dpkg-deb", "--fsys-tarfile", path], stdout=PIPE, stderr=DEVNULL) as process:
        require(process.stdout.peek(1), "dpkg-deb finds no package there")
        archive = tarfile.open(fileobj=process.stdout, mode="r|")
        for member in archive:
            named = re.search(READ, member.name)
            if member.isreg() and named and not re.search(LEFT_OUT, member.name):
                unpack = gzip.decompress if member.name.endswith(".gz") else bytes
                text = unpack(archive.extractfile(member).read()).decode(errors="replace")
                yield bool(named[1]), member.name.removeprefix("./"), text_of(text, named[1])
        process.stdout.read()                                # what is behind the archive's end
    require(process.returncode == 0, "it is damaged")


def text_of(text, is_html):
    """A file's text; of HTML without tags, a blank line for each block."""
    if not is_html:
        return text
    text = re.sub(BLOCK, r"\n\n\g<0>", re.sub(HIDDEN, "\n\n", text))
    return html.unescape(re.sub("<[^<>]*>", "", text))


def prose(text, seen):
    """The paragraphs of a text that are prose and not `seen`; "" if they are too few."""
    paragraphs = [" ".join(each.split()) for each in re.split(r"\n\s*\n", text)]
    kept, size = [], 0
    for paragraph in paragraphs:
        words = re.findall("[a-z]+", paragraph.lower())
        if is_prose(paragraph, words):
            size += len(paragraph)
            if " ".join(words) not in seen:
                kept.append(paragraph)
            seen.add(" ".join(words))
    text = "\n\n".join(kept)
    return text if len(text) >= 1000 and 2 * size >= sum(map(len, paragraphs)) else ""


def is_prose(paragraph, words):
    """Whether it is nearly all words, some of them the commonest, and ends as a sentence does."""
    return (len(words) >= 8 and re.search(r"[.!?:][\"')\u201d\u2019]*$", paragraph)
            and len("".join(words)) >= 0.85 * len(paragraph.replace(" ", ""))
            and sum(word in COMMON for word in words) >= 0.2 * len(words))


if __name__ == "__main__":
    main()
