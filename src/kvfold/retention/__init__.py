"""Which tokens stay: methods that score and deal out, the view of a layer they score on, and re-packing."""
