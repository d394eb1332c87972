"""The beginning of `make fuzz`, with every test run: some broken files of each format."""

import sys

import pytest

from tests.fuzz.formats import FORMATS
from tests.fuzz.harness import run

pytestmark = [
    pytest.mark.backend_free,
    pytest.mark.skipif(sys.platform != "linux", reason="it reads Linux's /proc"),
]


@pytest.mark.parametrize("name", FORMATS)
def test_broken_files_load_or_are_refused_in_one_line(tmp_path, name):
    FORMATS[name].write(tmp_path)
    tally = run(name, tmp_path, 0, 150)
    assert not tally.failures, "\n".join(tally.failures)
    assert tally.outcomes["loaded"], "every case is refused: they are broken too much"
    assert tally.outcomes["refused"]
