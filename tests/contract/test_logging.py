"""Where the lines of kvsdk and of a connector's package go in a process whose logging vLLM has set up."""

import logging

import pytest

from kvsdk.vllm.binding import _log_where_vllm_logs

pytestmark = pytest.mark.compat

PACKAGES = pytest.mark.parametrize("package", ["kvsdk", "scripted"])


class Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.said = []

    def emit(self, record):
        self.said.append(record.getMessage())


@pytest.fixture
def as_in_vllm(monkeypatch):
    """`as_in_vllm(package)` leaves handlers to vLLM's logger alone, at level INFO, and returns what they hear.

    To be called within the test: until then pytest puts handlers of its own on every logger.
    """
    levels = []

    def set_up(package):
        lines, theirs, ours = Lines(), logging.getLogger("vllm"), logging.getLogger(package)
        monkeypatch.setattr(theirs, "handlers", [lines])
        monkeypatch.setattr(ours, "handlers", [])
        monkeypatch.setattr(ours, "propagate", False)
        levels.extend((logger, logger.level) for logger in (theirs, ours))
        theirs.setLevel(logging.INFO)
        ours.setLevel(logging.NOTSET)
        return lines.said

    yield set_up
    for logger, level in levels:
        logger.setLevel(level)


@PACKAGES
def test_with_the_first_connector_its_package_logs_where_vllm_does(engine, script, as_in_vllm, package):
    heard = as_in_vllm(package)
    engine()
    logging.getLogger(f"{package}.part").error("a block is missing")
    assert heard.count("a block is missing") == 1


def test_the_level_is_vllms(as_in_vllm):
    heard = as_in_vllm("scripted")
    _log_where_vllm_logs("kvsdk", "scripted")
    _log_where_vllm_logs("kvsdk", "scripted")
    logging.getLogger("scripted.part").info("a block was moved")
    logging.getLogger("scripted.part").debug("in detail")
    assert heard == ["a block was moved"]


def test_a_logger_that_has_handlers_is_left_alone(as_in_vllm):
    heard, own = as_in_vllm("scripted"), Lines()
    logging.getLogger("scripted").addHandler(own)
    _log_where_vllm_logs("scripted")
    logging.getLogger("scripted.part").warning("a block was moved")
    assert (own.said, heard) == (["a block was moved"], [])


def test_a_level_that_was_set_stays(as_in_vllm):
    heard = as_in_vllm("scripted")
    logging.getLogger("scripted").setLevel(logging.DEBUG)
    _log_where_vllm_logs("scripted")
    logging.getLogger("scripted.part").debug("in detail")
    assert heard == ["in detail"]
