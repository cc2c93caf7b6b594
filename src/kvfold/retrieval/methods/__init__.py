"""Retrieval methods, one file each, found by their recipe word: the name of the file. See
:mod:`kvfold.retrieval.method`.
"""
