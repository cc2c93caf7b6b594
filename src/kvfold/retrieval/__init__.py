"""Which pages a step reads of those that are kept: summaries of pages, and selection by them."""
