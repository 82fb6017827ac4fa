import pytest

import jaxprune


def test_the_smallest_bucket_that_fits():
    buckets = jaxprune.Buckets(batch=(1, 4))
    assert [buckets.fit("batch", n) for n in (1, 2, 4)] == [1, 4, 4]
    with pytest.raises(jaxprune.UserError, match=r"batch=5, over the largest bucket 4"):
        buckets.fit("batch", 5)


@pytest.mark.parametrize("sizes", [(), (4, 2), (0, 1), (2, 2), 5, None, (1, 2.5), "12"])
def test_lists_are_checked(sizes):
    with pytest.raises(jaxprune.UserError, match="ascending"):
        jaxprune.Buckets(text=sizes)
