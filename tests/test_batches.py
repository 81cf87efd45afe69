"""Rows in batches of one size come out as if they had gone through at once."""

import numpy as np
import pytest

from ti_jax.batches import in_batches


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 9])
def test_rows_come_out_in_their_order_and_each_call_has_the_same_size(count):
    rows = np.arange(2 * count, dtype=np.float32).reshape(count, 2)
    sizes = []

    def function(batch):
        sizes.append(len(batch))
        return {"twice": 2 * batch, "sum": batch.sum(axis=1)}

    result = in_batches(function, rows, 4)
    np.testing.assert_array_equal(result["twice"], 2 * rows)
    np.testing.assert_array_equal(result["sum"], rows.sum(axis=1))
    assert sizes == [4] * -(-count // 4)
