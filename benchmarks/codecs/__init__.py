"""The table that decided which codecs kvfold keeps: many ways to fold a cache, the same passages, the same bits."""
