import pytest

pytest.importorskip("triton", reason="the module's kernels need Triton")


@pytest.mark.parametrize("largest", [1, 3, 8, 100, 512, 700])
def test_every_batch_fits_a_size_that_is_not_much_larger(largest):
    from diptych.worker.graphs import graph_sizes

    sizes = graph_sizes(largest)
    assert sizes == sorted(set(sizes)) and sizes[0] == 1 and sizes[-1] == largest
    for rows in range(1, largest + 1):
        size = next(size for size in sizes if size >= rows)
        assert size - rows < max(8, rows / 7)
