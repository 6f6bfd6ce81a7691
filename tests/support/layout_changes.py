"""Finds where a call copies an activation from one memory layout to another, even inside operators."""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def layout_changes(fn: Callable[[], object], batch: int) -> list[str]:
    """The copies between layouts in ``fn``, for 4-D tensors whose first dimension is ``batch``.

    Every conversion (``contiguous``, ``clone``, ``to``) ends in ``copy_``, whose strides the profiler records.
    """
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        fn()
    found = []

    def look(event, inside: tuple[str, ...]) -> None:
        if event.name == "aten::copy_":
            to, of = event.typed[1].inputs[:2]
            activation = len(to.sizes) == 4 and to.sizes[0] == batch and list(to.sizes) == list(of.sizes)
            if activation and None not in (order(to), order(of)) and order(to) != order(of):
                found.append(f"{list(to.sizes)} {order(of)} -> {order(to)} in {' > '.join(inside[-5:])}")
        for child in event.children:
            look(child, (*inside, event.name))

    events = profiler.profiler.kineto_results.experimental_event_tree()
    assert events, "the profiler saw nothing"
    for event in events:
        look(event, ())
    return found


def order(tensor) -> tuple[int, ...] | None:
    """The dimensions longer than 1, from outermost to innermost in memory. None if one is broadcast."""
    dims = [d for d, size in enumerate(tensor.sizes) if size > 1]
    if any(tensor.strides[d] == 0 for d in dims):
        return None
    return tuple(sorted(dims, key=lambda d: -tensor.strides[d]))
