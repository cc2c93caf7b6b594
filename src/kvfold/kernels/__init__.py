"""Operations on keys and values: the plain-torch truth, and the registry that picks a faster twin."""
