"""The suite finds what it should: each broken connector by the test that is named beside it, whatever the seed."""

import inspect

import pytest
from broken import BROKEN, NATIVE, NativeStore

from kvsdk.testing import Subject, suite

SEEDS = [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3))]


def fails(subject, test, arguments, seed):
    """What the suite's test raised; None when it passed."""
    case, _, name = test.partition(".")
    case = getattr(suite, case)()
    try:
        getattr(case, name)(subject, seed, *arguments)
    except pytest.skip.Exception as skipped:
        raise AssertionError(f"{test} was skipped: {skipped}") from None
    except Exception as error:  # noqa: BLE001 - whatever a broken connector raises
        return error
    return None


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("connector", "capabilities", "test", "arguments", "says"), BROKEN, ids=[entry[0].__name__ for entry in BROKEN]
)
def test_it_is_found(connector, capabilities, test, arguments, says, seed):
    error = fails(Subject(connector, capabilities), test, arguments, seed)
    assert error is not None, f"{test} passed"
    with pytest.raises(type(error), match=says):
        raise error


def _names_in_the_suite():
    for name, case in inspect.getmembers(suite, inspect.isclass):
        if name.startswith("Base"):
            for test, _ in inspect.getmembers(case, inspect.isfunction):
                if test.startswith("test_"):
                    yield f"{name}.{test}"


def test_the_named_tests_exist_and_there_are_enough():
    assert len(BROKEN) >= 20
    assert {entry[2] for entry in BROKEN} <= set(_names_in_the_suite())
    assert len({entry[0] for entry in BROKEN}) == len(BROKEN)


@pytest.mark.parametrize("test", sorted({entry[2:4] for entry in BROKEN if issubclass(entry[0], NativeStore)}, key=str))
def test_the_one_that_is_right_passes_where_its_broken_kin_fail(test):
    error = fails(Subject(NativeStore, NATIVE), *test, 1)
    if error is not None:
        raise error
