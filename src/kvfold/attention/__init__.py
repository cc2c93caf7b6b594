"""Attention over a paged cache: prefill, decode, and the merge of their pieces."""
