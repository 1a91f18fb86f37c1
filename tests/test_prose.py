"""data/prose.py: what is prose is kept, once, and nothing else."""
import gzip
import json
import re
import shutil
import subprocess

import prose
import pytest

PROSE = [f"Line {number} of the text is kept as it is, to its end." for number in
         "one two three four five six seven eight nine ten eleven twelve".split()]


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="there is no dpkg-deb")
def test_the_prose_of_a_package(tmp_path, capsys):
    page = lambda word: "".join(f"<p>{line} {line}</p>" for line in PROSE).replace("kept", word)
    files = {"a.html": f"<nav>{page('b')}</nav><p>f(x)</p>{page('kept')}<pre>{page('c')}</pre>",
             "again.html": page("kept"), "short.html": page("d")[:900], "index.html": page("e"),
             "german.html": page("f").replace("of the", "des").replace("it is, to", "es war, an"),
             "b.html": page("g") + "f(x)" * 999, "a.txt": page("h").replace("</p>", "\n\n")}
    (tmp_path / "tree/DEBIAN").mkdir(parents=True)
    (tmp_path / "tree/DEBIAN/control").write_text(
        "Package: a-doc\nVersion: 1\nArchitecture: all\nMaintainer: A <a@b.c>\nDescription: d\n")
    for name, text in files.items():
        (tmp_path / "tree" / name).write_text(text)
    package, out = str(tmp_path / "a-doc_1_all.deb"), tmp_path / "out"
    subprocess.run(["dpkg-deb", "--build", tmp_path / "tree", package], check=True)
    prose.main(["--out", str(out), package])
    kept = {"text": "\n\n".join(f"{line} {line}" for line in PROSE), "source": "a-doc/a.html"}
    assert json.loads(gzip.open(out / "a-doc.json.gz").read()) == kept
    (tmp_path / "b.deb").write_text(page("kept"))
    with pytest.raises(SystemExit, match="2"):
        prose.main(["--out", str(out), str(tmp_path / "b.deb")])
    assert re.fullmatch(".* dpkg-deb finds no package there\n", capsys.readouterr().err)
    assert [path.name for path in out.iterdir()] == ["a-doc.json.gz"]
