"""Looking at the weights of models, to the bit."""

import numpy as np

from puna import backend


def array(variable):
    """A copy of a variable's value in its own dtype."""
    return np.array(backend.ops.to_numpy(variable))


def assert_same(model, other):
    """Two models have variables of the same names, dtypes and bits."""
    ours, theirs = model.tensors(), other.tensors()
    assert sorted(ours) == sorted(theirs)
    for name, variable in ours.items():
        assert variable.dtype == theirs[name].dtype
        np.testing.assert_array_equal(array(variable), array(theirs[name]), err_msg=name)
