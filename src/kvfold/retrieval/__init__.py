"""Which pages a step reads: methods that choose among those that are kept."""
