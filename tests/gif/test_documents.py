"""Tables that commands write into the documentation."""

import pytest

from gif.documents import markdown_table, replace_block


def test_markdown_table():
    assert markdown_table(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"


def test_a_block_is_replaced_and_nothing_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n<!-- begin x -->\nold\n\nlines\n<!-- end x -->\nrest <!-- begin y -->\n<!-- end y -->\n")
    for text in (r"new \1 text", "newer\n"):
        replace_block(page, "x", text)
        expected = (
            f"# Title\n<!-- begin x -->\n{text.rstrip()}\n<!-- end x -->\nrest <!-- begin y -->\n<!-- end y -->\n"
        )
        assert page.read_text() == expected
    replace_block(page, "y", "here")
    assert "rest <!-- begin y -->\nhere\n<!-- end y -->\n" in page.read_text()


def test_errors(tmp_path):
    page = tmp_path / "page.md"
    with pytest.raises(FileNotFoundError, match=r"page\.md"):
        replace_block(page, "x", "text")
    page.write_text("nothing marked")
    with pytest.raises(ValueError, match="has 0 blocks named x, wanted one: write <!-- begin x -->"):
        replace_block(page, "x", "text")
    assert page.read_text() == "nothing marked"
