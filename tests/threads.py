"""The same bits whatever runs beside: for any number of threads, for many callers, after a fork.

``evaluate`` gives an op's results, tensors, of the arguments of a case."""

import hashlib
import multiprocessing
import threading

import torch


def assert_same(results, wanted):
    for a, b in zip(results, wanted, strict=True):
        assert torch.equal(a, b), "other bits"


def assert_same_for_any_number_of_threads(evaluate, *case):
    wanted = None
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        results = evaluate(*case)
        wanted = wanted or results
        assert_same(results, wanted)


def assert_same_in_threads_at_once(evaluate, cases):
    """Each case in a thread of its own, again and again."""
    wanted = [evaluate(*case) for case in cases]
    failures = []

    def work(case, want):
        try:
            for _ in range(20):
                assert_same(evaluate(*case), want)
        except BaseException as error:  # noqa: BLE001  raised below, in the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(cases, wanted, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def assert_same_in_a_forked_child(evaluate, *case):
    """As a DataLoader's worker: forked after the parent has used its threads, and set to one."""
    wanted = _digest(evaluate(*case))
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(queue, evaluate, case))
    child.start()
    child.join(60)
    assert child.exitcode == 0, f"the child ended with {child.exitcode}"
    assert queue.get() == wanted


def _in_child(queue, evaluate, case):
    torch.set_num_threads(1)
    queue.put(_digest(evaluate(*case)))


def _digest(results):
    """A few bytes: a pipe that nobody reads yet would stop the child at more."""
    memory = [x.detach().flatten().view(torch.uint8).numpy().tobytes() for x in results]
    return hashlib.sha256(b"".join(memory)).hexdigest()
