"""Memory that the process keeps for its next tensors."""

import ctypes

# Parameters of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Has the C library keep the main memory that this process frees, for its next tensors.

    glibc maps every block above 32 MiB anew, and gives it back when it is freed; and the system clears each
    page when it is first touched. Where a network's maps are that large this takes a fifth of its time on a
    CPU (docs/performance.md). After this call freed blocks are used again, until the process ends. The price:
    the process never gets smaller, and since blocks of many sizes share what is kept, its peak is higher, by
    a quarter to five sixths as measured.

    Nothing calls it by itself but the command line. Memory of a GPU is not concerned.

    Returns:
        Whether it was done: False where the C library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl and macOS have none, Windows no library of no name
        return False
    return all(
        mallopt(parameter, value) == 1 for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1))
    )


def give_back_freed_memory() -> bool:
    """Has the C library give the main memory that this process has freed back to the system, once.

    For a program that called `keep_freed_memory`, where what comes next needs other blocks than what
    was before, so that they would lie beside what is kept.

    Returns:
        Whether it was done: False where the C library is not glibc.
    """
    try:
        malloc_trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return False
    malloc_trim(0)
    return True
