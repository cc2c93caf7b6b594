"""Tasks on texts of any length, made by rule: what a model must still find when its cache is folded."""

from kvfold.quality.tasks.documents import Document, Fact, demo_document
from kvfold.quality.tasks.samples import TASKS, Sample, make_sample, score
from kvfold.quality.tasks.text import heldout_text, read_text, real_text

__all__ = [
    "TASKS",
    "Document",
    "Fact",
    "Sample",
    "demo_document",
    "heldout_text",
    "make_sample",
    "read_text",
    "real_text",
    "score",
]
