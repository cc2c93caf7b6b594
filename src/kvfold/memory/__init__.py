"""The books of the KV cache: arena, pools, block tables, prefix index, manager. Integers (numpy at most), no torch."""
