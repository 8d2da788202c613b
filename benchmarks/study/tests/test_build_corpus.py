"""How the benchmark's corpora are cut."""

import gzip
import itertools
import sys

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.study.grid import build_corpus

LINES = st.lists(st.text("ab \u00e9", max_size=30), max_size=40)


@given(LINES, st.integers(1, 60))
def test_documents_are_the_lines_that_say_something_in_order_and_none_is_long(lines, most):
    found = list(build_corpus.documents("\n".join(lines), most))
    assert "\n".join(found).splitlines() == [line.rstrip() for line in lines if line.strip()]
    assert all(len(document) <= most + document.count("\n") or "\n" not in document for document in found)
    # No document is shorter than necessary: with the first line of the next one it would be too long.
    for document, following in itertools.pairwise(found):
        assert len(document) + 1 + len(following.split("\n")[0]) + document.count("\n") + 30 > most


def test_a_page_is_its_words():
    body = "<nav>menu</nav><p>one  two<br>three &amp; four</p><ul><li>five</ul>"
    page = f"<html><head><title>T</title></head><body>{body}</body>"
    assert build_corpus.of_html(page) == "one two\nthree & four\nfive"


def test_a_folder_of_domains_is_cut_and_summed(tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "tales.txt").write_text("first line\n\nsecond line\n\nthird\n")
    monkeypatch.setattr(
        sys, "argv", ["corpora.py", "--characters", "22", "cut", str(tmp_path / "in"), str(tmp_path / "out")]
    )
    build_corpus.main()
    assert (tmp_path / "out" / "tales.txt").read_text() == "first line\nsecond line\n\nthird\n"
    assert (tmp_path / "out" / "SHA256SUMS").read_text().endswith("  tales.txt\n")
    assert "tales.txt: 2 documents" in capsys.readouterr().out


def test_texts_of_a_package_are_in_one_order_without_stubs_and_up_to_a_size(tmp_path):
    folder = tmp_path / "usr" / "docs"
    folder.mkdir(parents=True)
    for name in "abcdef":
        (folder / f"{name}.txt.gz").write_bytes(gzip.compress((f"{name} says " * 60).encode()))
    (folder / "stub.txt.gz").write_bytes(gzip.compress(b"nothing"))
    (folder / "link.txt.gz").symlink_to(folder / "a.txt.gz")
    domain = build_corpus.Domain("some-package", "usr/**/*.txt.gz")
    texts = list(build_corpus._texts(tmp_path, domain))
    assert sorted(text[0] for text in texts) == list("abcdef")
    assert texts == list(build_corpus._texts(tmp_path, domain))
    build_corpus.write(texts, tmp_path / "domain.txt", 1000, 1000)  # the third one reaches a thousand bytes
    assert (tmp_path / "domain.txt").read_text() == "\n\n".join(texts[:3]) + "\n"
