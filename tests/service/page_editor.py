"""The page's editor of configurations; only the lines in sight are elements of the page."""

import re

from playwright.sync_api import Page, expect

_TEXT = """async (area) => {
  const { EditorView } = await import("/static/vendor/codemirror.js");
  return EditorView.findFromDOM(area).state.%s;
}"""


class Editor:
    def __init__(self, page: Page) -> None:
        self.area = page.get_by_label("Configuration, YAML")

    @property
    def text(self) -> str:
        return self.area.evaluate(_TEXT % "doc.toString()")

    @property
    def selected(self) -> str:
        return self.area.evaluate(
            _TEXT % "sliceDoc(EditorView.findFromDOM(area).state.selection.main.from, "
            "EditorView.findFromDOM(area).state.selection.main.to)"
        )

    def fill(self, text: str) -> None:
        self.area.press("ControlOrMeta+a")
        self.area.press("Delete")
        self.area.page.keyboard.insert_text(text)
        assert self.text == text

    def wait_for(self, pattern: str) -> "Editor":
        """Wait until a line in sight matches."""
        expect(self.area).to_contain_text(re.compile(pattern))
        return self
