"""Reports: one document as HTML and as Markdown, and the pictures that only reports draw."""

from gif.report.document import Document

__all__ = ["Document"]
