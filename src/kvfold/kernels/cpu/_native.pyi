class Layout: ...

def make_layout(
    block_size: int, page_bytes: int, k: tuple[int, int, int, int, int], v: tuple[int, int, int, int, int]
) -> Layout: ...
def attend_pages(
    layout: Layout,
    q: int,
    arena: int,
    arena_bytes: int,
    pages: int,
    shift: int,
    bias: int,
    out: int,
    lse: int,
    n: int,
    heads: int,
    group: int,
    pages_per_seq: int,
    scale: float,
    threads: int,
    variant: int,
) -> None: ...
def variants() -> list[str]: ...
