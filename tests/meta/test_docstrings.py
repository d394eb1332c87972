"""The examples in docstrings say what happens."""

import doctest
import importlib
import pkgutil

import pytest

import puna

pytestmark = pytest.mark.backend_free

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(puna.__path__, "puna.")
    # Only the backend in use can be imported.
    if module.name not in ("puna.backend.jax", "puna.backend.torch", "puna.backend.tensorflow")
)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    result = doctest.testmod(
        importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    )
    assert result.failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    modules = [importlib.import_module(name) for name in MODULES]
    assert sum(len(test.examples) for m in modules for test in finder.find(m)) >= 5
